/** ComfyUI-Forcing on the page: a timeline on Forcing Prompt Track, a live panel on both nodes that stream. */
import { addPanel, api, app, changeReporter, executionIds, isLinked, loadStyle, onWidgetChange, t } from './host.js'
import { LiveClient } from './live_client.js'
import { buildPad } from './live_pad.js'
import { LivePanel } from './live_panel.js'
import { Timeline } from './timeline.js'

// At once: the page complains about messages that nobody listens to, and they come before it is set up.
const client = new LiveClient(api)

function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name)
}

function addTimeline(node) {
  const [script, transition, blocks] = ['script', 'transition', 'soft_blocks'].map((name) => widgetOf(node, name))
  const changed = changeReporter()
  const timeline = new Timeline({
    read: () => String(script.value ?? ''),
    write(text) {
      script.value = text
      changed()
    },
    kinds: transition.options.values,
    defaults: () => ({ transition: transition.value, blocks: blocks.value }),
    linked: () => isLinked(node, 'script'),
    t
  })
  const refresh = () => timeline.refresh()
  for (const widget of [script, transition, blocks]) onWidgetChange(widget, refresh)
  addPanel(node, 'timeline', timeline.element, {
    height: 190, grow: 240, width: 520, beside: 90,
    attach(signal) {
      api.addEventListener('graphChanged', refresh, { signal })
      const sizes = new ResizeObserver(refresh)
      sizes.observe(timeline.element)
      signal.addEventListener('abort', () => sizes.disconnect())
    }
  })
}

function addLivePanel(node, controls) {
  const panel = new LivePanel({ client, ids: () => executionIds(node), t, controls })
  addPanel(node, 'live', panel.element, {
    height: 470, grow: 900, width: 460, zoomed: true,
    attach: (signal) => panel.attach(signal)
  })
}

const PANELS = {
  ForcingPromptTrack: addTimeline,
  ForcingStream: (node) => addLivePanel(node),
  ForcingLiveStream: (node) => addLivePanel(node, buildPad)
}

app.registerExtension({
  name: 'ComfyUI-Forcing.Panels',
  setup() {
    loadStyle()
    return client.refresh()
  },
  nodeCreated(node) {
    PANELS[node.comfyClass]?.(node)
  },
  afterConfigureGraph() {
    client.announce()
  }
})
