/** What is held - keys, buttons, a gamepad - as the commands that tell the server so, at most one a block. */

const MOST = 4 // taps that wait for their block

/**
 * Several sources may hold the same action. send(body): promise of { at_block }, or null where it was refused.
 * A tap that is over before the next block begins still counts for one: its release is only sent once a block has seen it.
 */
export class Holder {
  constructor(send) {
    this.send = send
    this.reset()
  }

  reset() {
    Object.assign(this, { pressed: new Map(), queue: [], told: '', due: -1, block: -1, busy: false, together: false })
  }

  press(source, action) {
    if (this.pressed.get(source) === action) return
    this.pressed.delete(source) // the newest one comes last
    this.pressed.set(source, action)
    this.want(this.held)
  }

  release(source) {
    if (this.pressed.delete(source)) this.want(this.held)
  }

  /** Let go of all sources whose name begins so. */
  releaseAll(prefix = '') {
    for (const source of [...this.pressed.keys()]) if (source.startsWith(prefix)) this.pressed.delete(source)
    this.want(this.held)
  }

  /** As a line of an action track: all that is pressed, or only the newest where the world knows one action at a time. */
  get held() {
    const actions = [...new Set(this.pressed.values())]
    return (this.together ? actions : actions.slice(-1)).join(' ')
  }

  want(text) {
    if (text === (this.queue.at(-1) ?? this.told)) return
    const before = this.queue.at(-2) ?? this.told
    if (text && text !== before && this.queue.at(-1) === '') this.queue.pop() // nothing has to be let go of in between
    this.queue.push(text)
    this.queue.splice(0, this.queue.length - MOST)
    return this.pump()
  }

  /** The newest block of the stream is this one. */
  made(block) {
    this.block = block
    return this.pump()
  }

  async pump() {
    if (this.busy || !this.queue.length || this.block < this.due) return
    const { queue, told } = this
    const held = queue.shift()
    Object.assign(this, { busy: true, told: held }) // at once: what comes meanwhile follows on it
    const answer = await this.send({ kind: 'drive', held })
    if (queue !== this.queue) return // of another stream by now
    this.busy = false
    if (answer) this.due = answer.at_block
    else this.told = told
    return this.pump()
  }
}
