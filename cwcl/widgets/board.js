// The board that shows the rule. With `rule.js` and `map.js` before it, it is one script, for notebooks (through
// anywidget) and for the site (through `mount`); nothing is fetched.

const HEAD = {class: 'head', role: 'heading', 'aria-level': 3}
const LEASTS = [1, 4, 16, 64, 256, 1024]
const SHOWN = 6                                     // Of a group, before "show all"

/** What a group is, below its heading. */
const WHAT = {
  positive: 'They show the same structures. Training pulls them to the anchor.',
  near: 'They differ from the anchor in one thing, which is written below them.',
  negative: 'They differ from the anchor in more.',
  out: 'They would be positives, but are too much like the anchor.',
}
const LONELY = 'A lonely anchor: nothing can be pulled to it, '
  + 'and the contrastive loss learns nothing from it as an anchor.'

/** What one frame is to another. */
const IS = {positive: 'is a positive of', near: 'is a near miss of', negative: 'is a negative of',
  out: 'is left out of the positives of'}

const el = (tag, attrs = {}, ...children) => {
  const node = document.createElement(tag)
  for (const [k, v] of Object.entries(attrs)) {
    if (k.startsWith('on')) node.addEventListener(k.slice(2), v)
    else if (v === true || v === false) node.toggleAttribute(k, v)
    else if (v != null) node.setAttribute(k, v)
  }
  node.append(...children.filter(o => o != null))
  return node
}

/** What the page knows of the frames, from what the kernel or the site has sent. */
function unpack(model) {
  const f = model.get('frames')
  const raw = k => { const b = model.get(k); return b.buffer
    ? b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength) : b }
  const maps = f.maps && {...f.maps, points: new Float32Array(raw('points')),
    embedded: new Int16Array(raw('embedded'))}
  return {...f, pixels: new Uint32Array(raw('pixels')), maps}
}

const SETTINGS = ['on', 'least', 'phase', 'exclude', 'net', 'scale', 'temp']
const settings = model => Object.fromEntries(SETTINGS.map(k => [k, model.get(k)]))

/** Pictures of frames: sheets of thumbnails, each asked for when one of its frames comes into sight. */
class Sheets {
  constructor(model, d) {
    this.model = model; this.d = d; this.urls = new Map(); this.waiting = new Map()
    this.heard = (msg, buffers) => { if (msg.kind === 'sheet') this.arrive(msg.k, buffers[0]) }
    model.on('msg:custom', this.heard)
    this.seen = new IntersectionObserver(found => {
      for (const o of found) if (o.isIntersecting) {
        this.seen.unobserve(o.target)
        this.paint(o.target, +o.target.dataset.frame)
      }
    }, {rootMargin: '300px'})
  }
  /** Paint a frame when it comes into sight. */
  watch(node) { this.seen.observe(node) }
  arrive(k, bytes) {
    if (this.urls.has(k)) return
    this.urls.set(k, URL.createObjectURL(new Blob([bytes], {type: 'image/webp'})))
    for (const node of this.waiting.get(k) || []) this.paint(node, +node.dataset.frame)
    this.waiting.delete(k)
  }
  paint(node, i) {
    const [w, h, columns, size] = this.d.tile, k = Math.floor(i/size), at = i % size
    const url = this.urls.get(k)
    if (!url) {
      node.style.backgroundImage = ''
      if (!this.waiting.has(k)) { this.waiting.set(k, new Set()); this.model.send({kind: 'sheet', k}) }
      this.waiting.get(k).add(node)
      return
    }
    const rows = Math.ceil(Math.min(size, this.d.names.length - k*size)/columns)
    const x = at % columns, y = Math.floor(at/columns)
    node.style.backgroundImage = `url(${url})`
    node.style.backgroundSize = `${100*columns}% ${100*rows}%`
    node.style.backgroundPosition = `${columns > 1 ? 100*x/(columns-1) : 0}% ${rows > 1 ? 100*y/(rows-1) : 0}%`
    node.style.aspectRatio = `${w} / ${h}`
  }
  close() {
    this.model.off('msg:custom', this.heard)
    this.seen.disconnect()
    for (const o of this.urls.values()) URL.revokeObjectURL(o)
  }
}

/** What the words mean, for somebody who sees a board for the first time. */
function help(d) {
  const said = (...lines) => el('p', {}, lines.join(' '))
  const row = (kind, ...lines) => {
    const [sign, one, many] = KINDS[kind]
    return el('li', {class: kind}, el('b', {}, `${sign} ${kind === 'anchor' ? one : many}`), ` ${lines.join(' ')}`)
  }
  const kinds = el('ul', {},
    row('anchor', 'is the frame that all others are compared with. Click another frame, and it is the anchor.'),
    row('positive', 'show exactly the same of the structures that count'
      + (d.phased ? ' and, if the phase counts, are of the same phase of the operation.' : '.'),
    'Training pulls their embeddings together, the numbers that a network makes of a frame.'),
    row('near', 'differ from the anchor in one thing, which is written below them.',
      'Training pushes them away, like all that are not positives.'),
    row('negative', 'differ in more.'),
    row('out', 'would be positives, but are too much like the anchor:',
      'frames of one clip or video, where you choose that.'))
  const lonely = said('Training looks at one batch of frames at a time.',
    'A frame without a positive in its batch is a lonely anchor: nothing can be pulled to it,',
    'so the contrastive loss learns nothing from it as an anchor.',
    'The more structures count, and the smaller the batch, the more anchors are lonely.')
  const phase = said('The phase is one more thing in which frames can differ.',
    'It keeps apart frames that show the same but belong to different steps of the operation,',
    'and so may look different; the price is more lonely anchors.')
  const maps = said('On the map, each point is a frame, near those that the network finds alike;',
    'lines lead from the anchor to its positives, and small dots are frames outside the batch.',
    'The bars are the frames of the batch, the most similar first, as high as the softmax counts them;',
    'the loss is lowest when all positives reach the dashed line.',
    'At a low temperature only the nearest frames count, at a high one all count alike:',
    'neither is better in itself.')
  return el('details', {class: 'help'}, el('summary', {}, 'How to read this board'), kinds, lonely,
    d.phased ? phase : null, d.maps ? maps : null)
}

/** Controls above the board. Each writes a trait of the model. */
function controls(model, d) {
  const put = (k, v) => { model.set(k, v); model.save_changes() }
  const chips = d.classes.map((name, k) => el('button', {type: 'button', class: 'chip',
    onclick: () => {
      const on = model.get('on')
      put('on', on.includes(k) ? on.filter(o => o !== k) : [...on, k].sort((a, b) => a - b))
    }}, name))
  const sets = el('select', {onchange: e => { if (e.target.value) put('on', d.sets[e.target.value]) }},
    ...Object.keys(d.sets).map(o => el('option', {value: o}, o)),
      el('option', {value: '', hidden: true, disabled: true}, 'your choice'))
  const least = el('input', {type: 'range', min: 0, max: LEASTS.length - 1, step: 1,
    oninput: e => put('least', LEASTS[+e.target.value])})
  const said = el('output')
  const phase = el('input', {type: 'checkbox', onchange: e => put('phase', e.target.checked)})
  const grouped = ['clip', 'video'].filter(k => {
    const known = d[k].filter(o => o >= 0)
    return new Set(known).size < known.length
  })
  const exclude = el('select', {onchange: e => put('exclude', e.target.value)},
    el('option', {value: 'none'}, 'none'),
    ...grouped.map(k => el('option', {value: k}, `frames of one ${k}`)))
  const again = el('button', {type: 'button', class: 'again', onclick: () => model.send({kind: 'draw'})},
    'another batch')
  const node = el('div', {class: 'bar'}, help(d),
    el('fieldset', {}, el('legend', {}, 'Structures that count'), el('div', {class: 'chips'}, ...chips)),
    el('label', {}, 'class set ', sets),
    d.counted ? el('label', {}, 'a structure counts from ', least, said) : null,
    d.phased ? el('label', {}, phase, ' the phase counts') : null,
    grouped.length ? el('label', {}, 'never positives ', exclude) : null, again)
  const refresh = () => {
    const s = settings(model), same = o => o.length === s.on.length && o.every((k, i) => k === s.on[i])
    chips.forEach((o, k) => o.setAttribute('aria-pressed', s.on.includes(k)))
    sets.value = Object.keys(d.sets).find(k => same(d.sets[k])) ?? ''
    least.value = LEASTS.indexOf(s.least)
    least.setAttribute('aria-valuetext', `${s.least} pixels`)
    said.value = ` ${s.least} pixel${s.least === 1 ? '' : 's'}`
    phase.checked = s.phase
    exclude.value = s.exclude
  }
  return {node, refresh}
}

/** The mask of the batch: a cell for each anchor and frame. */
function maskView(model, d, hands) {
  const canvas = el('canvas', {tabindex: 0, role: 'application', class: 'mask'}), own = el('span', {class: 'own'})
  let batch = [], at = [0, 0], found = new Uint8Array(0)
  const paint = () => {
    if (!batch.length) return
    const n = batch.length, style = getComputedStyle(canvas), image = new ImageData(n, n),
      chosen = new Set(model.get('chosen'))
    const color = Object.keys(KINDS).map(k => [...rgb(style.getPropertyValue(`--${k}`)), 255])
    const ink = rgb(style.getPropertyValue('--ink')),
      mixed = color.map(c => [0, 1, 2].map(k => .6*c[k] + .4*ink[k]).concat(255))
    const word = c => new Uint32Array(Uint8ClampedArray.from(c).buffer)[0], plain = color.map(word),
      tinted = mixed.map(word)
    const cells = new Uint32Array(image.data.buffer), lit = batch.map(i => chosen.has(i))
    for (let i = 0, k = 0; i < n; i++) for (let j = 0; j < n; j++,
      k++) cells[k] = (lit[i] || lit[j] ? tinted : plain)[found[k]]
    canvas.width = canvas.height = n
    canvas.getContext('2d').putImageData(image, 0, 0)
    row()
  }
  const row = () => {
    own.style.top = `${100*batch.indexOf(model.get('anchor'))/batch.length}%`
    own.style.height = `${100/batch.length}%`
  }
  const refresh = (s, labels) => {
    const {ids} = setNumbers(d, s, labels, model.get('batch')), text = new Map()
    model.get('batch').forEach((i, k) => text.set(i,
      [...labels.sets.slice(i*labels.words, (i+1)*labels.words)].reverse()
      .map(o => String(o).padStart(10, '0')).join() + (s.phase ? ` ${String(d.phase[i] + 1).padStart(3, '0')}` : '')
        + ` ${ids[k]}`))
    batch = [...text.keys()].sort((i, j) => text.get(i) < text.get(j) ? -1 : text.get(i) > text.get(j) ? 1 : i - j)
    found = kinds(d, s, labels, batch)
    paint()
  }
  const point = (row, column, choose) => {
    at = [row, column].map(o => Math.min(Math.max(o, 0), batch.length - 1))
    hands.tell(batch[at[0]], batch[at[1]])
    if (choose) hands.anchor(batch[at[0]])
  }
  const cell = e => [e.offsetY/canvas.clientHeight, e.offsetX/canvas.clientWidth].map(o => Math.floor(o*batch.length))
  canvas.addEventListener('pointermove', e => point(...cell(e), false))
  canvas.addEventListener('click', e => point(...cell(e), true))
  canvas.addEventListener('pointerleave', () => hands.tell(model.get('anchor'), model.get('anchor')))
  canvas.addEventListener('keydown', e => {
    if (modified(e)) return
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key]
    if (step) point(at[0] + step[0], at[1] + step[1], false)
    else if (e.key === 'Enter' || e.key === ' ') point(...at, true)
    else return
    e.preventDefault()
  })
  return {node: el('div', {class: 'maskbox'}, canvas, own), canvas, refresh, paint, row}
}

const rgb = text => {
  const n = parseInt(text.trim().slice(1), 16)
  return [n >> 16, n >> 8 & 255, n & 255]
}

/** Buttons of frames, made once: a click makes the frame the anchor. */
function tiles(model, d, hands) {
  const made = new Map()
  const make = i => {
    const picture = el('span', {class: 'picture', 'data-frame': i}), why = el('span', {class: 'why'}),
      notes = d.notes[i]
    hands.sheets.watch(picture)
    const tell = () => hands.tell(model.get('anchor'), i)
    const node = el('button', {type: 'button', class: 'tile', 'data-frame': i, onclick: () => hands.anchor(i),
      onpointerenter: tell,
      onfocus: tell}, picture, el('span', {class: 'name'}, d.names[i]), why,
    notes ? el('span', {class: 'note'}, `⚠ ${notes.join('; ')}`) : null)
    return {node, why}
  }
  return (i, words) => {
    if (!made.has(i)) made.set(i, make(i))
    const {node, why} = made.get(i), said = words.length > 2 ? [words[0], `and ${words.length - 1} more`] : words
    if (why.textContent !== said.join(', ')) why.textContent = said.join(', ')
    node.classList.toggle('alone', hands.lonely.has(i))
    node.classList.toggle('chosen', hands.chosen.has(i))
    return node
  }
}

/** A group of frames: a heading, and a button for each frame. */
function groupView(model, d, kind, tile, hands) {
  const [sign, one, many] = KINDS[kind]
  const head = el('div', HEAD), list = el('div', {class: 'tiles', role: 'group'}),
    more = el('button', {type: 'button', class: 'more'})
  const what = el('p'), node = el('section', {class: `group ${kind}`}, head, what, list, more)
  let all = false, last = null
  more.addEventListener('click', () => { all = !all; refresh(...last) })
  const refresh = (s, labels, found) => {
    last = [s, labels, found]
    head.textContent = `${sign} ${found.length} ${found.length === 1 ? one : many}`
    list.setAttribute('aria-label', many)
    const pushed = hands.lonely.has(model.get('anchor'))
      ? ' This anchor does not push them, as it is lonely.' : ' Training pushes them away.'
    const tail = kind === 'near' || kind === 'negative' ? pushed : ''
    what.textContent = found.length ? WHAT[kind] + tail : kind === 'positive' ? LONELY : ''
    what.hidden = !what.textContent
    const some = all ? found : found.slice(0, SHOWN)
    list.replaceChildren(...some.map(i => tile(i, why(d, s, labels, model.get('anchor'), i))))
    more.hidden = found.length <= SHOWN
    more.textContent = all ? 'show fewer' : `show all ${found.length}`
    node.hidden = !found.length && kind === 'out'
  }
  return {node, refresh}
}

/** Keys that belong to the browser, such as Alt and an arrow. */
const modified = e => e.altKey || e.ctrlKey || e.metaKey

/** Move the focus among the tiles with the arrow keys, Home and End. */
function arrows(e) {
  const tiles = [...e.currentTarget.querySelectorAll('.tile')], k = tiles.indexOf(document.activeElement)
  const to = {ArrowRight: k + 1, ArrowLeft: k - 1, Home: 0, End: tiles.length - 1}[e.key]
  if (k < 0 || to == null || !tiles[to] || modified(e)) return
  tiles[to].focus()
  e.preventDefault()
}

/** The anchor with its picture, the mask, and a sentence on the pair under the pointer. */
function sideView(model, d, hands) {
  const picture = el('span', {class: 'picture'}), caption = el('figcaption'), mask = maskView(model, d, hands)
  const say = el('p', {class: 'say', 'aria-live': 'polite'}),
    figure = el('figure', {class: 'anchor'}, picture, caption)
  const keys = ['positive', 'near', 'negative', 'out'].map(k => el('span', {class: k}, KINDS[k][2])),
    dark = el('span', {class: 'dark'}, 'chosen')
  const each = el('div', {class: 'each'}, el('div', HEAD, 'each frame with each'), mask.node,
    el('p', {class: 'key'}, ...keys, dark),
    el('p', {class: 'held'}, 'A row is a frame as an anchor, sorted by what they show; the diagonal is '
      + 'each with itself. Click a row to make it the anchor.'), say)
  const node = el('div', {class: 'side'}, el('div', HEAD, '◎ anchor'), figure, each)
  let chosen
  const refresh = (s, labels, same) => {
    const i = model.get('anchor'), n = model.get('batch').length, notes = d.notes[i]
    picture.dataset.frame = i
    hands.sheets.paint(picture, i)
    caption.textContent = `${d.names[i]} shows, of the structures that count: ${shows(d, s, labels, i)}`
      + (d.phased && !s.phase ? `; phase, which does not count: ${phaseName(d, d.phase[i])}` : '')
      + (notes ? ` ⚠ ${notes.join('; ')}` : '')
    mask.canvas.setAttribute('aria-label', `Mask of ${n} frames; arrow keys move, Enter makes the row the anchor`)
    keys[3].hidden = s.exclude === 'none'
    dark.hidden = !model.get('chosen').length
    if (!same) mask.refresh(s, labels)
    else if (chosen !== model.get('chosen')) mask.paint()
    else mask.row()
    chosen = model.get('chosen')
  }
  const tell = (s, labels, i, j) => {
    const kind = relation(d, s, labels, i, j), words = why(d, s, labels, i, j)
    say.textContent = i === j ? '' : `${d.names[j]} ${IS[kind]} ${d.names[i]}: `
      + (kind === 'positive' ? `both show ${shows(d, s, labels, i)}` : words.join(', '))
  }
  /** Bring the anchor into sight, if it is not. */
  const look = () => {
    const {top, bottom} = figure.getBoundingClientRect()
    if (top < 0 || bottom > innerHeight) figure.scrollIntoView({block: 'nearest'})
  }
  return {node, refresh, tell, look, paint: mask.paint}
}

/** What a batch comes to, with a button that goes from one lonely anchor to the next. */
function sumView(model, d, hands) {
  let lonely = []
  const next = el('button', {type: 'button', class: 'lonely', onclick: () => {
    const at = lonely.indexOf(model.get('anchor'))
    hands.anchor(lonely[(at + 1) % lonely.length])
  }})
  const n = el('span'), rest = el('span'), node = el('p', {class: 'sum', role: 'status'}, n, next, rest)
  const refresh = (found, s, batch) => {
    lonely = found.lonely
    n.textContent = `${batch.length} frames: `
    const share = Math.round(100*lonely.length/Math.max(batch.length, 1))
    next.textContent = `${lonely.length} lonely anchor${lonely.length === 1 ? '' : 's'} (${share} %)`
      + (lonely.length ? ' ›' : '')
    next.disabled = !lonely.length
    next.title = lonely.length ? 'Show the next one' : ''
    const near = found.oneClip ? `, ${Math.round(100*found.oneClip/found.pairs)} % of them in one clip` : ''
    rest.textContent = `, ${found.pairs/2} positive pair${found.pairs === 2 ? '' : 's'}${near}`
      + (s.on.length ? '' : s.phase ? '. No structure counts: only the phase tells frames apart'
        : '. No structure counts, so all frames count as the same')
  }
  return {node, refresh}
}

/** How many positives the anchor has, and had before. */
function anchorView() {
  const node = el('p', {class: 'mine', 'aria-live': 'polite'})
  let last = {}
  const refresh = (anchor, positives) => {
    if (anchor === last.anchor && positives === last.positives) return
    const before = anchor === last.anchor ? `, before ${last.positives}` : ''
    node.textContent = `The anchor has ${positives} positive${positives === 1 ? '' : 's'}${before}.`
      + (positives ? '' : ' It is lonely.')
    last = {anchor, positives}
  }
  return {node, refresh}
}

/** Put a board into an element. Returns what takes it away again. */
export function mount(model, root) {
  const d = unpack(model), hands = {sheets: new Sheets(model, d)}
  const put = traits => { for (const [k, v] of Object.entries(traits)) model.set(k, v); model.save_changes() }
  let labels, s, key, drawn
  let looking = false
  hands.anchor = i => { looking = true; put(model.get('batch').includes(i)
    ? {anchor: i} : {anchor: i, batch: [...model.get('batch'), i]}) }
  hands.choose = chosen => put({chosen})
  hands.batch = batch => put({batch, anchor: batch.includes(model.get('anchor')) ? model.get('anchor') : batch[0]})
  hands.tell = (i, j) => {
    side.tell(s, labels, i, j)
    for (const o of root.querySelectorAll('.tile.hot')) o.classList.remove('hot')
    root.querySelector(`.tile[data-frame="${j}"]`)?.classList.add('hot')
    maps?.heat(j)
  }
  const bar = controls(model, d), side = sideView(model, d, hands),
    maps = d.maps ? embeddingView(model, d, hands) : null
  const sizes = sizeView(model, d)
  const sum = sumView(model, d, hands), mine = anchorView()
  const tile = tiles(model, d, hands),
    kinds = ['positive', 'near', 'negative', 'out'].map(k => [k, groupView(model, d, k, tile, hands)])
  const lists = el('div', {class: 'groups', onkeydown: arrows}, ...kinds.map(o => o[1].node))
  root.classList.add('cwcl-board')
  root.append(bar.node, sum.node, mine.node,
    el('div', {class: 'main'}, side.node,
    el('div', {class: 'wide'}, lists, el('section', {class: 'embedding'}, ...maps?.nodes ?? [], sizes.node))))
  const refresh = () => {
    s = settings(model)
    if (key !== `${s.on} ${s.least}`) [key, labels] = [`${s.on} ${s.least}`, labelSets(d, s)]
    const i = model.get('anchor'), batch = model.get('batch')
    const focused = document.activeElement?.matches('.tile') && root.contains(document.activeElement)
    const found = groups(d, s, labels, i, batch)
    bar.refresh()
    const size = model.get('size'),
      same = drawn && drawn.size === size && drawn.batch === batch
      && ['phase', 'exclude'].every(k => drawn[k] === s[k]) && drawn.labels === labels
    if (!same) {
      const all = counts(d, s, labels, batch)
      sum.refresh(all, s, batch)
      sizes.refresh(s, labels, all)
      hands.lonely = new Set(all.lonely)
    }
    hands.chosen = new Set(model.get('chosen'))
    side.refresh(s, labels, same)
    mine.refresh(i, found.positive.length)
    drawn = {...s, batch, labels, size}
    for (const [k, view] of kinds) view.refresh(s, labels, found[k])
    maps?.refresh(s, labels)
    hands.tell(i, i)
    if (focused) root.querySelector('.tile')?.focus({preventScroll: true})
    if (looking) side.look()
    looking = false
  }
  let waiting = false // Several traits that change at once are drawn once
  const soon = () => { if (!waiting) { waiting = true; queueMicrotask(() => { waiting = false; refresh() }) } }
  const traits = ['anchor', 'batch', 'chosen', 'size', ...SETTINGS].map(k => `change:${k}`)
  for (const o of traits) model.on(o, soon)
  const paint = () => { side.paint(); maps?.paint(); sizes.paint() },
    dark = matchMedia('(prefers-color-scheme: dark)')
  dark.addEventListener('change', paint)
  const theme = new MutationObserver(paint) // JupyterLab's own
  theme.observe(document.body, {attributeFilter: ['data-jp-theme-light']})
  const wide = new ResizeObserver(paint)
  wide.observe(root)
  refresh()
  return () => {
    for (const o of traits) model.off(o, soon)
    dark.removeEventListener('change', paint)
    theme.disconnect()
    hands.sheets.close()
    wide.disconnect()
    root.replaceChildren()
  }
}

export default {render: ({model, el: root}) => mount(model, root)}

// ---------------------------------------------------------------- without a kernel

const bytes = text => Uint8Array.from(atob(text), o => o.charCodeAt(0))

/** How a trait is written in an address, in this order: numbers, lists of numbers, words. */
const WRITTEN = {anchor: 'number', least: 'number', phase: 'switch', exclude: 'word', on: 'list', batch: 'list',
  net: 'number',
  scale: 'number', temp: 'number', chosen: 'list', size: 'number'}

/** Parts of an address after its `#`, without the one of a board; a section's name stays as it is. */
const others = name => location.hash.slice(1).split('&').filter(o => o && !o.startsWith(`${name}=`))

/** What a kernel is to the board, in a page: a state, who listens, and sheets that the page holds. */
export class Page {
  constructor(state, sheets, name = '') {
    const binary = ['pixels', 'points', 'embedded'].map(k => [k, bytes(state[k])])
    Object.assign(this, {state: {...state, ...Object.fromEntries(binary)}, sheets, name, heard: new Map(), last: 0})
    if (!name) return
    this.read()
    addEventListener('hashchange', () => { if (this.read()) this.changed() })
  }
  get(k) { return this.state[k] }
  set(k, v) { this.state[k] = v; for (const f of this.heard.get(`change:${k}`) || []) f() }
  on(k, f) { this.heard.set(k, [...(this.heard.get(k) || []), f]) }
  off(k, f) { this.heard.set(k, (this.heard.get(k) || []).filter(o => o !== f)) }
  changed() { for (const k of Object.keys(WRITTEN)) this.set(k, this.state[k]) }
  /** Keep the state in the address, so that it can be sent to others; not more often than browsers allow. */
  save_changes() {
    if (!this.name) return
    clearTimeout(this.later)
    this.later = setTimeout(() => this.write(), Date.now() - this.last > 400 ? 0 : 400)
  }
  write() {
    this.last = Date.now()
    const text = Object.entries(WRITTEN).map(([k, kind]) => {
      const v = this.state[k]
      return kind === 'list' ? v.join('.') : kind === 'switch' ? +v : v
    })
    history.replaceState(null, '', `#${[...others(this.name), `${this.name}=${text.join('_')}`].join('&')}`)
  }
  /** Take the state from the address, if it has one that fits; say whether. */
  read() {
    const text = location.hash.slice(1).split('&').find(o => o.startsWith(`${this.name}=`))
    const parts = (text || '').slice(this.name.length + 1).split('_'), kinds = Object.entries(WRITTEN)
    if (parts.length !== kinds.length) return false
    const list = o => o ? [...new Set(o.split('.').map(Number))] : []
    const got = Object.fromEntries(kinds.map(([k, kind], at) => [k, kind === 'list' ? list(parts[at])
      : kind === 'switch' ? parts[at] === '1' : kind === 'word' ? parts[at] : +parts[at]]))
    if (!this.fits(got)) return false
    Object.assign(this.state, got)
    return true
  }
  fits({anchor, least, exclude, on, batch, net, scale, temp, chosen, size}) {
    const {frames} = this.state, n = frames.names.length, maps = frames.maps || {nets: [0], scales: [0]}
    const below = most => o => Number.isInteger(o) && 0 <= o && o < most
    return [...batch, ...chosen].every(below(n)) && batch.includes(anchor) && on.every(below(frames.classes.length))
      && below(maps.nets.length)(net) && below(maps.scales.length)(scale) && below(n + 1)(size) && least >= 1
      && temp >= .01 && temp <= 1 && ['none', 'clip', 'video'].includes(exclude)
  }
  send({kind, k, size}) {
    if (kind === 'sheet') queueMicrotask(() => {
      for (const f of this.heard.get('msg:custom') || []) f({kind, k}, [bytes(this.sheets[k])])
    })
    if (kind === 'draw') this.draw(size ?? this.state.size)
  }
  draw(size) {
    const all = this.state.frames.names.map((_, i) => i)
    for (let i = all.length - 1; i > 0; i--) {
      const j = Math.floor(Math.random()*(i + 1)), other = all[i]
      all[i] = all[j]
      all[j] = other
    }
    const batch = all.slice(0, size)
    if (!batch.includes(this.state.anchor)) batch[size - 1] = this.state.anchor
    Object.assign(this.state, {batch, size})
    this.changed()
    this.save_changes()
  }
}
