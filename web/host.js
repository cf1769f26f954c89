/** All that the panels ask of ComfyUI's page, in one file: public extension interfaces, looked up when they are needed. */
import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'
import { translate } from './strings.js'

const CAPTURE_AFTER = 400 // ms without a change: holding a key makes one step of the page's own undo

export { api, app }

export function t(key, values) {
  return translate(key, values, app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en')
}

/** Load the style sheet beside this file, once. */
export function loadStyle() {
  const href = new URL('./style.css', import.meta.url).href
  if ([...document.styleSheets].some((sheet) => sheet.href === href)) return
  document.head.append(Object.assign(document.createElement('link'), { rel: 'stylesheet', href }))
}

/**
 * Put an element on a node, in both renderings. It holds no value: it is neither saved nor sent.
 * height, grow: least and most of it, in pixels. width: of a new node. beside: pixels that a new node has for its other
 * widgets beyond what they need. zoomed: stay an element when the graph is zoomed far out. attach(signal): listen outside
 * the element until the signal aborts, which is when the node leaves the graph.
 */
export function addPanel(node, name, element, { height, width, grow = height, beside = 0, zoomed = false, attach }) {
  const widget = node.addDOMWidget(name, 'forcing-panel', element, {
    serialize: false, hideOnZoom: !zoomed, hideInPanel: true, getValue: () => '',
    getMinHeight: () => height, getMaxHeight: () => grow
  })
  widget.serialize = false
  element.style.minHeight = `${height - 2 * widget.margin}px`
  let listening = new AbortController()
  attach(listening.signal)
  const remove = widget.onRemove
  widget.onRemove = function () {
    listening.abort()
    remove?.call(this)
  }
  const added = node.onAdded
  node.onAdded = function (...args) {
    if (listening.signal.aborted) {
      listening = new AbortController()
      attach(listening.signal)
    }
    return added?.apply(this, args)
  }
  forwardGestures(element)
  const least = node.computeSize()
  node.setSize([Math.max(node.size[0], least[0], width), Math.max(node.size[1], least[1] + beside)])
  return widget
}

/** Wheel and middle button move the canvas, as over any other widget. */
function forwardGestures(element) {
  element.addEventListener('wheel', (event) => {
    const inner = event.target.closest('[data-capture-wheel], .forcing-scrolls')
    const scrolls = !event.ctrlKey && inner?.contains(document.activeElement)
    if (scrolls || window.LiteGraph?.vueNodesMode) return // there the node passes it on itself
    app.canvas.processMouseWheel(event)
  })
  const middle = { pointerdown: 'processMouseDown', pointermove: 'processMouseMove', pointerup: 'processMouseUp' }
  for (const [type, forward] of Object.entries(middle)) {
    element.addEventListener(type, (event) => {
      if (event.button === 1 || (event.buttons & 4) === 4) app.canvas[forward](event)
    })
  }
}

/** Tells the page that the workflow changed, so that it is marked, kept as a draft and can be undone. */
export function changeReporter() {
  let timer = 0
  return () => {
    clearTimeout(timer)
    timer = setTimeout(() => {
      app.canvas.emitBeforeChange()
      app.canvas.emitAfterChange()
    }, CAPTURE_AFTER)
  }
}

/** Call `act(value)` after every change of a widget, whoever made it. */
export function onWidgetChange(widget, act) {
  const before = widget.callback
  widget.callback = function (...args) {
    const result = before?.apply(this, args)
    act(args[0])
    return result
  }
}

/** Ids under which a node runs: "7", or "3:7" in a subgraph; several if the subgraph is used several times. */
export function executionIds(node) {
  const walk = (graph, prefix) => graph.nodes.flatMap((other) => [
    ...(other === node ? [`${prefix}${other.id}`] : []),
    ...(other.isSubgraphNode?.() ? walk(other.subgraph, `${prefix}${other.id}:`) : [])])
  return walk(app.rootGraph ?? app.graph, '')
}

/** Whether the value of a widget comes through a wire. */
export function isLinked(node, name) {
  return node.inputs?.some((input) => input.widget?.name === name && input.link != null) ?? false
}
