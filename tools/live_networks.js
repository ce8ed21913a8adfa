// ---------------------------------------------------------------- two explorers of what networks said of frames

/** Class ids of a mask, from runs: pairs of a length and an id. */
export function unrolled(runs, pixels) {
  const ids = new Uint8Array(pixels)
  for (let k = 0, at = 0; k < runs.length; k += 2) ids.fill(runs[k+1], at, at += runs[k])
  return ids
}

/** IoU of each class, NaN for a class in neither mask; a true id of 255 is ignored. */
export function classIou(pred, truth, classes) {
  const hit = Array(classes).fill(0), either = Array(classes).fill(0)
  truth.forEach((t, k) => {
    if (t === 255) return
    either[t]++
    if (t === pred[k]) hit[t]++
    else either[pred[k]]++
  })
  return hit.map((o, c) => o/either[c])
}

/** A picture of the page on a canvas, once it is there, and what is painted over it: colors of pixels, or nothing. */
function paintedView(title, {width: w, height: h}) {
  const canvas = el('canvas', {role: 'img', class: 'heat', 'aria-label': title, width: w, height: h})
  const over = el('canvas', {width: w, height: h}), head = el('figcaption', {}, title)
  const paint = (picture, color, gray = false) => {
    if (!picture.naturalWidth) return
    const g = canvas.getContext('2d')
    g.drawImage(picture, 0, 0, w, h)
    if (gray) {
      g.globalCompositeOperation = 'saturation'
      g.fillStyle = '#888'
      g.fillRect(0, 0, w, h)
      g.globalCompositeOperation = 'source-over'
    }
    if (!color) return
    const image = new ImageData(w, h)
    for (let k = 0; k < w*h; k++) image.data.set(color(k) ?? [0, 0, 0, 0], 4*k)
    over.getContext('2d').putImageData(image, 0, 0)
    g.drawImage(over, 0, 0)
  }
  return {node: el('figure', {class: 'panel'}, head, canvas), head, paint}
}

/** Say something in a live region, but not twice. */
function say(node, text) { if (node.textContent !== text) node.textContent = text }

/** A list to choose `s[key]` from. */
function choice(s, key, label, names, refresh) {
  const options = names.map((o, k) => el('option', {value: k, selected: s[key] === k}, o))
  const list = el('select', {onchange: e => { s[key] = +e.target.value; refresh() }}, ...options)
  return el('label', {}, `${label} `, list)
}

/** Predictions of several methods. `data`: width, height, classes, colors, frames (name, picture, truth, masks). */
export function mountPredictions(data, root) {
  const {width: w, height: h, classes, colors, methods} = data, opacities = Array.from({length: 11}, (_, k) => k/10)
  const ids = o => unrolled(bytes(o), w*h)
  const frames = data.frames.map(o => ({...o, image: new Image(), truth: ids(o.truth), masks: o.masks.map(ids)}))
  const s = {frame: 0, method: methods.length - 1, opacity: .6}
  const said = el('p', {class: 'sum', role: 'status'}), body = el('tbody')
  const [frame, truth, wrong, pred] = ['frame', 'truth', 'wrong pixels', 'prediction'].map(o => paintedView(o, data))
  const heads = ['class', 'IoU on this frame'].map(o => el('th', {scope: 'col'}, o))
  const table = el('table', {}, el('thead', {}, el('tr', {}, ...heads)), body)
  root.classList.add('cwcl-board')
  root.append(el('div', {class: 'bar'}, choice(s, 'frame', 'frame', frames.map(o => o.name), show),
    choice(s, 'method', 'method', methods, show), slider(s, 'opacity', 'opacity', opacities, show)), said,
  el('div', {class: 'panels'}, ...[frame, truth, wrong, pred].map(o => o.node), table))
  const painted = mask => {
    const edges = jumps(mask, h, w)
    return k => edges[k] ? [255, 255, 255, 255] : mask[k] === 255 ? null : [...colors[mask[k]], 255*s.opacity]
  }
  function show() {
    const f = frames[s.frame], mask = f.masks[s.method], iou = classIou(mask, f.truth, classes.length)
    const off = k => f.truth[k] !== 255 && f.truth[k] !== mask[k]
    const seen = f.truth.filter(o => o !== 255).length, missed = mask.filter((_, k) => off(k)).length
    const there = iou.filter(o => !Number.isNaN(o)), mean = there.reduce((a, o) => a + o, 0)/there.length
    say(said, `${f.name}, ${methods[s.method]}: ${(100*missed/Math.max(seen, 1)).toFixed(1)}% of the pixels `
      + `are wrong, mean IoU of ${there.length} classes ${mean.toFixed(2)}.`)
    frame.paint(f.image)
    truth.paint(f.image, painted(f.truth))
    pred.paint(f.image, painted(mask))
    wrong.paint(f.image, k => off(k) ? [230, 159, 0, 255] : f.truth[k] === 255 ? [255, 255, 255, 255] : null, true)
    wrong.head.textContent = `wrong: ${missed} pixels`
    pred.head.textContent = methods[s.method]
    body.replaceChildren(...classes.map((name, c) => el('tr', {}, el('th', {scope: 'row'},
      el('span', {class: 'swatch', style: `background: rgb(${colors[c]})`}), name),
    el('td', {}, Number.isNaN(iou[c]) ? 'absent' : iou[c].toFixed(2)))))
  }
  show()
  for (const f of frames) {
    f.image.onload = () => { if (f === frames[s.frame]) show() }
    f.image.src = f.picture
  }
}

/**
 * Nearest neighbors in two networks. `data`: sheet (a URL) of pictures in columns, of width × height pixels; of each
 * frame its name, what it shows, and the number of its set; maps (height and width by scale) and values of them
 * (networks × scales × frames × channels × height × width); near and cosine, in hundredths (for neighbors of other
 * videos, then for all: networks × scales × frames × 3), and what each of the two says.
 */
export function mountScales(data, root) {
  const {width: w, height: h, columns, channels, names} = data, n = names.length, values = bytes(data.values)
  const near = bytes(data.near), cosine = new Int8Array(bytes(data.cosine).buffer), colors = bytes(data.colors)
  const s = {frame: data.first, channel: 0, all: 0}, count = k => Array.from({length: k}, (_, o) => o)
  const scales = ['fine', 'middle', 'coarse'], sheet = new Image()
  const tile = k => {
    const label = `frame ${k}, ${names[k]}`
    const o = el('canvas', {class: 'picture', role: 'img', width: w, height: h, 'aria-label': label})
    const from = [w*(k % columns), h*Math.floor(k/columns), w, h]
    if (sheet.naturalWidth) o.getContext('2d').drawImage(sheet, ...from, 0, 0, w, h)
    return o
  }
  const box = el('input', {type: 'checkbox', checked: true, onchange: e => { s.all = +!e.target.checked; show() }})
  const said = el('p', {class: 'sum', role: 'status'}), own = el('figure', {class: 'panel'})
  const parts = ['before training', 'after training'].map(o => el('section', {class: 'panel', 'aria-label': o}))
  root.classList.add('cwcl-board')
  root.append(el('div', {class: 'bar'},
    slider(s, 'frame', 'frame', count(n), show, k => `${k}: ${names[k]}`),
    slider(s, 'channel', 'feature map', count(channels), show, k => `${k + 1}`),
    el('label', {}, box, 'neighbors from other videos only')), said, el('div', {class: 'panels'}, own, ...parts))
  const sizes = data.maps.map(([y, x]) => y*x), before = k => sizes.slice(0, k).reduce((a, o) => a + o, 0)
  /** Where the map of the frame begins among all values. */
  const start = (net, scale) => n*channels*(net*before(scales.length) + before(scale))
    + (s.frame*channels + s.channel)*sizes[scale]
  const neighbors = (net, scale) => count(3).map(k => {
    const at = (((s.all*2 + net)*scales.length + scale)*n + s.frame)*3 + k
    return {frame: near[at], cosine: cosine[at]/100, same: data.sets[near[at]] === data.sets[s.frame]}
  })
  const row = (net, scale) => {
    const [y, x] = data.maps[scale], at = start(net, scale)
    const map = heatView(`feature map ${s.channel + 1}, ${scales[scale]} scale`, colors)
    map.paint(values.subarray(at, at + y*x), y, x, 255, `${scales[scale]}: map ${s.channel + 1}`)
    return [map.node, ...neighbors(net, scale).map(o => el('figure', {class: `panel ${o.same ? 'same' : 'other'}`},
      tile(o.frame), el('figcaption', {}, `${o.same ? '✓' : '✗'} ${o.cosine.toFixed(2)}, ${names[o.frame]}`)))]
  }
  function show() {
    say(said, data.summaries[s.all])
    own.replaceChildren(el('figcaption', {}, `frame ${s.frame}, ${names[s.frame]}`), tile(s.frame),
      el('p', {}, `shows ${data.shows[s.frame].join(', ')}`),
      el('p', {}, '✓ same classes, ✗ other classes; cosine, video'))
    parts.forEach((o, net) => o.replaceChildren(el('p', {class: 'head'}, o.getAttribute('aria-label')),
      el('div', {class: 'quads'}, ...scales.flatMap((_, k) => row(net, k)))))
  }
  show()
  sheet.onload = show
  sheet.src = data.sheet
}
