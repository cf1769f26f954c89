/** Elements made of properties and children. Text goes in as text only: nothing of a user's is ever read as HTML. */

/** An element. fields: its properties, and `aria` and `data` for attributes. children: elements and strings. */
export function element(tag, { aria = {}, data = {}, ...fields } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), fields)
  for (const [name, value] of Object.entries(aria)) made.setAttribute(name === 'role' ? name : `aria-${name}`, value)
  Object.assign(made.dataset, data)
  made.append(...children)
  return made
}

/** A button. label: its name for those who cannot see it, where `text` is a sign or says too little. */
export function button(text, tip, act, { label, ...fields } = {}) {
  const made = element('button', { type: 'button', textContent: text, title: tip, aria: label ? { label } : {}, ...fields })
  made.addEventListener('click', act)
  return made
}

/** A drop-down of [value, text] pairs. */
export function select(pairs, label, fields = {}) {
  const options = pairs.map(([value, textContent]) => element('option', { value, textContent }))
  return element('select', { title: label, aria: { label }, ...fields }, ...options)
}

/** Write only what differs: writing a text node anew would end a selection and cost a layout. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text
}
