/**
 * Edits of a track: each takes one and gives another, nothing is changed in place. And their history.
 *
 * Times are seconds; a segment that counts in latent frames stays on whole frames. A segment lasts until the next
 * one starts, so moving an edge changes one start and moving a segment changes two.
 */
import { frameAtSeconds, onOneLine, secondsOf } from './timeline_model.js'

export const STEP = 0.25 // seconds: one latent frame, also the least a segment may last
const LAST = 5 // seconds that an added segment stands behind the last one if there is nothing to go by

export function snap(seconds) {
  return Math.round(seconds / STEP) * STEP
}

/** Where segment `index` ends; span: of the last one. */
export function endOf(track, index, span) {
  const next = track.segments[index + 1]
  return next ? secondsOf(next) : Math.max(span, secondsOf(track.segments[index]) + STEP)
}

/** Move the start of segment `index` to `seconds`. ripple: all later ones move along. */
export function moveEdge(track, index, seconds, ripple = false) {
  if (index === 0) return track
  const here = secondsOf(track.segments[index])
  const least = secondsOf(track.segments[index - 1]) + STEP
  const most = ripple ? Infinity : startOr(track, index + 1, Infinity) - STEP
  const delta = between(seconds, least, most, here) - here
  return shifted(track, index, ripple ? track.segments.length : index + 1, delta)
}

/** Move a whole segment by `delta` seconds: its neighbours grow and shrink. The first one stays at 0. */
export function move(track, index, delta) {
  if (index === 0) return track
  const here = secondsOf(track.segments[index])
  const least = secondsOf(track.segments[index - 1]) + STEP
  const room = startOr(track, index + 2, Infinity) - STEP - startOr(track, index + 1, here)
  const to = between(here + delta, least, here + room, here)
  return shifted(track, index, Math.min(index + 2, track.segments.length), to - here)
}

/** Cut segment `index` in two at `seconds`, both with its text: what follows is usually a variation of it. */
export function split(track, index, seconds, span) {
  const at = snap(seconds)
  const segment = track.segments[index]
  if (at < secondsOf(segment) + STEP || at > endOf(track, index, span) - STEP) return track
  return insert(track, index + 1, placed({ ...segment, transition: null, blocks: null, before: [] }, at))
}

/** A segment behind the last one, as far from it as that one is from its own predecessor. */
export function add(track) {
  const last = track.segments.length - 1
  const start = secondsOf(track.segments[last])
  const step = last > 0 ? Math.max(1, snap(start - secondsOf(track.segments[last - 1]))) : LAST
  return insert(track, last + 1, placed({ ...track.segments[last], transition: null, blocks: null, before: [] }, start + step))
}

/** Without segment `index`; of the first one the next takes the place. The only one stays. */
export function remove(track, index) {
  if (track.segments.length < 2) return track
  const segments = track.segments.filter((_, at) => at !== index)
  // Comments stay: above the line that follows, or at the end.
  const orphans = track.segments[index].before
  const next = segments[index]
  if (next) segments[index] = { ...(index === 0 ? placed(next, 0) : next), before: [...orphans, ...next.before] }
  return { ...track, segments, after: next ? track.after : [...orphans, ...track.after] }
}

/** transition: a name, or null for the node's own. blocks: of a soft one, null for the node's own. */
export function setTransition(track, index, transition, blocks = null) {
  return changed(track, index, { transition, blocks: transition === 'soft' ? blocks : null })
}

/** An empty text is no prompt: then nothing changes. */
export function setText(track, index, text) {
  const line = onOneLine(text)
  return line && line !== track.segments[index].text ? changed(track, index, { text: line }) : track
}

function changed(track, index, fields) {
  const segments = track.segments.map((segment, at) => (at === index ? { ...segment, ...fields, line: null } : segment))
  return { ...track, segments }
}

function insert(track, index, segment) {
  return { ...track, segments: track.segments.toSpliced(index, 0, segment) }
}

function placed(segment, seconds) {
  const start = segment.frames ? frameAtSeconds(seconds) : Math.round(seconds * 1000) / 1000
  return { ...segment, start, line: null }
}

function shifted(track, from, to, delta) {
  if (!delta) return track
  const inside = (at) => at >= from && at < to
  return { ...track, segments: track.segments.map((s, at) => (inside(at) ? placed(s, secondsOf(s) + delta) : s)) }
}

function startOr(track, index, otherwise) {
  const segment = track.segments[index]
  return segment ? secondsOf(segment) : otherwise
}

function between(value, least, most, otherwise) {
  return least > most ? otherwise : Math.min(most, Math.max(least, value))
}

/** Undo and redo of one text. Steps of the same `tag` in a row are one step, so that holding a key is. */
export class History {
  constructor(text, limit = 200) {
    Object.assign(this, { past: [], text, future: [], tag: null, limit })
  }

  push(text, tag = null) {
    if (text === this.text) return
    if (tag === null || tag !== this.tag) this.past.push(this.text)
    if (this.past.length > this.limit) this.past.shift()
    Object.assign(this, { text, future: [], tag })
  }

  undo() {
    return this.step(this.past, this.future)
  }

  redo() {
    return this.step(this.future, this.past)
  }

  /** The text to show, or null if there is none. */
  step(from, to) {
    if (!from.length) return null
    to.push(this.text)
    this.text = from.pop()
    this.tag = null
    return this.text
  }
}
