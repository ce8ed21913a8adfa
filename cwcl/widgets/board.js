// Positive pairs to touch: the rule, and the board that shows it.
// One file for notebooks (through anywidget) and for the site (through `mount`); nothing is fetched.

// ---------------------------------------------------------------- the rule, `positive_mask` is its oracle

export const KINDS = {
  anchor: ['◎', 'anchor'], positive: ['●', 'positives'], near: ['▲', 'near misses'],
  negative: ['■', 'negatives'], out: ['○', 'left out'],
}

/** Bits of the structures that each frame shows, `words` numbers for a frame. */
export function labelSets(d, s) {
  const n = d.names.length, c = d.classes.length, words = Math.ceil(c/32), sets = new Uint32Array(n*words)
  const on = d.classes.map((_, k) => s.on.includes(k))
  for (let i = 0; i < n; i++)
    for (let k = 0; k < c; k++)
      if (on[k] && d.pixels[i*c + k] >= s.least) sets[i*words + (k >> 5)] |= 1 << (k & 31)
  return {sets, words}
}

/** Numbers of the structures in which two frames differ. */
export function differing({sets, words}, i, j) {
  const out = []
  for (let w = 0; w < words; w++) {
    let x = (sets[i*words + w] ^ sets[j*words + w]) >>> 0
    while (x) { const low = x & -x; out.push(32*w + 31 - Math.clz32(low)); x ^= low }
  }
  return out
}

/** What frame `j` is to anchor `i`: a key of `KINDS`. */
export function relation(d, s, labels, i, j) {
  if (i === j) return 'anchor'
  const apart = s.phase && (d.phase[i] !== d.phase[j] || d.phase[i] < 0)
  let n = apart ? 1 : 0
  for (let w = 0; w < labels.words && n < 2; w++) {
    const x = labels.sets[i*labels.words + w] ^ labels.sets[j*labels.words + w]
    if (x) n += x & (x - 1) ? 2 : 1
  }
  if (n) return n === 1 ? 'near' : 'negative'
  const group = s.exclude === 'none' ? null : d[s.exclude]
  return group && group[i] === group[j] ? 'out' : 'positive'
}

/** Groups of an anchor among the frames of a batch: kind to numbers of frames. */
export function groups(d, s, labels, anchor, batch) {
  const out = {positive: [], near: [], negative: [], out: []}
  for (const j of batch) if (j !== anchor) out[relation(d, s, labels, anchor, j)].push(j)
  return out
}

/** How many frames of a batch have no positive in it, and how many positive pairs are of one clip. */
export function counts(d, s, labels, batch) {
  let lonely = 0, pairs = 0, near = 0
  for (const i of batch) {
    let own = 0
    for (const j of batch) {
      if (relation(d, s, labels, i, j) !== 'positive') continue
      own++
      if (d.clip[i] === d.clip[j]) near++
    }
    pairs += own
    if (!own) lonely++
  }
  return {lonely, pairs, oneClip: near}
}

/** Why frame `j` is what it is to anchor `i`, in words. */
export function why(d, s, labels, i, j) {
  const kind = relation(d, s, labels, i, j)
  const said = differing(labels, i, j).map(k => {
    const there = labels.sets[j*labels.words + (k >> 5)] >>> (k & 31) & 1
    return `${there ? 'also' : 'no'} ${d.classes[k]}`
  })
  if (s.phase && i !== j) {
    if (d.phase[i] < 0 || d.phase[j] < 0) said.push('phase unknown')
    else if (d.phase[i] !== d.phase[j]) said.push(`phase ${d.phase[j]}`)
  }
  if (kind === 'out') said.push(`same ${s.exclude}`)
  return said
}

/** What a frame shows, in words. */
export function shows(d, s, labels, i) {
  const own = d.classes.filter((_, k) => labels.sets[i*labels.words + (k >> 5)] >>> (k & 31) & 1)
  const phase = d.phase[i] < 0 ? 'phase unknown' : `phase ${d.phase[i]}`
  return `${own.length ? own.join(', ') : 'no structure'}${s.phase ? `; ${phase}` : ''}`
}

// ---------------------------------------------------------------- the board

const HEAD = {class: 'head', role: 'heading', 'aria-level': 4}
const LEASTS = [1, 4, 16, 64, 256, 1024]
const SHOWN = 24                                    // Of a group, before "more"

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
  const f = model.get('frames'), b = model.get('pixels')
  const raw = b.buffer ? b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength) : b
  return {...f, pixels: new Uint32Array(raw)}
}

const settings = model => ({
  on: model.get('on'), least: model.get('least'), phase: model.get('phase'), exclude: model.get('exclude'),
})

/** Pictures of frames: sheets of thumbnails, each asked for when one of its frames comes into sight. */
class Sheets {
  constructor(model, d) {
    this.model = model; this.d = d; this.urls = new Map(); this.waiting = new Map()
    this.heard = (msg, buffers) => { if (msg.kind === 'sheet') this.arrive(msg.k, buffers[0]) }
    model.on('msg:custom', this.heard)
  }
  arrive(k, bytes) {
    if (this.urls.has(k)) return
    this.urls.set(k, URL.createObjectURL(new Blob([bytes], {type: 'image/jpeg'})))
    for (const node of this.waiting.get(k) || []) this.paint(node, +node.dataset.frame)
    this.waiting.delete(k)
  }
  paint(node, i) {
    const [w, h, columns, size] = this.d.tile, k = Math.floor(i/size), at = i % size
    const url = this.urls.get(k)
    if (!url) {
      if (!this.waiting.has(k)) { this.waiting.set(k, []); this.model.send({kind: 'sheet', k}) }
      this.waiting.get(k).push(node)
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
    for (const o of this.urls.values()) URL.revokeObjectURL(o)
  }
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
    ...Object.keys(d.sets).map(o => el('option', {value: o}, o)), el('option', {value: '', hidden: true}, 'your choice'))
  const least = el('input', {type: 'range', min: 0, max: LEASTS.length - 1, step: 1,
    oninput: e => put('least', LEASTS[+e.target.value])})
  const said = el('output')
  const phase = el('input', {type: 'checkbox', onchange: e => put('phase', e.target.checked)})
  const exclude = el('select', {onchange: e => put('exclude', e.target.value)},
    el('option', {value: 'none'}, 'no frame'), el('option', {value: 'clip'}, 'frames of its clip'),
    el('option', {value: 'video'}, 'frames of its video'))
  const again = el('button', {type: 'button', class: 'again', onclick: () => model.send({kind: 'draw'})}, 'another batch')
  const node = el('div', {class: 'bar'},
    el('fieldset', {}, el('legend', {}, 'Structures that count'), el('div', {class: 'chips'}, ...chips)),
    el('label', {}, 'class set ', sets),
    d.counted ? el('label', {}, 'a structure needs ', least, said) : null,
    d.phased ? el('label', {}, phase, ' the phase counts') : null,
    el('label', {}, 'an anchor leaves out ', exclude), again)
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
function maskView(model, d, tell) {
  const canvas = el('canvas', {tabindex: 0, role: 'img', class: 'mask'})
  let batch = [], at = [0, 0], kinds = []
  const color = {}
  const paint = () => {
    const n = batch.length, style = getComputedStyle(canvas), image = new ImageData(n, n)
    for (const k of Object.keys(KINDS)) color[k] = rgb(style.getPropertyValue(`--${k}`))
    kinds.forEach((k, o) => image.data.set([...color[k], k === 'near' ? 110 : 255], 4*o))
    canvas.width = canvas.height = n
    canvas.getContext('2d').putImageData(image, 0, 0)
  }
  const refresh = (s, labels) => {
    const key = i => labels.sets.slice(i*labels.words, (i+1)*labels.words).reverse().join() + (s.phase ? ` ${d.phase[i]}` : '')
    const keys = new Map(model.get('batch').map(i => [i, key(i)]))
    batch = [...keys.keys()].sort((i, j) => keys.get(i) < keys.get(j) ? -1 : keys.get(i) > keys.get(j) ? 1 : i - j)
    kinds = batch.flatMap(i => batch.map(j => relation(d, s, labels, i, j)))
    paint()
  }
  const point = (row, column, choose) => {
    at = [row, column].map(o => Math.min(Math.max(o, 0), batch.length - 1))
    tell(batch[at[0]], batch[at[1]])
    if (choose) { model.set('anchor', batch[at[0]]); model.save_changes() }
  }
  const cell = e => [e.offsetY/canvas.clientHeight, e.offsetX/canvas.clientWidth].map(o => Math.floor(o*batch.length))
  canvas.addEventListener('pointermove', e => point(...cell(e), false))
  canvas.addEventListener('click', e => point(...cell(e), true))
  canvas.addEventListener('keydown', e => {
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key]
    if (step) point(at[0] + step[0], at[1] + step[1], false)
    else if (e.key === 'Enter' || e.key === ' ') point(...at, true)
    else return
    e.preventDefault()
  })
  return {node: canvas, refresh, paint}
}

const rgb = text => {
  const n = parseInt(text.trim().slice(1), 16)
  return [n >> 16, n >> 8 & 255, n & 255]
}

/** A group of frames: a heading, and a button for each frame, which makes it the anchor. */
function groupView(model, d, kind, sheets, tell) {
  const [sign, name] = KINDS[kind]
  const head = el('div', HEAD), list = el('div', {class: 'tiles', role: 'group'}), more = el('button', {type: 'button', class: 'more'})
  const node = el('section', {class: `group ${kind}`}, head, list, more)
  let all = false, last = null
  more.addEventListener('click', () => { all = !all; refresh(...last) })
  const tile = (i, words) => {
    const picture = el('span', {class: 'picture', 'data-frame': i})
    sheets.paint(picture, i)
    const choose = () => { model.set('anchor', i); model.save_changes() }
    const said = words.length > 2 ? [words[0], `and ${words.length - 1} more`] : words
    return el('button', {type: 'button', class: 'tile', 'data-frame': i, onclick: choose,
      onpointerenter: () => tell(model.get('anchor'), i), onfocus: () => tell(model.get('anchor'), i)},
      picture, el('span', {class: 'name'}, d.names[i]), el('span', {class: 'why'}, said.join(', ')))
  }
  const refresh = (s, labels, found) => {
    last = [s, labels, found]
    head.textContent = `${sign} ${found.length} ${name}`
    list.setAttribute('aria-label', name)
    const some = all ? found : found.slice(0, SHOWN)
    list.replaceChildren(...some.map(i => tile(i, why(d, s, labels, model.get('anchor'), i))))
    more.hidden = found.length <= SHOWN
    more.textContent = all ? 'show fewer' : `show all ${found.length}`
    node.hidden = !found.length && kind === 'out'
  }
  return {node, refresh}
}

/** Move the focus among the tiles with the arrow keys, Home and End. */
function arrows(e) {
  const tiles = [...e.currentTarget.querySelectorAll('.tile')], k = tiles.indexOf(document.activeElement)
  const to = {ArrowRight: k + 1, ArrowLeft: k - 1, Home: 0, End: tiles.length - 1}[e.key]
  if (k < 0 || to == null || !tiles[to]) return
  tiles[to].focus()
  e.preventDefault()
}

/** Put a board into an element. Returns what takes it away again. */
export function mount(model, root) {
  const d = unpack(model), sheets = new Sheets(model, d)
  const say = el('p', {class: 'say', 'aria-live': 'polite'}), sum = el('p', {class: 'sum', role: 'status'})
  let labels, s
  const tell = (i, j) => {
    const kind = relation(d, s, labels, i, j), words = why(d, s, labels, i, j)
    const head = i === j ? `${d.names[i]}: ` : `${d.names[i]} and ${d.names[j]}: `
    say.textContent = head + (i === j ? shows(d, s, labels, i)
      : kind === 'positive' ? `positives, both show ${shows(d, s, labels, i)}` : `${KINDS[kind][1].replace(/s$/, '')}: ${words.join(', ')}`)
    for (const o of root.querySelectorAll('.tile')) o.classList.toggle('hot', +o.dataset.frame === j)
  }
  const bar = controls(model, d), mask = maskView(model, d, tell)
  const picture = el('span', {class: 'picture'}), caption = el('figcaption')
  const anchor = el('figure', {class: 'anchor'}, picture, caption)
  const kinds = ['positive', 'near', 'negative', 'out'].map(k => [k, groupView(model, d, k, sheets, tell)])
  const lists = el('div', {class: 'groups', onkeydown: arrows}, ...kinds.map(o => o[1].node))
  const side = el('div', {class: 'side'}, el('div', HEAD, '◎ anchor'), anchor, el('div', HEAD, 'each frame with each, sorted by what they show'),
    mask.node, el('p', {class: 'key'}, ...['positive', 'near', 'negative'].map(k => el('span', {class: k}, `${KINDS[k][0]} ${KINDS[k][1]}`))), say)
  root.classList.add('cwcl-board')
  root.append(bar.node, sum, el('div', {class: 'main'}, side, lists))
  const refresh = () => {
    s = settings(model)
    labels = labelSets(d, s)
    const i = model.get('anchor'), batch = model.get('batch')
    const chosen = document.activeElement?.matches('.tile') && root.contains(document.activeElement)
    const found = groups(d, s, labels, i, batch), c = counts(d, s, labels, batch)
    bar.refresh()
    picture.dataset.frame = i
    sheets.paint(picture, i)
    caption.textContent = `${d.names[i]} shows ${shows(d, s, labels, i)}`
    for (const [k, view] of kinds) view.refresh(s, labels, found[k])
    mask.refresh(s, labels)
    mask.node.setAttribute('aria-label', `Mask of ${batch.length} frames; arrow keys move, Enter makes the row the anchor`)
    sum.textContent = `${batch.length} frames: ${c.lonely} lonely anchor${c.lonely === 1 ? '' : 's'} `
      + `(${Math.round(100*c.lonely/batch.length)} %), ${c.pairs/2} positive pairs`
      + (c.pairs ? `, ${Math.round(100*c.oneClip/c.pairs)} % of them in one clip` : '')
    tell(i, i)
    if (chosen) root.querySelector('.tile')?.focus({preventScroll: true})
  }
  const traits = ['anchor', 'batch', 'on', 'least', 'phase', 'exclude'].map(k => `change:${k}`)
  for (const o of traits) model.on(o, refresh)
  const dark = matchMedia('(prefers-color-scheme: dark)')
  dark.addEventListener('change', mask.paint)
  refresh()
  return () => {
    for (const o of traits) model.off(o, refresh)
    dark.removeEventListener('change', mask.paint)
    sheets.close()
    root.replaceChildren()
  }
}

export default {render: ({model, el: root}) => mount(model, root)}

// ---------------------------------------------------------------- without a kernel

const bytes = text => Uint8Array.from(atob(text), o => o.charCodeAt(0))

/** What a kernel is to the board, in a page: a state, who listens, and sheets that the page holds. */
export class Page {
  constructor(state, sheets, name = '') {
    this.state = {...state, pixels: bytes(state.pixels)}; this.sheets = sheets; this.name = name; this.heard = new Map()
    if (name) this.read(new URLSearchParams(location.hash.slice(1)).get(name))
  }
  get(k) { return this.state[k] }
  set(k, v) { this.state[k] = v; for (const f of this.heard.get(`change:${k}`) || []) f() }
  on(k, f) { this.heard.set(k, [...(this.heard.get(k) || []), f]) }
  off(k, f) { this.heard.set(k, (this.heard.get(k) || []).filter(o => o !== f)) }
  /** Keep the state in the address, so that it can be sent to others. */
  save_changes() {
    if (!this.name) return
    const {anchor, batch, on, least, phase, exclude} = this.state
    const all = new URLSearchParams(location.hash.slice(1))
    all.set(this.name, [anchor, least, +phase, exclude, on.join('.'), batch.join('.')].join('_'))
    history.replaceState(null, '', `#${all}`)
  }
  read(text) {
    const [anchor, least, phase, exclude, on, batch] = (text || '').split('_')
    if (batch === undefined) return
    const numbers = o => o ? o.split('.').map(Number) : [], n = this.state.frames.names.length
    const known = [...numbers(batch), +anchor].every(o => Number.isInteger(o) && 0 <= o && o < n)
    if (!known || !['none', 'clip', 'video'].includes(exclude)) return
    Object.assign(this.state, {anchor: +anchor, least: +least || 1, phase: phase === '1', exclude,
      on: numbers(on).filter(o => o < this.state.frames.classes.length), batch: numbers(batch)})
  }
  send({kind, k}) {
    if (kind === 'sheet') queueMicrotask(() => {
      for (const f of this.heard.get('msg:custom') || []) f({kind, k}, [bytes(this.sheets[k])])
    })
    if (kind === 'draw') {
      const n = this.state.frames.names.length, all = Array.from({length: n}, (_, i) => i)
      for (let i = n - 1; i > 0; i--) { const j = Math.floor(Math.random()*(i + 1)); [all[i], all[j]] = [all[j], all[i]] }
      const batch = all.slice(0, this.state.batch.length)
      if (!batch.includes(this.state.anchor)) this.state.anchor = batch[0]
      this.set('batch', batch)
      this.save_changes()
    }
  }
}
