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
  const n = differing(labels, i, j).length + (apart ? 1 : 0)
  if (n) return n === 1 ? 'near' : 'negative'
  const group = {clip: d.clip, video: d.video}[s.exclude]
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
