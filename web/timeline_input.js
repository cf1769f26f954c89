/** Pointer and keys of the timeline. Focus lies on a read-only text field, so ComfyUI's own shortcuts leave it alone. */
import { move, moveEdge, snap } from './timeline_edits.js'
import { secondsOf } from './timeline_model.js'

const THRESHOLD = 3 // pixels that a press may move and still be a click

const KEYS = {
  ArrowLeft: (line, { shiftKey }) => line.nudge(-1, shiftKey),
  ArrowRight: (line, { shiftKey }) => line.nudge(1, shiftKey),
  ArrowUp: (line) => line.select(line.selected - 1),
  ArrowDown: (line) => line.select(line.selected + 1),
  Home: (line) => line.select(0),
  End: (line) => line.select(Infinity),
  Enter: (line) => line.edit(line.selected),
  F2: (line) => line.edit(line.selected),
  Delete: (line) => line.remove(),
  Backspace: (line) => line.remove(),
  s: (line) => line.split(),
  'ctrl+z': (line) => line.step('undo'),
  'ctrl+y': (line) => line.step('redo'),
  'ctrl+shift+z': (line) => line.step('redo')
}
// While a text is edited every other key belongs to the text.
const EDIT_KEYS = {
  Enter: (line) => line.endEdit(true),
  Escape: (line) => line.endEdit(false)
}
const LOCKED_KEYS = new Set(['ArrowUp', 'ArrowDown', 'Home', 'End', 'ctrl+z', 'ctrl+y', 'ctrl+shift+z'])

export function listen(line) {
  listenToKeys(line)
  listenToPointer(line)
  listenToFocus(line)
  listenToTools(line)
}

function keyOf(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key
  if (!event.ctrlKey && !event.metaKey) return event.altKey ? '' : key
  return `ctrl+${event.shiftKey ? 'shift+' : ''}${key}`
}

function listenToKeys(line) {
  line.view.root.addEventListener('keydown', (event) => {
    const key = keyOf(event)
    const prompt = line.view.indexOf(event.target) !== null
    const table = line.editing !== null ? EDIT_KEYS : prompt && line.track ? KEYS : {}
    const act = event.isComposing || (line.locked && !LOCKED_KEYS.has(key)) ? null : table[key]
    // Neither the graph nor the page must act on keys meant for here; running the workflow goes through.
    if (key !== 'ctrl+Enter') event.stopPropagation()
    if (!act) return
    event.preventDefault()
    act(line, event)
  })
}

function listenToFocus(line) {
  const { root } = line.view
  root.addEventListener('focusin', ({ target }) => {
    const index = line.view.indexOf(target)
    if (index !== null && index !== line.selected) line.select(index, false)
    if (line.editing === null) line.refresh()
  })
  root.addEventListener('focusout', ({ target }) => {
    if (line.view.indexOf(target) === line.editing) line.endEdit(true, false)
  })
  root.addEventListener('pointerenter', () => line.editing === null && line.refresh())
}

function listenToPointer(line) {
  const { lane } = line.view
  let drag = null
  const secondsAt = (event) => {
    const box = lane.getBoundingClientRect()
    return ((event.clientX - box.left) / box.width) * line.span
  }
  const dragged = (event) => {
    const { index, edge, from, start } = drag
    const to = snap(start + secondsAt(event) - from)
    return edge ? moveEdge(line.track, index, to, event.shiftKey) : move(line.track, index, to - start)
  }
  lane.addEventListener('pointerdown', (event) => {
    const index = line.view.indexOf(event.target)
    if (event.button !== 0 || index === null || index === line.editing) return
    line.select(index)
    if (line.locked) return
    const start = secondsOf(line.track.segments[index])
    drag = { index, edge: line.view.isEdge(event.target), from: secondsAt(event), start, x: event.clientX, moved: false }
  })
  // The field must not lose the focus that pointerdown gave it.
  lane.addEventListener('mousedown', (event) => {
    if (line.view.indexOf(event.target) !== line.editing) event.preventDefault()
  })
  lane.addEventListener('pointermove', (event) => {
    line.pointer = secondsAt(event)
    if (!(event.buttons & 1)) drag = null // released outside
    if (!drag) return
    drag.moved ||= Math.abs(event.clientX - drag.x) > THRESHOLD
    if (!drag.moved) return
    lane.setPointerCapture(event.pointerId) // not before: a click would be the lane's, not the prompt's
    line.preview(dragged(event))
  })
  lane.addEventListener('pointerup', (event) => {
    if (drag?.moved) line.apply(dragged(event))
    drag = null
  })
  lane.addEventListener('pointercancel', () => {
    drag = null
    line.preview(line.track)
  })
  lane.addEventListener('pointerleave', () => {
    line.pointer = null
  })
  lane.addEventListener('dblclick', (event) => {
    const index = line.view.indexOf(event.target)
    if (index !== null && index !== line.editing) line.edit(index)
  })
}

function listenToTools(line) {
  const { tools } = line.view
  const acts = { add: () => line.add(), split: () => line.split(), remove: () => line.remove(),
    undo: () => line.step('undo'), redo: () => line.step('redo'), closer: () => line.zoomBy(1), farther: () => line.zoomBy(-1) }
  for (const [name, act] of Object.entries(acts)) tools[name].addEventListener('click', act)
  const change = () => line.setTransition(tools.kind.value || null, Number(tools.blocks.value) || null)
  tools.kind.addEventListener('change', () => {
    change()
    line.view.focus(line.selected)
  })
  tools.blocks.addEventListener('change', change)
  tools.start.addEventListener('change', () => line.setStart(parseFloat(tools.start.value)))
  tools.start.addEventListener('keydown', ({ key }) => key === 'Enter' && line.view.focus(line.selected))
}
