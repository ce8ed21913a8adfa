// ---------------------------------------------------------------- embeddings: a map, and what the temperature counts

/** Which embedding a board shows: places of its numbers in `points` and `embedded`, by network and scale. */
const nth = (d, s) => (s.net*d.maps.scales.length + s.scale)*d.names.length

/** Cosines of a frame with some frames, at a scale of a network: 1 − ½ of the squared distance of two directions. */
export function cosines(d, s, i, frames) {
  const {dim, units, embedded} = d.maps, from = nth(d, s), unit = units[s.net][s.scale]
  return frames.map(j => {
    let sum = 0
    for (let k = 0, a = (from + i)*dim,
      b = (from + j)*dim; k < dim; k++) sum += (embedded[a + k] - embedded[b + k])**2
    return 1 - sum*unit*unit/2
  })
}

/** Softmax weights of the frames that an anchor is compared with; those left out have none. */
export function weights(d, s, labels, anchor, batch) {
  const frames = batch.filter(j => !['anchor', 'out'].includes(relation(d, s, labels, anchor, j)))
  const cosine = cosines(d, s, anchor, frames), top = cosine.reduce((a, b) => Math.max(a, b), -1)
  const e = cosine.map(c => Math.exp((c - top)/s.temp)), sum = e.reduce((a, o) => a + o, 0)
  return frames.map((j, k) => ({frame: j, cosine: cosine[k], weight: e[k]/sum,
    kind: relation(d, s, labels, anchor, j)}))
    .sort((a, b) => b.cosine - a.cosine)
}

/** Is a point in a polygon? By how many of its sides lie to the right of it. */
export function inside([x, y], polygon) {
  let odd = false
  polygon.forEach(([ax, ay], k) => {
    const [bx, by] = polygon[(k || polygon.length) - 1]
    if (ay > y !== by > y && x < ax + (bx - ax)*(y - ay)/(by - ay)) odd = !odd
  })
  return odd
}

/** A canvas as sharp as the screen, in units of CSS pixels. */
function sharp(canvas) {
  const w = canvas.clientWidth || 300, h = canvas.clientHeight || 200, scale = window.devicePixelRatio || 1
  if (canvas.width !== Math.round(w*scale) || canvas.height !== Math.round(h*scale))
    [canvas.width, canvas.height] = [Math.round(w*scale), Math.round(h*scale)]
  const g = canvas.getContext('2d')
  g.setTransform(scale, 0, 0, scale, 0, 0)
  return {g, w, h}
}

/** A line through some points. */
function stroke(g, ...points) {
  g.beginPath()
  for (const p of points) g.lineTo(...p)
  g.stroke()
}

/** A mark for each kind, told apart without its color. */
function mark(g, kind, x, y, r) {
  g.beginPath()
  if (kind === 'near') { g.moveTo(x, y - r); g.lineTo(x + r, y + .8*r); g.lineTo(x - r, y + .8*r); g.closePath() }
  else if (kind === 'negative') g.rect(x - .8*r, y - .8*r, 1.6*r, 1.6*r)
  else g.arc(x, y, r, 0, 7)
  if (kind === 'out' || kind === 'anchor') g.stroke()
  if (kind !== 'out') g.fill()
}

const colorsOf = node => {
  const style = getComputedStyle(node), out = {}
  for (const k of [...Object.keys(KINDS), 'ink', 'line', 'paper', 'focus']) out[k] = style.getPropertyValue(`--${k}`)
  return out
}

/** All frames as points, near where their embeddings are near. */
function mapView(model, d, hands) {
  const canvas = el('canvas', {tabindex: 0, role: 'application', class: 'map'}),
    back = document.createElement('canvas')
  const tip = el('span', {class: 'picture tip', hidden: true}), node = el('div', {class: 'mapbox'}, canvas, tip)
  let s, labels, at = 0, hot = null, lasso = null, first = null
  let place = null
  const fit = () => { // One unit for both directions, all points in sight
    const p = d.maps.points, from = 2*nth(d, s), n = d.names.length, low = [Infinity, Infinity],
      high = [-Infinity, -Infinity]
    for (let k = 0; k < 2*n; k++) { low[k & 1] = Math.min(low[k & 1], p[from+k]); high[k & 1] = Math.max(high[k & 1],
      p[from+k]) }
    const size = [canvas.clientWidth, canvas.clientHeight]
    const scale = Math.min(...[0, 1].map(a => (size[a] - 30)/Math.max(high[a] - low[a], 1e-12)))
    place = i => [0, 1].map(a => size[a]/2 + scale*(p[from + 2*i + a] - (low[a] + high[a])/2))
  }
  const paint = () => {
    if (!canvas.clientWidth) return
    fit()
    const {g, w, h} = sharp(canvas), color = colorsOf(canvas), anchor = model.get('anchor'),
      batch = new Set(model.get('batch'))
    g.clearRect(0, 0, w, h)
    g.fillStyle = color.line
    for (let i = 0; i < d.names.length; i++) if (!batch.has(i)) { const [x, y] = place(i); g.fillRect(x - 1, y - 1,
      2, 2) }
    const all = [...batch].filter(i => i !== anchor).map(i => [relation(d, s, labels, anchor, i), i])
    g.strokeStyle = color.positive
    for (const [kind, i] of all) if (kind === 'positive') stroke(g, place(anchor), place(i))
    for (const k of ['negative', 'near', 'out', 'positive']) {
      g.fillStyle = g.strokeStyle = k === 'negative' ? color.line : color[k]
      for (const [kind, i] of all) if (kind === k) mark(g, k, ...place(i), 5)
    }
    g.fillStyle = color.paper; g.strokeStyle = color.anchor; g.lineWidth = 3
    mark(g, 'anchor', ...place(anchor), 7)
    g.strokeStyle = color.focus; g.lineWidth = 2
    for (const i of model.get('chosen')) { g.beginPath(); g.arc(...place(i), 8, 0, 7); g.stroke() }
    back.width = canvas.width; back.height = canvas.height
    back.getContext('2d').drawImage(canvas, 0, 0)
  }
  const over = () => {
    if (!canvas.clientWidth || !back.width) return
    const {g, w, h} = sharp(canvas), color = colorsOf(canvas)
    g.clearRect(0, 0, w, h)
    g.drawImage(back, 0, 0, w, h)
    g.strokeStyle = color.ink; g.lineWidth = 2
    if (hot !== null) { g.beginPath(); g.arc(...place(hot), 10, 0, 7); g.stroke() }
    if (lasso) { g.setLineDash([5,
      4]); g.beginPath(); lasso.forEach(p => g.lineTo(...p)); g.closePath(); g.stroke(); g.setLineDash([]) }
  }
  const heat = i => {
    hot = i
    if (!place) return
    const shown = i !== null && i !== model.get('anchor')
    tip.hidden = !shown
    if (shown) {
      const [x, y] = place(i), w = canvas.clientWidth
      tip.style.left = `${Math.min(Math.max(x - 56, 0), w - 112)}px`
      tip.style.top = `${y > 90 ? y - 80 : y + 14}px`
      tip.dataset.frame = i
      hands.sheets.paint(tip, i)
    }
    over()
  }
  const nearest = ([x, y], within = 14) => {
    let best = null, least = within*within
    for (let i = 0; i < d.names.length; i++) {
      const [a, b] = place(i), far = (a - x)**2 + (b - y)**2
      if (far < least) { least = far; best = i }
    }
    return best
  }
  const point = e => [e.offsetX, e.offsetY]
  canvas.addEventListener('pointerdown', e => {
    if (e.button) return
    first = point(e)
    canvas.setPointerCapture?.(e.pointerId)
  })
  canvas.addEventListener('pointermove', e => {
    const p = point(e)
    if (first && (lasso || Math.hypot(p[0] - first[0], p[1] - first[1]) > 6)) { lasso = [...(lasso || [first]),
      p]; tip.hidden = true; over(); return }
    const i = nearest(p)
    if (i !== null && i !== hot) { at = i; hands.tell(model.get('anchor'), i) }
  })
  canvas.addEventListener('pointerup', e => {
    if (!first) return
    const polygon = lasso, i = nearest(point(e))
    lasso = first = null
    if (polygon) hands.choose(d.names.map((_, k) => k).filter(k => inside(place(k), polygon)))
    else if (i !== null) hands.anchor(i)
    over()
  })
  canvas.addEventListener('pointercancel', () => { lasso = first = null; over() })
  canvas.addEventListener('pointerleave', () => { if (!first) hands.tell(model.get('anchor'), model.get('anchor')) })
  canvas.addEventListener('focus', () => { at = model.get('anchor') })
  const beside = ([dx, dy]) => { // The nearest point on that side
    const [x, y] = place(at)
    let best = at, least = Infinity
    for (let i = 0; i < d.names.length; i++) {
      const [a, b] = place(i), along = (a - x)*dx + (b - y)*dy, across = Math.abs((a - x)*dy) + Math.abs((b - y)*dx)
      if (i !== at && along > 0 && along >= across && along + 2*across < least) { least = along + 2*across; best = i }
    }
    return best
  }
  canvas.addEventListener('keydown', e => {
    if (modified(e)) return
    const way = {ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0]}[e.key],
      chosen = model.get('chosen')
    if (way) { at = beside(way); hands.tell(model.get('anchor'), at) }
    else if (e.key === 'Enter') hands.anchor(at)
    else if (e.key === ' ') hands.choose(chosen.includes(at) ? chosen.filter(i => i !== at) : [...chosen, at])
    else return
    e.preventDefault()
  })
  const refresh = (now, found) => { s = now; labels = found; paint(); over() }
  return {node, canvas, refresh, heat, paint: () => { if (s) { paint(); over() } }}
}

/** What the anchor's softmax counts of each frame, the nearest first. */
function weightView(model, d, hands) {
  const canvas = el('canvas', {role: 'img', class: 'weights'}), said = el('output', {class: 'counted'})
  const temp = el('input', {type: 'range', min: -2, max: 0, step: .05,
    oninput: e => { model.set('temp', +(10**+e.target.value).toPrecision(2)); model.save_changes() }})
  const shown = el('output'), node = el('div', {class: 'weightbox'},
    el('label', {}, 'temperature ', temp, shown), canvas, said)
  let bars = [], hot = null
  const paint = () => {
    if (!canvas.clientWidth) return
    const {g, w, h} = sharp(canvas), color = colorsOf(canvas)
    const n = bars.filter(o => o.kind === 'positive').length, goal = 1/n,
      top = Math.max(n ? goal : 0, ...bars.map(o => o.weight))
    const wide = w/Math.max(bars.length, 1)
    g.clearRect(0, 0, w, h)
    bars.forEach((o, k) => {
      g.fillStyle = o.kind === 'negative' ? color.line : color[o.kind]
      const tall = Math.max(o.weight/top*(h - 12), 1)
      g.fillRect(k*wide, h - tall, Math.max(wide - 1, 1), tall)
      if (o.frame === hot) { g.strokeStyle = color.ink; g.lineWidth = 2; g.strokeRect(k*wide, 1,
        Math.max(wide - 1, 1), h - 2) }
    })
    if (!n) return
    g.strokeStyle = color.positive; g.setLineDash([6, 4]); g.lineWidth = 2
    stroke(g, [0, h - goal/top*(h - 12)], [w, h - goal/top*(h - 12)])
    g.setLineDash([])
  }
  const under = e => bars[Math.floor(e.offsetX/canvas.clientWidth*bars.length)]
  canvas.addEventListener('pointermove',
    e => { const o = under(e); if (o && o.frame !== hot) hands.tell(model.get('anchor'), o.frame) })
  canvas.addEventListener('pointerleave', () => hands.tell(model.get('anchor'), model.get('anchor')))
  canvas.addEventListener('click', e => { const o = under(e); if (o) hands.anchor(o.frame) })
  const refresh = (s, labels) => {
    bars = weights(d, s, labels, model.get('anchor'), model.get('batch'))
    temp.value = Math.log10(s.temp)
    temp.setAttribute('aria-valuetext', `${s.temp}`)
    shown.value = ` ${s.temp}`
    const pos = bars.filter(o => o.kind === 'positive'), neg = bars.filter(o => o.kind !== 'positive')
    const own = pos.reduce((a, o) => a + o.weight, 0), hard = neg[0]
    said.value = !pos.length ? 'A lonely anchor: it pulls and pushes nothing itself; the others still push it away.'
      : `Its positives get ${Math.round(100*own)} % of the weight. Training raises that.`
        + (hard ? ` The frame most in the way is ${d.names[hard.frame]}, with ${Math.round(100*hard.weight)} %.` : '')
    canvas.setAttribute('aria-label', `Softmax weight of each frame, the nearest first. ${said.value}`)
    paint()
  }
  return {node, refresh, paint, heat: i => { hot = i; paint() }}
}

/** Lonely anchors to expect, over the size of a batch, with a slider that draws one. */
function sizeView(model, d) {
  const most = Math.min(d.names.length, Math.max(200, model.get('size'))),
    canvas = el('canvas', {role: 'img', class: 'sizes'}),
    said = el('output', {class: 'counted'})
  const range = el('input', {type: 'range', min: 2, max: most, step: 1,
    onchange: e => model.send({kind: 'draw', size: +e.target.value}),
    oninput: e => { model.set('size', +e.target.value); model.save_changes() }})
  const shown = el('output'), node = el('div', {}, el('div', HEAD, 'how large must a batch be?'),
    el('div', {class: 'bar'}, el('label', {}, 'frames in a batch ', range, shown)), canvas, said)
  let shares = new Float64Array(0)
  const paint = () => {
    if (!canvas.clientWidth) return
    const {g, w, h} = sharp(canvas), color = colorsOf(canvas), x = b => (b - 1)/Math.max(most - 1, 1)*w,
      y = p => h - 14 - p*(h - 18)
    const batch = model.get('batch')
    g.clearRect(0, 0, w, h)
    g.font = '12px system-ui, sans-serif'
    g.fillStyle = color.ink
    g.strokeStyle = color.line
    for (const p of [0, .5, 1]) {
      stroke(g, [0, y(p)], [w, y(p)])
      g.fillText(`${100*p} %`, w - 38, y(p) + (p ? 12 : -3))
    }
    for (const b of [2, 50, 100, 150, 200]) if (b <= most) g.fillText(b, Math.min(x(b), w - 22), h - 1)
    g.strokeStyle = color.ink; g.lineWidth = 2
    stroke(g, ...[...shares.slice(0, most)].map((p, k) => [x(k + 1), y(p)]))
    g.fillStyle = color.focus
    mark(g, 'positive', x(Math.min(batch.length, most)), y(lonely/Math.max(batch.length, 1)), 5)
  }
  let lonely = 0
  const refresh = (s, labels, found) => {
    const all = d.names.map((_, i) => i), n = model.get('batch').length, size = model.get('size')
    lonely = found.lonely.length
    shares = lonelyShares(partners(d, s, labels, all).map(o => o[0]), Math.max(n, most))
    range.value = size
    shown.value = ` ${size}`
    const enough = shares.findIndex(p => p < .01) + 1, percent = p => `${Math.round(100*p)} %`
    said.value = `In a batch of ${n}, ${percent(shares[n - 1])} are lonely on average; `
      + `this one (the dot) has ${percent(lonely/n)}. `
      + (enough ? `From ${enough} frames on it is less than one in a hundred.`
        : `Even ${most} frames leave ${percent(shares[most - 1])}.`)
    canvas.setAttribute('aria-label', `Share of lonely anchors over the size of a batch. ${said.value}`)
    paint()
  }
  return {node, canvas, refresh, paint}
}

/** Map and weights, with the choice of network, scale and frames. */
function embeddingView(model, d, hands) {
  const put = (k, v) => { model.set(k, v); model.save_changes() }
  const net = el('input', {type: 'range', min: 0, max: d.maps.nets.length - 1, step: 1,
    oninput: e => put('net', +e.target.value)})
  const named = el('output'), map = mapView(model, d, hands), bars = weightView(model, d, hands)
  const scale = el('select', {onchange: e => put('scale', +e.target.value)},
    ...d.maps.scales.map((o, k) => el('option', {value: k}, o)))
  const take = el('button', {type: 'button', onclick: () => hands.batch(model.get('chosen'))})
  const held = el('p', {class: 'held'}),
    hint = el('p', {class: 'held'},
      'Click a point to make it the anchor, also a small one outside the batch, which then joins it. '
    + 'Draw around points to choose them.'),
    clear = el('button', {type: 'button', onclick: () => hands.choose([])}, 'choose none')
  const nodes = [
    el('div', {}, el('div', HEAD, 'where the network puts the frames'),
      el('div', {class: 'bar'}, d.maps.nets.length > 1 ? el('label', {}, 'network ', net, named) : null,
        el('label', {}, 'scale ', scale)),
      map.node, hint, el('div', {class: 'bar'}, take, clear), held),
    el('div', {}, el('div', HEAD, 'what the anchor’s softmax counts'), bars.node)]
  const refresh = (s, labels) => {
    net.value = s.net
    named.value = ` ${d.maps.nets[s.net]}`
    net.setAttribute('aria-valuetext', d.maps.nets[s.net])
    scale.value = s.scale
    const n = model.get('chosen').length
    take.textContent = `make these ${n} the batch`
    take.hidden = n < 2
    hint.hidden = n > 0
    const share = Math.round(100*d.maps.shares[s.net][s.scale])
    const apart = +d.maps.apart[s.net][s.scale].toPrecision(2)
    held.textContent = `Two frames are ${apart} apart on average (opposite ones 2); the plane holds ${share} % of it.`
    if (!n && document.activeElement === clear) map.canvas.focus() // Not to lose the keyboard's place
    clear.hidden = !n
    map.canvas.setAttribute('aria-label',
      `Map of ${d.names.length} frames, ${d.maps.nets[s.net]}, ${d.maps.scales[s.scale]} scale; `
      + 'arrow keys move, Enter makes a frame the anchor, the space bar chooses it')
    map.refresh(s, labels)
    bars.refresh(s, labels)
  }
  return {nodes, refresh, paint: () => { map.paint(); bars.paint() }, heat: i => { map.heat(i); bars.heat(i) }}
}
