/** What a running stream can be told: prompt and transition, seed, strengths of LoRAs. Pause and stop are the panel's. */
import { button, element, select, setText } from './dom.js'
import { isOver } from './live_client.js'

const TRANSITIONS = ['recache', 'keep', 'soft', 'flush', 'jump', 'cut']
const BLOCKS = 4 // of a soft transition

/**
 * A field that shows the stream's value until the user writes another one. What was sent stays in it: until the block
 * that takes it, the stream still tells the old value, and only a new one is news.
 */
class Kept {
  constructor(field) {
    Object.assign(this, { field, changed: false, seen: null })
    field.addEventListener('input', () => {
      this.changed = true
    })
  }

  draw(value) {
    if (value === this.seen) return
    this.seen = value
    if (!this.changed) this.field.value = value
  }

  reset() {
    Object.assign(this, { changed: false, seen: null })
    this.field.value = ''
  }
}

/** send(body): promise of whether the command was taken. */
export function buildControls(t, send) {
  const prompt = promptControls(t, send)
  const seed = seedControls(t, send)
  const loras = loraControls(t, send)
  const parts = [prompt, seed, loras]
  return {
    element: element('div', { className: 'forcing-controls' }, prompt.element,
      element('div', { className: 'forcing-bar forcing-more' }, seed.element, loras.element)),
    draw: (state) => parts.forEach((part) => part.draw(state)),
    reset: () => parts.forEach((part) => part.reset())
  }
}

function promptControls(t, send) {
  const field = element('textarea', { rows: 3, placeholder: t('live.prompt'), title: t('live.prompt.tip'),
    aria: { label: t('live.prompt') }, data: { captureWheel: 'true' } })
  const text = new Kept(field)
  const kind = select(TRANSITIONS.map((name) => [name, t(`kind.${name}`)]), t('live.transition'))
  const blocks = element('input', { type: 'number', min: 2, max: 1000, value: BLOCKS, title: t('live.blocks'), hidden: true,
    aria: { label: t('live.blocks') } })
  const change = async () => {
    const soft = kind.value === 'soft' ? { blocks: Number(blocks.value) } : {}
    const sent = field.value
    const taken = await send({ kind: 'prompt', text: sent, transition: kind.value, ...soft })
    // From here on the field follows the stream again, unless somebody writes on already.
    if (taken && field.value === sent) text.changed = false
  }
  const apply = button(t('live.send'), t('live.prompt.tip'), change, { className: 'forcing-primary' })
  kind.addEventListener('change', () => {
    blocks.hidden = kind.value !== 'soft'
  })
  field.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return
    event.preventDefault()
    event.stopPropagation() // the same keys run the workflow
    if (!apply.disabled) change()
  })
  return {
    element: element('div', { className: 'forcing-prompt' }, field,
      element('div', { className: 'forcing-bar' }, kind, blocks, element('span', { className: 'forcing-gap' }), apply)),
    draw(state) {
      field.disabled = kind.disabled = blocks.disabled = apply.disabled = isOver(state)
      if (state) text.draw(state.prompt)
    },
    reset: () => text.reset()
  }
}

function seedControls(t, send) {
  const field = element('input', { type: 'number', min: 0, step: 1, className: 'forcing-seed',
    aria: { label: t('live.seed') } })
  const seed = new Kept(field)
  const change = async () => {
    const value = Number(field.value)
    if (await send({ kind: 'seed', seed: Number.isSafeInteger(value) ? value : field.value })) seed.changed = false
  }
  const apply = button(t('live.set'), t('live.seed.set'), change, { label: t('live.seed.set') })
  field.addEventListener('keydown', ({ key }) => key === 'Enter' && !apply.disabled && change())
  return {
    element: element('label', {}, t('live.seed'), field, apply),
    draw(state) {
      field.disabled = apply.disabled = isOver(state)
      if (state) seed.draw(state.seed)
    },
    reset: () => seed.reset()
  }
}

function loraControls(t, send) {
  const box = element('div', { className: 'forcing-loras' })
  let sliders = []
  const slider = ({ name }) => {
    const label = name ? t('live.lora.named', { name }) : t('live.lora')
    const field = element('input', { type: 'range', min: -1, max: 2, step: 0.05, title: label, aria: { label } })
    const shown = element('output')
    const value = new Kept(field)
    field.addEventListener('input', () => setText(shown, field.value))
    field.addEventListener('change', async () => {
      await send({ kind: 'lora', strength: Number(field.value), ...(name ? { name } : {}) })
      value.changed = false
    })
    const caption = element('span', { textContent: name || label })
    return { name, value, field, shown, element: element('label', { title: label }, caption, field, shown) }
  }
  return {
    element: box,
    draw(state) {
      const loras = state?.lora ?? []
      if (loras.map(({ name }) => name).join() !== sliders.map(({ name }) => name).join()) {
        sliders = loras.map(slider)
        box.replaceChildren(...sliders.map((one) => one.element))
      }
      sliders.forEach(({ value, field, shown }, index) => {
        const { strength } = loras[index]
        Object.assign(field, { disabled: isOver(state), min: Math.min(-1, strength), max: Math.max(2, strength) })
        value.draw(strength)
        setText(shown, field.value)
      })
    },
    reset() {
      sliders = []
      box.replaceChildren()
    }
  }
}
