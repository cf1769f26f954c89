/**
 * The prompt script as data, and back: the reading side mirrors forcing_core/track_files.py, line by line.
 *
 * No DOM and no ComfyUI in here. A track is
 *   { json, segments: [{ start, frames, text, transition, blocks, line, before }], after }
 * start: seconds, or latent frames where `frames` is true. transition, blocks: null where the line names none. line: the
 * text it was read from, kept as long as nothing of it changes, so that times like 0:10 survive. before, after: comments
 * and empty lines. json: the other keys of a JSON line, or null for the plain form.
 */

export const FPS = 16 // of the model: times are counted in these frames, four to a latent frame
const TIME = /^\s*(?:(\d+)f|(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)s?)(?=[\s|]|$)\s*/
const SWITCHES = 'switch_frame_indices'

/** A script that is not one. `key` and `values` name the sentence in strings.js; line: from 1, or 0 for the whole. */
export class ScriptError extends Error {
  constructor(key, values = {}, line = 0) {
    super(key)
    Object.assign(this, { key, values, line })
  }
}

export function secondsOfFrame(frame) {
  return frame <= 0 ? 0 : (1 + 4 * (frame - 1)) / FPS
}

export function frameAtSeconds(seconds) {
  return seconds <= 0 ? 0 : Math.round((FPS * seconds + 3) / 4)
}

export function secondsOf(segment) {
  return segment.frames ? secondsOfFrame(segment.start) : segment.start
}

/** Read a script. kinds: names of the transitions. defaults: { transition, blocks } of lines that name none. */
export function parse(text, kinds, defaults) {
  return text.trimStart().startsWith('{') ? readJson(text, defaults) : readLines(text, kinds, defaults)
}

function readLines(text, kinds, defaults) {
  const segments = []
  let before = []
  text.split('\n').forEach((raw, index) => {
    const line = raw.trim()
    if (!line || line.startsWith('#')) return before.push(line)
    const segment = atLine(index + 1, () => readLine(line, kinds))
    segments.push({ ...segment, line, before })
    before = []
    atLine(index + 1, () => check(segments, segments.length - 1, defaults))
  })
  if (!segments.length) throw new ScriptError('error.empty')
  return { json: null, segments, after: before }
}

function readLine(line, kinds) {
  const found = TIME.exec(line)
  if (!found) throw new ScriptError('error.time', { text: short(line) })
  const rest = line.slice(found[0].length)
  const parts = (rest.startsWith('|') ? rest.slice(1) : rest).split('|').map((part) => part.trim())
  if (parts.length > 2) throw new ScriptError('error.bars')
  const named = parts.length === 2 ? readTransition(parts[0], kinds) : { transition: null, blocks: null }
  const text = parts[parts.length - 1]
  if (!text) throw new ScriptError('error.noPrompt')
  const frames = found[1] !== undefined
  return { start: frames ? Number(found[1]) : readSeconds(found), frames, text, ...named }
}

function readSeconds([whole, , hours, minutes, seconds]) {
  const m = Number(minutes ?? 0)
  if ((minutes && Number(seconds) >= 60) || (hours && m >= 60)) {
    throw new ScriptError('error.clock', { text: whole.trim() })
  }
  return 3600 * Number(hours ?? 0) + 60 * m + Number(seconds)
}

function readTransition(words, kinds) {
  const [name, ...more] = words.toLowerCase().split(' ')
  const count = more.join(' ').trim()
  const known = kinds.includes(name) && (!count || (name === 'soft' && /^\d+$/.test(count)))
  if (!known) throw new ScriptError('error.transition', { text: short(words), kinds: kinds.join(', ') })
  return { transition: name, blocks: count ? Number(count) : null }
}

/** LongLive's form, one line {"prompts": [...], "switch_frame_indices": "40, 80"}. */
function readJson(text, defaults) {
  const lines = text.split('\n').map((line, index) => [index + 1, line.trim()]).filter(([, line]) => line)
  const tracks = lines.map(([number, line]) => atLine(number, () => readJsonLine(line, defaults)))
  if (tracks.length > 1) throw new ScriptError('error.jsonLines', { count: tracks.length })
  return tracks[0]
}

function readJsonLine(line, defaults) {
  const { prompts, [SWITCHES]: given, ...json } = readObject(line)
  const sound = Array.isArray(prompts) && prompts.length && prompts.every((p) => typeof p === 'string' && p.trim())
  if (!sound) throw new ScriptError('error.jsonPrompts')
  const starts = [0, ...readFrames(given)]
  if (starts.length !== prompts.length) {
    throw new ScriptError('error.jsonCount', { prompts: prompts.length, needed: prompts.length - 1, found: starts.length - 1 })
  }
  const segments = prompts.map((prompt, index) => ({
    start: starts[index], frames: true, text: prompt, transition: null, blocks: null, line: null, before: []
  }))
  segments.forEach((_, index) => check(segments, index, defaults))
  return { json, segments, after: [] }
}

function readObject(line) {
  let data
  try {
    data = JSON.parse(line)
  } catch {
    throw new ScriptError('error.json')
  }
  return data && typeof data === 'object' && !Array.isArray(data) ? data : {}
}

function readFrames(given) {
  const list = given ?? []
  const words = typeof list === 'string' ? list.replaceAll(',', ' ').split(/\s+/).filter(Boolean) : [list].flat()
  return words.map((word) => {
    const frame = typeof word === 'string' && !/^\s*[+-]?\d+\s*$/.test(word) ? NaN : Math.trunc(Number(word ?? NaN))
    if (!Number.isFinite(frame)) throw new ScriptError('error.frames', { text: String(word) })
    return frame
  })
}

function check(segments, index, defaults) {
  const [previous, segment] = [segments[index - 1], segments[index]]
  const fail = (key, values) => {
    throw new ScriptError(key, values)
  }
  const time = timeText(segment)
  if (segment.start < 0) fail('error.negative', { time })
  const blocks = segment.blocks ?? defaults.blocks
  if ((segment.transition ?? defaults.transition) === 'soft' && blocks < 2) fail('error.soft', { blocks })
  if (!previous && secondsOf(segment) !== 0) fail('error.first', { time })
  if (!previous) return
  if (secondsOf(previous) === secondsOf(segment)) fail('error.same', { one: index, two: index + 1, time })
  if (secondsOf(previous) > secondsOf(segment)) fail('error.order', { one: index, two: index + 1, time })
}

/** The script of a track. Inverse of `parse`; lines that nothing changed come out as they went in. */
export function format(track) {
  if (track.json && track.segments.every(({ transition, frames }) => transition === null && frames)) return formatJson(track)
  const lines = track.segments.flatMap((segment) => [...segment.before, segment.line ?? formatLine(segment)])
  return [...lines, ...track.after].join('\n')
}

function formatLine(segment) {
  const named = segment.transition === null ? [] : [transitionText(segment)]
  return [timeText(segment), ...named, onOneLine(segment.text)].join(' | ')
}

function formatJson({ json, segments }) {
  const switches = segments.slice(1).map(({ start }) => start)
  return JSON.stringify({ ...json, prompts: segments.map(({ text }) => text), [SWITCHES]: switches.join(', ') })
}

export function timeText({ start, frames }) {
  return frames ? `${start}f` : String(Math.round(start * 1000) / 1000)
}

export function transitionText({ transition, blocks }) {
  return transition === 'soft' && blocks !== null ? `soft ${blocks}` : transition
}

/** A prompt has one line and no bar in it: both would be read as something else. */
export function onOneLine(text) {
  return text.replace(/\s*\n\s*/g, ' ').replaceAll('|', '/').trim()
}

function short(text) {
  return text.length <= 40 ? text : `${text.slice(0, 37)}...`
}

function atLine(number, read) {
  try {
    return read()
  } catch (error) {
    if (error instanceof ScriptError && !error.line) error.line = number
    throw error
  }
}
