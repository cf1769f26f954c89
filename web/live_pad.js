/** Steering a world from the panel: the keyboard while the panel has the focus, buttons on the screen, a gamepad. */
import { element, setText } from './dom.js'
import { isOver } from './live_client.js'
import { Holder } from './live_holder.js'

// By the place of a key, not by its letter: the same keys on every keyboard.
const KEYS = {
  ArrowUp: 'forward', KeyW: 'forward', ArrowDown: 'back', KeyS: 'back', ArrowLeft: 'left', KeyA: 'left', ArrowRight: 'right',
  KeyD: 'right', Space: 'jump', ShiftLeft: 'sneak', KeyE: 'use', KeyF: 'attack'
}
// Buttons of the standard gamepad, and its left stick as [axis, sign].
const BUTTONS = { 12: 'forward', 13: 'back', 14: 'left', 15: 'right', 0: 'jump', 2: 'attack' }
const STICK = { forward: [1, -1], back: [1, 1], left: [0, -1], right: [0, 1] }
const DEAD = 0.5
const CROSS = { forward: '\u25b2', left: '\u25c0', back: '\u25bc', right: '\u25b6' }
const FIELDS = 'input, textarea, select, .forcing-scrolls'

/** What a gamepad of the standard layout holds. */
export function gamepadHolds({ buttons, axes }) {
  const held = Object.entries(BUTTONS).filter(([index]) => buttons[index]?.pressed).map(([, action]) => action)
  for (const [action, [axis, sign]] of Object.entries(STICK)) if (sign * (axes[axis] ?? 0) > DEAD) held.push(action)
  return new Set(held)
}

/** The controls of a panel; send(body) as `LivePanel.send`. */
export function buildPad(t, send) {
  return new Pad(t, send)
}

class Pad {
  constructor(t, send) {
    this.holder = new Holder(send)
    Object.assign(this, { t, state: null, actions: [], buttons: new Map(), polling: false })
    this.cross = element('div', { className: 'forcing-cross', aria: { role: 'group', label: t('pad.label') } })
    this.others = element('div', { className: 'forcing-bar' })
    this.hint = element('div', { className: 'forcing-hint', textContent: t('pad.hint') })
    this.element = element('div', { className: 'forcing-pad' }, this.cross, element('div', {}, this.hint, this.others))
    this.offer(Object.keys(CROSS))
  }

  /** Listen on the panel until the signal aborts. */
  attach(panel, signal) {
    panel.tabIndex = 0
    const on = (target, type, act) => target.addEventListener(type, act, { signal })
    on(panel, 'keydown', (event) => this.key(event, true))
    on(panel, 'keyup', (event) => this.key(event, false))
    on(panel, 'pointerdown', (event) => event.target.closest(`${FIELDS}, button`) || panel.focus({ preventScroll: true }))
    on(panel, 'focusin', () => setText(this.hint, this.t('pad.focused')))
    on(panel, 'focusout', ({ relatedTarget }) => {
      if (panel.contains(relatedTarget)) return
      setText(this.hint, this.t('pad.hint'))
      this.holder.releaseAll('key')
    })
    on(window, 'blur', () => this.holder.releaseAll())
    on(window, 'gamepadconnected', () => this.poll(signal))
    signal.addEventListener('abort', () => this.holder.releaseAll())
    this.signal = signal
  }

  draw(state) {
    this.state = state
    const { actions = this.actions, held = '', together = false } = state?.drive ?? {}
    if (actions.join() !== this.actions.join()) this.offer(actions)
    this.holder.together = together
    const down = held.split(' ')
    for (const [action, button] of this.buttons) {
      button.disabled = isOver(state)
      button.setAttribute('aria-pressed', String(down.includes(action)))
    }
    if (isOver(state)) return
    this.holder.made(state.frames ? state.block : -1)
    if (this.signal) this.poll(this.signal)
  }

  reset() {
    this.holder.reset()
  }

  /** Buttons for these actions: ways to go in a cross, others beside it. */
  offer(actions) {
    this.actions = actions
    this.buttons = new Map(actions.filter((name) => !name.startsWith('camera')).map((name) => [name, this.button(name)]))
    const [ways, others] = [true, false].map((way) => [...this.buttons].filter(([name]) => name in CROSS === way))
    this.cross.replaceChildren(...ways.map(([, button]) => button))
    this.others.replaceChildren(...others.map(([, button]) => button))
  }

  button(action) {
    const label = action in CROSS ? this.t(`pad.${action}`) : action
    const made = element('button', { type: 'button', textContent: CROSS[action] ?? action, title: label, disabled: true,
      aria: { label, pressed: false }, data: { action } })
    const source = `button ${action}`
    made.addEventListener('pointerdown', (event) => {
      if (event.button) return
      made.setPointerCapture(event.pointerId)
      this.holder.press(source, action)
    })
    for (const type of ['pointerup', 'pointercancel', 'lostpointercapture']) {
      made.addEventListener(type, () => this.holder.release(source))
    }
    made.addEventListener('click', ({ detail }) => {
      if (detail) return // of a pointer, which said so itself
      this.holder.press(source, action)
      this.holder.release(source)
    })
    return made
  }

  key(event, down) {
    const action = KEYS[event.code]
    if (!this.actions.includes(action) || event.target.closest(FIELDS)) return
    if (down && (event.ctrlKey || event.metaKey || event.altKey || isOver(this.state))) return
    event.preventDefault() // no scrolling, and no click by the space bar
    if (down) this.holder.press(`key ${event.code}`, action)
    else this.holder.release(`key ${event.code}`)
  }

  get gamepads() {
    return [...(navigator.getGamepads?.() ?? [])].filter((pad) => pad?.connected)
  }

  /** Look at the gamepads with every picture of the page, while there are any and there is something to steer. */
  poll(signal) {
    if (this.polling || !this.gamepads.length) return
    this.polling = true
    const tick = () => {
      const pads = this.gamepads
      const held = new Set(pads.flatMap((pad) => [...gamepadHolds(pad)]).filter((action) => this.actions.includes(action)))
      for (const source of [...this.holder.pressed.keys()]) {
        if (source.startsWith('gamepad') && !held.has(source.slice(8))) this.holder.release(source)
      }
      for (const action of held) if (!this.holder.pressed.has(`gamepad ${action}`)) this.holder.press(`gamepad ${action}`, action)
      this.polling = !signal.aborted && pads.length > 0 && !isOver(this.state)
      if (this.polling) requestAnimationFrame(tick)
    }
    requestAnimationFrame(tick)
  }
}
