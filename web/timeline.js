/**
 * The timeline editor: what it shows, what is selected, and every change it can make.
 *
 * host: { read(), write(text), kinds, defaults(), linked(), t(key, values) }. The script stays the only thing that is
 * stored: each change is written to it as text and read back from there.
 */
import { add, endOf, History, move, moveEdge, remove, setText, setTransition, snap, split, STEP } from './timeline_edits.js'
import { format, parse, ScriptError, secondsOf } from './timeline_model.js'
import { listen } from './timeline_input.js'
import { TimelineView } from './timeline_view.js'

const ZOOM = { least: 1, most: 32, step: 2 }

export class Timeline {
  constructor(host) {
    Object.assign(this, { host, track: null, shown: null, error: null, selected: 0, editing: null, zoom: 1, pointer: null })
    this.history = new History(host.read())
    this.view = new TimelineView(host.t, host.kinds)
    this.element = this.view.root
    listen(this)
    this.load()
  }

  /** Look at the script again: somebody else may have written it. */
  refresh() {
    const text = this.host.read()
    if (text === this.history.text) return this.draw()
    this.history.push(text, 'outside')
    this.load()
  }

  /** Show the script as the history has it. A script with an error leaves the last good track, not to be edited. */
  load() {
    try {
      this.track = parse(this.history.text, this.host.kinds, this.host.defaults())
      this.error = null
    } catch (error) {
      if (!(error instanceof ScriptError)) throw error
      this.error = error
    }
    this.shown = this.track
    this.selected = Math.max(0, Math.min(this.selected, (this.track?.segments.length ?? 1) - 1))
    this.draw()
  }

  get locked() {
    return !!this.error || this.host.linked()
  }

  /** Seconds that the axis shows. Stays as it is while something is dragged. */
  get span() {
    const last = this.track ? secondsOf(this.track.segments.at(-1)) : 0
    return Math.ceil(Math.max(10, 1.25 * last, last + 5) / 5) * 5
  }

  draw() {
    const { shown, selected, editing, span, zoom, error, locked } = this
    this.view.draw({ track: shown, selected, editing, span, zoom, error, locked, linked: this.host.linked(),
      defaults: this.host.defaults(), undo: this.history.past.length > 0, redo: this.history.future.length > 0 })
  }

  /** Take a changed track over. tag: equal ones in a row are undone together. */
  apply(track, tag = null) {
    this.shown = this.track
    if (this.locked || track === this.track) return this.draw()
    this.put(format(track), tag)
  }

  put(text, tag) {
    this.history.push(text, tag)
    this.load()
    this.host.write(text)
  }

  /** Show a track that is not taken over yet, while it is dragged. */
  preview(track) {
    this.shown = track
    this.draw()
  }

  select(index, focus = true) {
    this.selected = Math.max(0, Math.min(index, this.track.segments.length - 1))
    this.draw()
    if (focus) this.view.focus(this.selected)
  }

  // -- what keys and buttons do; each leaves the focus on the selected prompt

  nudge(steps, edgeOnly) {
    const index = this.selected
    const start = secondsOf(this.track.segments[index])
    const moved = edgeOnly ? moveEdge(this.track, index, start + steps * STEP) : move(this.track, index, steps * STEP)
    this.apply(moved, `${edgeOnly ? 'edge' : 'move'} ${index}`)
    this.view.focus(index)
  }

  add() {
    this.apply(add(this.track))
    this.select(this.track.segments.length - 1)
  }

  /** Split the selected prompt where the pointer is, or else in its middle. */
  split() {
    const { track, selected, pointer, span } = this
    const [start, end] = [secondsOf(track.segments[selected]), endOf(track, selected, span)]
    const inside = pointer !== null && pointer >= start + STEP && pointer <= end - STEP
    const parts = split(track, selected, inside ? pointer : snap((start + end) / 2), span)
    this.apply(parts)
    this.select(parts === track ? selected : selected + 1)
  }

  remove() {
    this.apply(remove(this.track, this.selected))
    this.select(this.selected)
  }

  setTransition(name, blocks) {
    this.apply(setTransition(this.track, this.selected, name, blocks))
  }

  setStart(seconds) {
    if (Number.isFinite(seconds)) this.apply(moveEdge(this.track, this.selected, seconds))
    else this.draw()
  }

  step(direction) {
    if (this.host.linked()) return
    const text = this.history[direction]()
    if (text === null) return
    this.load()
    this.host.write(text)
    this.view.focus(this.selected)
  }

  zoomBy(direction) {
    this.zoom = Math.max(ZOOM.least, Math.min(ZOOM.most, this.zoom * ZOOM.step ** direction))
    this.draw()
    this.view.reveal(this.selected)
  }

  // -- the text, in its place

  edit(index) {
    if (this.locked) return
    this.select(index)
    this.editing = index
    this.draw()
    this.view.caret(index)
  }

  /** End editing; keep: take the text over, else it is as before. */
  endEdit(keep, focus = true) {
    const index = this.editing
    if (index === null) return
    const text = this.view.text(index)
    this.editing = null
    if (keep) this.apply(setText(this.track, index, text))
    else this.draw()
    if (focus) this.view.focus(index)
  }
}
