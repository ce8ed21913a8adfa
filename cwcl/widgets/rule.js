// The rule of positive pairs; `positive_mask` is its oracle.

/** Sign, name of one, name of several. */
export const KINDS = {
  anchor: ['◎', 'anchor', 'anchors'], positive: ['●', 'positive', 'positives'],
    near: ['▲', 'near miss', 'near misses'],
  negative: ['■', 'negative', 'negatives'], out: ['○', 'left out', 'left out'],
}

/** Name of a phase, or its number where it has none. */
const phaseName = (d, k) => k < 0 ? 'unknown' : d.phases?.[k] ?? `${k}`

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

/** Are two frames of one group that is left out? What is unknown, −1, is of no group. */
function together(d, s, i, j) {
  const group = s.exclude === 'none' ? null : d[s.exclude]
  return !!group && group[i] >= 0 && group[i] === group[j]
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
  return together(d, s, i, j) ? 'out' : 'positive'
}

/** Groups of an anchor among the frames of a batch: kind to numbers of frames. */
export function groups(d, s, labels, anchor, batch) {
  const out = {positive: [], near: [], negative: [], out: []}
  for (const j of batch) if (j !== anchor) out[relation(d, s, labels, anchor, j)].push(j)
  return out
}

/** Frames of a batch by what they show: a number for each of `frames`, equal where the label sets are equal. */
export function setNumbers(d, s, labels, frames) {
  const known = new Map(), first = []
  const ids = frames.map((i, at) => {
    let key = s.phase ? (d.phase[i] < 0 ? `alone ${at}` : d.phase[i]) : ''
    for (let w = 0; w < labels.words; w++) key += `,${labels.sets[i*labels.words + w]}`
    if (!known.has(key)) { known.set(key, first.length); first.push(i) }
    return known.get(key)
  })
  return {ids, first}
}

/** What each frame of a batch is to each, row by row: numbers of the keys of `KINDS`. */
export function kinds(d, s, labels, batch) {
  const {ids, first} = setNumbers(d, s, labels, batch), names = Object.keys(KINDS), n = batch.length, m = first.length
  const apart = Uint8Array.from({length: m*m},
    (_, k) => names.indexOf(relation(d, s, labels, first[Math.floor(k/m)], first[k % m])))
  const out = new Uint8Array(n*n)
  for (let i = 0, k = 0; i < n; i++)
    for (let j = 0; j < n; j++, k++)
      out[k] = i === j ? 0 : ids[i] !== ids[j] ? apart[ids[i]*m + ids[j]] : together(d, s, batch[i], batch[j]) ? 4 : 1
  return out
}

/** How many positives each of some frames has among them, and how many of those are of its clip. */
export function partners(d, s, labels, batch) {
  const {ids} = setNumbers(d, s, labels, batch), seen = new Map()
  const keys = batch.map((i, at) => {
    const of = k => d[k][i] < 0 ? `alone ${at}` : d[k][i],
      group = s.exclude === 'none' ? `alone ${at}` : of(s.exclude)
    return [ids[at], `${ids[at]} ${group}`, `${ids[at]} clip ${of('clip')}`, `${ids[at]} clip ${of('clip')} ${group}`]
  })
  for (const o of keys.flat()) seen.set(o, (seen.get(o) || 0) + 1)
  return keys.map(([set, own, clip, both]) => [seen.get(set) - seen.get(own), seen.get(clip) - seen.get(both)])
}

/** The frames of a batch that have no positive in it, and how many positive pairs there are, and are of one clip. */
export function counts(d, s, labels, batch) {
  const found = partners(d, s, labels, batch), sum = k => found.reduce((a, o) => a + o[k], 0)
  return {lonely: batch.filter((_, k) => !found[k][0]), pairs: sum(0), oneClip: sum(1)}
}

/** Share of lonely anchors to expect in batches of 1 to `most` frames, by how many positives each frame has in all. */
export function lonelyShares(positives, most) {
  const n = positives.length, times = new Map(), out = new Float64Array(most)
  for (const m of positives) times.set(m, (times.get(m) || 0) + 1)
  for (const [m, count] of times)
    for (let b = 1, p = 1; b <= most && p > 0; b++) { // None of its m among the b − 1 others
      out[b - 1] += p*count/n
      p *= Math.max(n - m - b, 0)/(n - b)
    }
  return out
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
    else if (d.phase[i] !== d.phase[j]) said.push(`other phase: ${phaseName(d, d.phase[j])}`)
  }
  if (kind === 'out') said.push(`same ${s.exclude}`)
  return said
}

/** What a frame shows, in words. */
export function shows(d, s, labels, i) {
  const own = d.classes.filter((_, k) => labels.sets[i*labels.words + (k >> 5)] >>> (k & 31) & 1)
  return `${own.length ? own.join(', ') : 'no structure'}${s.phase ? `; phase: ${phaseName(d, d.phase[i])}` : ''}`
}
