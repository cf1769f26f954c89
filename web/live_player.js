/** Plays the frames of a running stream: pulls them from the server, paces them, leaves out what comes too late. */
import { isOver } from './live_client.js'

const BEHIND = 2 // seconds that the picture may lag behind the newest frame, or two blocks if they are longer
const TURNS = ['prompt', 'seed', 'lora'] // commands that whoever sent them waits to see
const ROUNDING = 1e-6 // seconds
const HEARTBEAT = 6000 // ms: the server keeps previews only for those who ask every now and then

/**
 * Frames on their way to the screen, by number. Frame n is due at n / fps after an origin, which is set anew when frames
 * ran out or were left out. Times are in seconds; nothing in here waits or draws.
 */
export class FrameQueue {
  constructor() {
    Object.assign(this, { waiting: [], origin: NaN, received: -1, shown: -1, dropped: 0, turn: -1, asked: -1 })
  }

  /** From this frame on the video is as somebody has just asked for: it is shown as soon as it is there, and what was made
   * before it and still waits is left out. */
  turnAt(number, now) {
    if (number <= this.turn) return
    this.asked = this.turn = number
    this.jump(now)
  }

  jump(now) {
    if (this.asked <= this.shown || this.received < this.asked) return
    this.dropBelow(this.turn)
    if (this.waiting.length) this.origin = now - this.waiting[0].number / this.fps
    this.asked = -1
  }

  /** Take frames that begin with number `first`. */
  push(first, frames, fps, now) {
    const fresh = frames.map((data, index) => ({ number: first + index, data })).filter(({ number }) => number > this.received)
    if (!fresh.length) return
    this.fps = fps
    const ranOut = !this.waiting.length // a block that comes in time goes on by the clock of the one before
    const gap = fresh[0].number !== this.received + 1
    this.received = fresh.at(-1).number
    this.waiting.push(...fresh)
    const most = Math.max(BEHIND * fps, 2 * fresh.length)
    const late = this.received - (this.waiting[0].number - 1) > most
    if (late || gap) this.dropBelow(fresh[0].number)
    const next = this.waiting[0].number
    if (gap || late || (ranOut && !(this.origin + next / fps >= now))) this.origin = now - next / fps
    this.jump(now)
  }

  dropBelow(number) {
    const kept = this.waiting.filter((frame) => frame.number >= number)
    this.dropped += this.waiting.length - kept.length
    this.waiting = kept
  }

  /** The frame to show now, or null where the one on the screen stays. Older ones that were not shown are dropped. */
  due(now) {
    const count = this.waiting.filter(({ number }) => this.origin + number / this.fps <= now + ROUNDING).length
    if (!count) return null
    this.dropped += count - 1
    const [frame] = this.waiting.splice(0, count).slice(-1)
    this.shown = frame.number
    return frame
  }
}

export function jpeg(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))
  return new Blob([bytes], { type: 'image/jpeg' })
}

/** canvas: where to. shown(number): called after a frame is on it. */
export class LivePlayer {
  constructor(canvas, client, shown) {
    Object.assign(this, { canvas, client, shown, queue: new FrameQueue(), state: null })
    Object.assign(this, { pulling: false, drawing: false, timer: 0 })
  }

  /** Show this stream from now on; called with every state of it. */
  follow(state) {
    if (state.id !== this.state?.id) this.queue = new FrameQueue()
    this.state = state
    const turns = (state.log ?? []).filter(({ kind }) => TURNS.includes(kind))
    if (turns.length) this.queue.turnAt(turns.at(-1).at_frame, performance.now() / 1000)
    clearInterval(this.timer)
    if (!isOver(state)) this.timer = setInterval(() => this.pull(), HEARTBEAT)
    this.pull()
  }

  stop() {
    clearInterval(this.timer)
    Object.assign(this, { state: null, queue: new FrameQueue() })
  }

  get visible() {
    return !document.hidden && this.canvas.offsetParent !== null
  }

  /** Fetch what is new, one request at a time: a slow line gets fewer frames, not later ones. */
  async pull() {
    if (this.pulling || !this.state || !this.visible) return
    const { queue, state } = this
    this.pulling = true
    let more = false
    try {
      const { first, fps, frames, newest } = await this.client.frames(state.id, queue.received)
      if (queue === this.queue) {
        queue.push(first, frames, fps, performance.now() / 1000)
        // States that came meanwhile found the line busy.
        more = frames.length > 0 && (this.state.frames ?? 0) - 1 > newest
        this.run()
      }
    } catch {
      // The next state, or the heartbeat, tries again; the page says itself when the server is gone.
    } finally {
      this.pulling = false
    }
    if (more || queue !== this.queue) this.pull()
  }

  run() {
    if (this.drawing) return
    this.drawing = true
    const tick = async (now) => {
      const frame = this.queue.due(now / 1000)
      if (frame) await this.draw(frame)
      this.drawing = this.queue.waiting.length > 0
      if (this.drawing) requestAnimationFrame(tick)
    }
    requestAnimationFrame(tick)
  }

  async draw({ number, data }) {
    const picture = await createImageBitmap(jpeg(data)).catch(() => null)
    const { canvas, queue } = this
    if (!picture || queue.shown !== number) return // half a picture, or another stream by now: no reason to stop
    if (canvas.width !== picture.width || canvas.height !== picture.height) {
      Object.assign(canvas, { width: picture.width, height: picture.height })
    }
    canvas.getContext('2d').drawImage(picture, 0, 0)
    picture.close()
    this.shown(number)
  }
}
