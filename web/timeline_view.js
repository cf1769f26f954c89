/** What the timeline editor looks like: elements, and how a state is drawn into them. It decides nothing. */
import { button, element, select, setText } from './dom.js'
import { endOf } from './timeline_edits.js'
import { secondsOf, transitionText } from './timeline_model.js'

const TICKS = [0.25, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600]
const TICK_WIDTH = 44 // pixels that a number on the ruler takes at least
const EDIT_WIDTH = '17em' // of a text while it is edited, however short its segment

/** 12.5 -> "12.5 s", 90 -> "1:30". */
export function clock(seconds) {
  const rounded = Math.round(seconds * 100) / 100
  if (rounded < 60) return `${rounded} s`
  const rest = Math.round((rounded % 60) * 100) / 100
  return `${Math.floor(rounded / 60)}:${rest < 10 ? '0' : ''}${rest}`
}

export class TimelineView {
  constructor(t, kinds) {
    this.t = t
    this.tools = this.makeTools(kinds)
    this.ruler = element('div', { className: 'forcing-ruler', aria: { hidden: true } })
    this.lane = element('div', { className: 'forcing-lane' })
    this.scroll = element('div', { className: 'forcing-scroll' },
      element('div', { className: 'forcing-inner' }, this.ruler, this.lane))
    this.status = element('div', { className: 'forcing-status', aria: { role: 'status' } })
    const aria = { role: 'group', label: t('timeline.label') }
    this.root = element('div', { className: 'forcing-panel forcing-timeline', aria }, this.bar, this.scroll, this.status)
  }

  makeTools(kinds) {
    const { t } = this
    const labels = [['', ''], ...kinds.map((kind) => [kind, t(`kind.${kind}`)])]
    const made = (text, tip, fields) => button(text, tip, () => {}, fields) // what they do is listened to elsewhere
    const small = (name, sign) => made(sign, t(`timeline.${name}`), { className: 'forcing-icon', label: t(`timeline.${name}`) })
    const worded = (name) => made(t(`timeline.${name}`), t(`timeline.${name}.tip`))
    const number = (name, fields) => element('input', { type: 'number', title: t(`timeline.${name}`),
      aria: { label: t(`timeline.${name}`) }, ...fields })
    const tools = { add: worded('add'), split: worded('split'), remove: worded('delete'),
      kind: select(labels, t('timeline.transition')),
      blocks: number('blocks', { min: 2, step: 1 }), start: number('start', { min: 0, step: 0.25 }),
      undo: small('undo', '\u21B6'), redo: small('redo', '\u21B7'),
      farther: small('farther', '\u2212'), closer: small('closer', '+') }
    const captioned = (name) => element('label', {}, t(`timeline.${name}.short`), tools[name])
    this.captions = { blocks: captioned('blocks'), start: captioned('start') }
    this.bar = element('div', { className: 'forcing-bar', aria: { role: 'toolbar', label: t('timeline.label') } },
      tools.add, tools.split, tools.remove, this.captions.start, tools.kind, this.captions.blocks,
      element('span', { className: 'forcing-gap' }), tools.undo, tools.redo, tools.farther, tools.closer)
    return tools
  }

  draw(state) {
    this.root.classList.toggle('forcing-locked', state.locked)
    this.lane.parentElement.style.width = `${100 * state.zoom}%`
    this.drawRuler(state)
    this.drawSegments(state)
    this.drawTools(state)
    this.drawStatus(state)
  }

  drawRuler({ span, zoom }) {
    const width = (this.scroll.clientWidth || 400) * zoom
    const step = TICKS.find((tick) => (tick / span) * width >= TICK_WIDTH) ?? TICKS.at(-1)
    const key = `${span} ${step}`
    if (this.ruler.dataset.key === key) return
    this.ruler.dataset.key = key
    const count = Math.ceil(span / step - (TICK_WIDTH - 10) / width) // the last number needs its room, too
    this.ruler.replaceChildren(...Array.from({ length: count }, (_, index) => {
      const tick = element('span', { textContent: clock(index * step) })
      tick.style.left = `${(100 * index * step) / span}%`
      return tick
    }))
  }

  drawSegments(state) {
    const segments = state.track?.segments ?? []
    while (this.lane.childElementCount > segments.length) this.lane.lastElementChild.remove()
    while (this.lane.childElementCount < segments.length) this.lane.append(this.makeSegment(this.lane.childElementCount))
    segments.forEach((segment, index) => this.drawSegment(this.lane.children[index], segment, index, state))
  }

  drawSegment(box, segment, index, { track, selected, editing, span, defaults }) {
    const [start, end] = [secondsOf(segment), endOf(track, index, span)]
    const [count, isEdited] = [track.segments.length, index === editing]
    const left = `${(100 * start) / span}%`
    box.style.left = isEdited ? `max(0px, min(${left}, 100% - ${EDIT_WIDTH}))` : left
    box.style.width = `${(100 * (end - start)) / span}%`
    box.style.minWidth = isEdited ? `min(100%, ${EDIT_WIDTH})` : ''
    box.classList.toggle('forcing-selected', index === selected)
    box.classList.toggle('forcing-editing', isEdited)
    box.dataset.kind = index === 0 ? 'first' : segment.transition ?? defaults.transition
    box.title = isEdited ? '' : segment.text
    const kind = this.kindOf(segment, index, defaults)
    setText(box.querySelector('.forcing-kind'), kind)
    setText(box.querySelector('.forcing-time'), clock(start))
    this.drawText(box.querySelector('textarea'), segment.text, isEdited, this.t('timeline.segment', {
      number: index + 1, count, start: clock(start), end: index + 1 === count ? this.t('timeline.end') : clock(end),
      kind: kind || this.t('timeline.firstKind') }))
  }

  /** How it takes over, in words; the first one takes over from nothing. */
  kindOf(segment, index, defaults) {
    if (index === 0) return ''
    return segment.blocks === null ? this.t(`kind.${segment.transition ?? defaults.transition}`) : transitionText(segment)
  }

  drawText(field, text, isEdited, label) {
    if (!isEdited && field.value !== text) field.value = text
    if (field.readOnly === isEdited) field.readOnly = !isEdited
    field.setAttribute('aria-label', label)
  }

  makeSegment(index) {
    const edge = element('div', { className: 'forcing-edge', aria: { hidden: true } })
    const head = element('div', { className: 'forcing-head', aria: { hidden: true } },
      element('span', { className: 'forcing-time' }), element('span', { className: 'forcing-kind' }))
    const field = element('textarea', { readOnly: true, rows: 1, spellcheck: false, data: { captureWheel: 'true' } })
    return element('div', { className: 'forcing-segment', data: { index } }, ...(index ? [edge] : []), head, field)
  }

  drawTools({ track, selected, locked, defaults, undo, redo, linked }) {
    const { tools } = this
    const segment = track?.segments[selected]
    const first = selected === 0
    for (const name of ['add', 'split', 'remove', 'start', 'kind', 'blocks']) tools[name].disabled = locked || !segment
    tools.remove.disabled ||= track?.segments.length < 2
    tools.start.disabled ||= first
    tools.kind.disabled ||= first
    tools.undo.disabled = !undo || linked
    tools.redo.disabled = !redo || linked
    setText(tools.kind.options[0], this.t('timeline.default', { kind: this.t(`kind.${defaults.transition}`) }))
    tools.kind.value = first ? '' : segment?.transition ?? ''
    if (segment && document.activeElement !== tools.start) tools.start.value = Math.round(secondsOf(segment) * 1000) / 1000
    this.captions.blocks.hidden = first || segment?.transition !== 'soft'
    if (document.activeElement !== tools.blocks) tools.blocks.value = segment?.blocks ?? defaults.blocks
  }

  drawStatus({ error, editing, linked }) {
    const text = error && this.t(error.key, error.values)
    const wrong = error?.line ? this.t('timeline.line', { line: error.line, text }) : text
    const hint = linked ? 'timeline.linked' : editing === null ? 'timeline.hint' : 'timeline.editHint'
    setText(this.status, wrong ?? this.t(hint))
    this.status.title = this.status.textContent
    this.status.classList.toggle('forcing-error', !!error)
  }

  /** Number of the segment that an element belongs to, or null. */
  indexOf(target) {
    const box = target?.closest?.('.forcing-segment')
    return box && this.lane.contains(box) ? Number(box.dataset.index) : null
  }

  isEdge(target) {
    return target.classList.contains('forcing-edge')
  }

  field(index) {
    return this.lane.children[index]?.querySelector('textarea')
  }

  text(index) {
    return this.field(index).value
  }

  focus(index) {
    this.field(index)?.focus({ preventScroll: true })
    this.reveal(index)
  }

  /** Scroll a zoomed lane, but never the page. */
  reveal(index) {
    const box = this.lane.children[index]
    if (!box || this.scroll.scrollWidth <= this.scroll.clientWidth) return
    const { scrollLeft, clientWidth } = this.scroll
    const outside = box.offsetLeft < scrollLeft || box.offsetLeft > scrollLeft + clientWidth - 40
    if (outside) this.scroll.scrollLeft = Math.max(0, box.offsetLeft - 20)
  }

  caret(index) {
    const field = this.field(index)
    field.focus({ preventScroll: true })
    field.setSelectionRange(field.value.length, field.value.length)
  }
}
