/** The steering routes of the server, and what is known of its streams: one for all panels of the page. */

const OVER = new Set(['done', 'failed'])

export function isOver(state) {
  return !state || OVER.has(state.status)
}

/**
 * Sends "change" whenever a stream does. api: ComfyUI's; its socket brings every state to every page, so that each sees
 * what the others do.
 */
export class LiveClient extends EventTarget {
  constructor(api) {
    super()
    Object.assign(this, { api, states: new Map() })
    api.addEventListener('forcing.stream', ({ detail }) => this.take(detail))
    // States may have passed unseen while the socket was down.
    api.addEventListener('reconnected', () => this.refresh())
  }

  /** Ask for the streams that run, after a reload say. Of finished ones this page needs none it has not seen running. */
  async refresh() {
    let streams
    try {
      ({ streams } = await this.ask('/forcing/streams'))
    } catch {
      return // a server without these routes, or none: panels stay idle
    }
    for (const state of streams) if (!isOver(state) || this.states.has(state.id)) this.states.set(state.id, state)
    this.announce()
  }

  take(state) {
    this.states.set(state.id, state)
    this.announce()
  }

  announce() {
    this.dispatchEvent(new Event('change'))
  }

  /** The stream of the node with one of these ids: the running one, else the newest. */
  latest(ids) {
    const found = [...this.states.values()].filter((state) => ids.includes(String(state.node)))
    return found.findLast((state) => !isOver(state)) ?? found.at(-1) ?? null
  }

  /** Who sends, in the log: this tab. */
  get name() {
    return `page ${String(this.api.clientId ?? '').slice(0, 6)}`
  }

  /** { number, at_block }. Throws an Error with the server's words. */
  command(id, body) {
    return this.ask(`/forcing/streams/${encodeURIComponent(id)}/commands`, {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ ...body, client: this.name })
    })
  }

  /** { version, log } with every command that was carried out; a state shows the newest ones only. */
  log(id) {
    return this.ask(`/forcing/streams/${encodeURIComponent(id)}/log`)
  }

  /** { first, fps, frames: [base64 JPEG], newest } of the frames behind number `after` that are still held. */
  frames(id, after) {
    return this.ask(`/forcing/streams/${encodeURIComponent(id)}/frames?after=${after}`)
  }

  async ask(route, options) {
    const reply = await this.api.fetchApi(route, options)
    const body = await reply.json().catch(() => ({}))
    if (!reply.ok) throw new Error(body.error ?? `${reply.status} ${reply.statusText}`)
    return body
  }
}
