// ---------------------------------------------------------------- two explorers for pages without a kernel

/** How far each number of a picture is from the next one at its right or below it, whichever is more. */
export function jumps(a, h, w) {
  return Float64Array.from(a, (o, k) => Math.max(k % w + 1 < w ? Math.abs(a[k+1] - o) : 0,
    k + w < h*w ? Math.abs(a[k+w] - o) : 0))
}

/** First pixels of the windows along a side, as `window_starts`. */
export function windowStarts(length, side, overlap) {
  const stride = Math.max(Math.trunc(side*(1 - overlap)), 1), out = []
  for (let o = 0; o < length - side; o += stride) out.push(o)
  return [...out, Math.max(length - side, 0)]
}

/** How much a window counts at each of its pixels, as `window_weights`. */
export function windowWeights(side, blend) {
  const g = Float64Array.from({length: side}, (_, k) => Math.exp(-((k - (side - 1)/2)**2)/(2*(side/8)**2)))
  const least = Math.max(g[0]*g[0], 1e-3)
  return Float64Array.from({length: side*side}, (_, k) =>
    blend === 'constant' ? 1 : Math.max(g[Math.floor(k/side)]*g[k % side], least))
}

/** Windows over a frame, how many see a pixel, what one of them counts, and where a blended error jumps. */
export function windowState(height, width, {side, overlap, blend, along}) {
  const h = Math.max(height, side), w = Math.max(width, side), weights = windowWeights(side, blend), boxes = []
  for (const y of windowStarts(height, side, overlap)) for (const x of windowStarts(width, side,
    overlap)) boxes.push([y, x])
  const [hits, total, error, share] = Array.from({length: 4}, () => new Float64Array(h*w))
  const each = ([top, left], f) => {
    for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) f((top + y)*w + left + x, y*side + x,
      (x + y)/(2*(side - 1)))
  }
  for (const box of boxes) each(box,
    (at, k, ramp) => { hits[at]++; total[at] += weights[k]; error[at] += ramp*weights[k] })
  const number = Math.round(along*(boxes.length - 1))
  each(boxes[number], (at, k) => { share[at] = weights[k]/total[at] })
  for (let k = 0; k < h*w; k++) error[k] /= total[k]
  const leaps = jumps(error, h, w)
  return {h, w, boxes, number, hits, share, error, jumps: leaps, seams: leaps.filter(o => o > .05).length}
}

/** The least and the greatest of many numbers; as arguments of `Math.max` they would be too many for some browsers. */
function ends(numbers) {
  let least = Infinity, most = -Infinity
  for (const o of numbers) { least = Math.min(least, o); most = Math.max(most, o) }
  return [least, most]
}

/** A slider over `steps`, which sets `s[key]`, with what it stands at beside it. */
function slider(s, key, label, steps, refresh, text = String) {
  const shown = el('span')
  const input = el('input', {type: 'range', min: 0, max: steps.length - 1, step: 1, value: steps.indexOf(s[key]),
    oninput: e => { s[key] = steps[+e.target.value]; say(); refresh() }})
  const say = () => {
    shown.textContent = ` ${text(s[key])}`
    input.setAttribute('aria-valuetext', text(s[key]))
  }
  say()
  return el('label', {}, `${label} `, input, shown)
}

/** A picture of numbers from `low` to `high`, dark to light, on a canvas of its own. */
function heatView(title, colors) {
  const canvas = el('canvas', {role: 'img', class: 'heat', 'aria-label': title}), head = el('figcaption')
  const paint = (a, h, w, high, text, over) => {
    const image = new ImageData(w, h)
    a.forEach((v, k) => {
      const c = 3*Math.round(255*Math.min(v/high, 1))
      image.data.set(over?.(k) ?? [colors[c], colors[c+1], colors[c+2]], 4*k)
      image.data[4*k + 3] = 255
    })
    canvas.width = w
    canvas.height = h
    canvas.getContext('2d').putImageData(image, 0, 0)
    head.textContent = text
  }
  return {node: el('figure', {class: 'panel'}, head, canvas), canvas, head, paint}
}

/** Windows to lay over a frame. `data`: width, height, picture (a URL), colors (bytes of a color map). */
export function mountWindows(data, root) {
  const colors = bytes(data.colors), s = {side: 128, overlap: .25, blend: 'constant', along: .5}
  const overlaps = [0, .1, .25, .33, .5, .75]
  const sliders = [
    slider(s, 'side', 'window', Array.from({length: 7}, (_, k) => 64 + 32*k), show, o => `${o} pixels`),
    slider(s, 'overlap', 'overlap', overlaps, show),
    slider(s, 'along', 'first to last window', Array.from({length: 21}, (_, k) => k/20), show),
  ]
  const blend = el('select', {onchange: e => { s.blend = e.target.value; show() }},
    ...['constant', 'gaussian'].map(o => el('option', {value: o}, o)))
  const said = el('p', {class: 'sum', role: 'status'}), picture = new Image()
  const [boxes, hits, share, error] = ['windows over the frame', 'windows that see a pixel', 'share of one window',
    'blended error'].map(o => heatView(o, colors))
  root.classList.add('cwcl-board')
  root.append(el('div', {class: 'bar'}, ...sliders, el('label', {}, 'blending ', blend)), said,
    el('div', {class: 'panels'}, ...[boxes, hits, share, error].map(o => o.node)))
  const layOut = ({h, w, boxes: all, number}) => {
    boxes.canvas.width = w
    boxes.canvas.height = h
    const g = boxes.canvas.getContext('2d')
    g.fillStyle = '#888'
    g.fillRect(0, 0, w, h)
    g.drawImage(picture, Math.floor((w - data.width)/2), Math.floor((h - data.height)/2), data.width, data.height)
    all.forEach(([y, x], k) => {
      g.strokeStyle = k === number ? '#e69f00' : '#ffffff'
      g.lineWidth = k === number ? 3 : 1
      if (k !== number) g.strokeRect(x + .5, y + .5, s.side - 1, s.side - 1)
    })
    const [y, x] = all[number]
    g.strokeStyle = '#e69f00'
    g.strokeRect(x + 1.5, y + 1.5, s.side - 3, s.side - 3)
    boxes.head.textContent = `${all.length} windows; number ${number + 1} drawn thick`
  }
  function show() {
    const o = windowState(data.height, data.width, s), [least, most] = ends(o.hits)
    const jump = ends(o.jumps)[1].toFixed(2)
    said.textContent = `${o.boxes.length} windows of ${s.side} pixels over a frame of ${data.width}×${data.height}. `
      + `A pixel is seen by ${least} to ${most} of them. The largest jump of the blended error is ${jump}; `
      + `${(100*o.seams/(o.h*o.w)).toFixed(1)}% of all pixels lie on a visible seam.`
    layOut(o)
    hits.paint(o.hits, o.h, o.w, most, `seen by ${least} to ${most} windows (light: more)`)
    share.paint(o.share, o.h, o.w, 1, `share of window ${o.number + 1} in the answer (dark 0, light 1)`)
    error.paint(o.error, o.h, o.w, 1, `blended error; seams orange, largest jump ${jump}`,
      k => o.jumps[k] > .05 ? [230, 159, 0] : Array(3).fill(255*o.error[k]))
  }
  picture.onload = show
  picture.src = data.picture
}

/** Round as Python does: a half to the even side. */
const rounded = x => x % 1 === .5 ? 2*Math.round(x/2) : Math.round(x)

/** What each part of a split shows of each class, as `split_counts`. `counts`: rows of frames and classes by video. */
export function splitCounts({videos, counts, test}, valid, classes) {
  const part = videos.map(v => test.includes(v) ? 'test' : valid.includes(v) ? 'valid' : 'train')
  const sum = (p, k) => counts.reduce((a, row, i) => a + (part[i] === p ? row[k] : 0), 0), n = sum('train', 0)
  const missed = (train, draws) => {
    let p = 1
    for (let i = 0; i < draws; i++) p *= Math.max(n - train - i, 0)/(n - i)
    return p
  }
  return classes.map(k => {
    const [train, held, tested] = ['train', 'valid', 'test'].map(p => sum(p, k + 1))
    const masks = [.01, .05, .1].map(o => rounded(o*n)*train/Math.max(n, 1))
    return {train, valid: held, test: tested, masks, missed: missed(train, rounded(.01*n)),
      videos: counts.filter((row, i) => part[i] === 'train' && row[k + 1] > 0).length}
  })
}

/** Videos to put into training or validation. `data`: videos, counts, test, names, sets, folds (name to videos). */
export function mountSplit(data, root) {
  let valid = Object.values(data.folds)[0], set = Object.keys(data.sets)[0]
  const put = o => { valid = data.videos.filter(v => o.includes(v)); refresh() }
  const buttons = data.videos.map(v => el('button', {type: 'button', class: 'chip', disabled: data.test.includes(v),
    onclick: () => put(valid.includes(v) ? valid.filter(o => o !== v) : [...valid, v])}, v.replace('video', '')))
  const folds = el('select', {onchange: e => put(data.folds[e.target.value])},
    ...Object.keys(data.folds).map(o => el('option', {value: o}, o)),
      el('option', {value: '', disabled: true}, 'by hand'))
  const sets = el('select', {onchange: e => { set = e.target.value; refresh() }},
    ...Object.keys(data.sets).map(o => el('option', {value: o}, o)))
  const said = el('p', {class: 'sum', role: 'status'}), body = el('tbody')
  const heads = ['class', 'training frames', 'in videos', 'validation frames', 'test frames', 'masks at 1 %',
    'at 5 %', 'at 10 %',
    'no mask at 1 %']
  const table = el('table', {}, el('thead', {}, el('tr', {}, ...heads.map(o => el('th', {scope: 'col'}, o)))), body)
  root.classList.add('cwcl-board')
  root.append(el('div', {class: 'bar'},
    el('fieldset', {}, el('legend', {}, 'Videos that validate; those of the test cannot'),
    el('div', {class: 'chips'}, ...buttons)), el('label', {}, 'start from ', folds),
      el('label', {}, 'class set ', sets)),
  said, el('div', {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'Frames of each class'}, table))
  const row = (name, o) => {
    const few = [o.train, o.valid].map(n => n < 20)
    const cells = [o.train, o.videos, o.valid, o.test, ...o.masks.map(m => m.toFixed(1)),
      `${Math.round(100*o.missed)} %`]
    return el('tr', {}, el('th', {scope: 'row'}, name), ...cells.map((text, k) =>
      el('td', {class: (k === 0 && few[0]) || (k === 2 && few[1]) ? 'few' : null}, `${text}`)))
  }
  const refresh = () => {
    const classes = data.sets[set], found = splitCounts(data, valid, classes)
    const frames = p => data.counts.reduce((a, o, i) => a + (p(data.videos[i]) ? o[0] : 0), 0)
    const held = frames(v => valid.includes(v)), tested = frames(v => data.test.includes(v)), all = frames(() => true)
    const lacks = (key, title) => {
      const names = classes.filter((_, k) => !found[k][key]).map(k => data.names[k])
      return names.length ? ` ${title} lacks ${names.join(', ')}.` : ''
    }
    buttons.forEach((o, k) => o.setAttribute('aria-pressed', valid.includes(data.videos[k])))
    folds.value = Object.keys(data.folds).find(k => data.folds[k].join() === valid.join()) ?? ''
    said.textContent = `${all - held - tested} frames train, ${held} validate, ${tested} test.`
      + lacks('train', 'Training') + lacks('valid', 'Validation')
    body.replaceChildren(...found.map((o, k) => row(data.names[classes[k]], o)))
  }
  refresh()
}
