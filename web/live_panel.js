/** The live panel: the picture, the numbers, and what a running stream can be told. */
import { button, element, setText } from './dom.js'
import { isOver } from './live_client.js'
import { LivePlayer } from './live_player.js'
import { buildControls } from './live_controls.js'

const STATS = {
  speed: ({ speed }) => ({ speed: speed.toFixed(1) }),
  buffer: ({ buffered_seconds: seconds }) => ({ seconds: `${seconds < 0 ? '\u2212' : '+'}${Math.abs(seconds).toFixed(1)}` }),
  video: ({ seconds, block }) => ({ seconds: seconds.toFixed(1), block }),
  memory: ({ memory_bytes: memory, store_bytes: store }) => ({ memory: bytes(memory), store: bytes(store) })
}

// What a line of the log says of a command, by its kind.
const SAID = {
  prompt: ({ transition, text }, t) => ({ transition: t(`kind.${transition ?? 'recache'}`), text }),
  lora: ({ name, strength }) => ({ name: name ?? '', strength }),
  drive: ({ held }, t) => ({ held: held || t('pad.nothing') })
}

/** 1234567890 -> "1.23 GB". */
export function bytes(count) {
  const power = Math.min(4, Math.max(0, Math.floor(Math.log10(count || 1) / 3)))
  const number = count / 1000 ** power
  return `${number >= 100 || !power ? Math.round(number) : number.toPrecision(3)} ${['B', 'kB', 'MB', 'GB', 'TB'][power]}`
}

/** client: LiveClient. ids: () => ids under which the node may run. controls: what builds those of the stream. */
export class LivePanel {
  constructor({ client, ids, t, controls = buildControls }) {
    Object.assign(this, { client, ids, t, state: null })
    this.canvas = element('canvas', { className: 'forcing-picture', width: 16, height: 9,
      aria: { role: 'img', label: t('live.noPicture') } })
    this.player = new LivePlayer(this.canvas, client, (number) => this.drawn(number))
    this.controls = controls(t, (body) => this.send(body))
    this.build()
    this.show(null)
  }

  build() {
    const { t } = this
    this.badge = element('span', { className: 'forcing-badge', aria: { role: 'status' } })
    this.pause = button(t('live.pause'), t('live.pause'),
      () => this.send({ kind: this.state?.status === 'paused' ? 'resume' : 'pause' }))
    this.stop = button(t('live.stop'), t('live.stop.tip'), () => this.send({ kind: 'stop' }))
    this.idle = element('div', { className: 'forcing-idle', textContent: t('live.idle') })
    this.stats = Object.fromEntries(Object.keys(STATS).map((name) => [name, element('b')]))
    const tiles = Object.entries(this.stats).map(([name, value]) =>
      element('div', { className: 'forcing-stat', data: { name } }, element('span', { textContent: t(`live.${name}`) }), value))
    this.window = element('b')
    this.bar = element('div', { className: 'forcing-kept', aria: { hidden: true } })
    this.message = element('div', { className: 'forcing-message', aria: { role: 'alert' } })
    this.log = element('ol', { className: 'forcing-log forcing-scrolls', tabIndex: 0, aria: { label: t('live.log') } })
    this.copy = button(t('live.copy'), t('live.copy.tip'), () => this.copyLog(), { className: 'forcing-copy' })
    const bar = element('div', { className: 'forcing-bar' }, this.badge, element('span', { className: 'forcing-gap' }),
      this.pause, this.stop)
    this.element = element('div', { className: 'forcing-panel forcing-live', aria: { role: 'group', label: t('live.label') } },
      bar,
      element('div', { className: 'forcing-screen' }, this.canvas, this.idle),
      element('div', { className: 'forcing-stats' }, ...tiles),
      element('div', { className: 'forcing-window', title: t('live.window.tip') },
        element('span', { textContent: t('live.window') }), this.bar, this.window),
      this.controls.element, this.message,
      element('div', { className: 'forcing-history' }, this.log, this.copy))
    // Keys meant for a field or a button must not reach the graph, where Delete deletes the node.
    this.element.addEventListener('keydown', (event) => event.ctrlKey || event.metaKey || event.stopPropagation())
  }

  /** Follow the client until the signal aborts. */
  attach(signal) {
    this.client.addEventListener('change', () => this.update(), { signal })
    document.addEventListener('visibilitychange', () => this.player.pull(), { signal })
    signal.addEventListener('abort', () => this.player.stop())
    this.controls.attach?.(this.element, signal)
    this.update()
  }

  update() {
    this.show(this.client.latest(this.ids()))
  }

  show(state) {
    if (state?.id !== this.state?.id) this.fresh()
    this.state = state
    this.idle.hidden = !!state
    this.drawHead(state)
    this.drawNumbers(state)
    this.controls.draw(state)
    this.drawLog(state?.log ?? [])
    if (state?.error) this.say(state.error, true)
    if (state) this.player.follow(state)
    else this.player.stop()
  }

  /** Nothing of the stream before is left. */
  fresh() {
    this.controls.reset()
    this.say('')
    delete this.canvas.dataset.frame
    this.canvas.getContext('2d').clearRect(0, 0, this.canvas.width, this.canvas.height)
    this.canvas.setAttribute('aria-label', this.t('live.noPicture'))
  }

  drawHead(state) {
    const { t } = this
    const status = state?.status ?? 'idle'
    this.element.dataset.status = status
    const file = status === 'done' && state.file?.filename
    setText(this.badge, file ? t('live.saved', { file }) : t(`status.${status}`))
    this.badge.title = this.badge.textContent
    const paused = status === 'paused'
    setText(this.pause, t(paused ? 'live.resume' : 'live.pause'))
    this.pause.title = this.pause.textContent
    this.pause.disabled = this.stop.disabled = isOver(state) || status === 'stopping'
  }

  drawNumbers(state) {
    const { t } = this
    for (const [name, values] of Object.entries(STATS)) {
      setText(this.stats[name], state ? t(`live.${name}.value`, values(state)) : '\u2013')
      this.stats[name].parentElement.title = t(`live.${name}.tip`, { fps: state?.fps ?? '', frames: state?.frames ?? 0 })
    }
    const { kept = [], policy = '' } = state?.window ?? {}
    const held = kept.reduce((sum, [first, end]) => sum + end - first, 0)
    const made = state?.drive ? state.frames : Math.ceil(((state?.frames ?? 0) + 3) / 4)
    const whole = Math.max(1, made, ...kept.map(([, end]) => end))
    setText(this.window, held ? t('live.window.value', { held, policy }) : t('live.window.none'))
    this.bar.replaceChildren(...kept.map(([first, end]) => {
      const part = element('i')
      part.style.left = `${(100 * first) / whole}%`
      part.style.width = `${(100 * (end - first)) / whole}%`
      return part
    }))
  }

  drawLog(log) {
    this.copy.hidden = !log.length
    const lines = log.map((entry) => this.said(entry)).reverse()
    if (lines.join('\n') === this.written) return
    this.written = lines.join('\n')
    this.log.replaceChildren(...lines.map((textContent) => element('li', { textContent })))
  }

  said(entry) {
    const { t } = this
    const what = t(`log.${entry.kind}`, SAID[entry.kind]?.(entry, t) ?? entry)
    const who = entry.client === this.client.name ? t('live.log.you') : entry.client
    return t(who ? 'live.log.line' : 'live.log.plain', { block: entry.block, what, who })
  }

  /** What the replay input of the node takes. */
  async copyLog() {
    let text
    try {
      text = JSON.stringify(await this.client.log(this.state.id))
    } catch (error) {
      return this.say(this.t('live.lost', { reason: error.message }), true)
    }
    try {
      await navigator.clipboard.writeText(text)
      this.say(this.t('live.copied'))
    } catch {
      this.say(this.t('live.notCopied'), true) // not on a secure page, or not allowed
    }
  }

  drawn(number) {
    this.canvas.dataset.frame = number
    this.canvas.setAttribute('aria-label', this.t('live.picture', { frame: number }))
  }

  say(text, wrong = false) {
    setText(this.message, text)
    this.message.classList.toggle('forcing-error', wrong)
  }

  /** Send a command: what the server answers, or null where it did not take it. */
  async send(body) {
    if (isOver(this.state)) return null
    try {
      const answer = await this.client.command(this.state.id, body)
      this.say(body.kind === 'drive' ? '' : this.t('live.sent', { block: answer.at_block }))
      return answer
    } catch (error) {
      const lost = error instanceof TypeError // fetch itself failed
      this.say(this.t(lost ? 'live.lost' : 'live.refused', { reason: error.message }), true)
      return null
    }
  }
}
