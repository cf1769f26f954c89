// Runs in the page: draws what graph.py describes and returns the workflow's text as Save would write it.
({ nodes, links, groups }) => {
    const GAP = 60, TITLE = 30, MARGIN = 24, HEADER = 64
    const graph = app.graph
    graph.clear()

    for (const { id, type, title, models, widgets } of nodes) {
        const node = LiteGraph.createNode(type)
        node.id = id
        graph.add(node)
        if (title) node.title = title
        if (models.length) node.properties.models = models
        for (const [name, value] of Object.entries(widgets)) {
            const widget = node.widgets?.find(widget => widget.name === name)
            if (!widget) throw new Error(`${type} has no widget ${name}: ${node.widgets?.map(w => w.name)}`)
            widget.value = value
        }
    }

    for (const [from, output, to, name] of links) {
        const target = graph.getNodeById(to)
        const input = target.inputs.findIndex(input => input.name === name)
        if (input < 0) throw new Error(`${target.type} has no input ${name}`)
        if (!graph.getNodeById(from).connect(output, target, input)) throw new Error(`${from} -> ${to}.${name} refused`)
    }

    const stack = ({ nodes: ids, width }, x, top) => {
        let y = top
        for (const id of ids) {
            const node = graph.getNodeById(id)
            const { tall } = nodes.find(node => node.id === id)
            node.setSize([width, Math.max(node.computeSize()[1], tall)])
            node.pos = [x, y + TITLE]
            y += TITLE + node.size[1] + GAP / 2
        }
        return y - GAP / 2
    }
    const frame = (title, color, left, top, right, bottom) => {
        const group = new LiteGraph.LGraphGroup(title)
        group.color = color
        group.font_size = 24
        group.pos = [left - MARGIN, top - HEADER]
        group.size = [right - left + 2 * MARGIN, bottom - top + HEADER + MARGIN]
        graph.add(group)
    }

    let left = 0, right = 0, bottom = 0
    for (const { title, color, columns, below } of groups) {
        const top = below ? bottom + MARGIN + GAP / 2 + HEADER : 0
        if (!below) left = right && right + GAP + 2 * MARGIN
        let x = left
        bottom = Math.max(...columns.map(column => {
            const y = stack(column, x, top)
            x += column.width + GAP
            return y
        }))
        right = below ? Math.max(right, x - GAP) : x - GAP
        if (title) frame(title, color, left, top, x - GAP, bottom)
    }
    return JSON.stringify(graph.serialize())  // Playwright would write null for undefined
}
