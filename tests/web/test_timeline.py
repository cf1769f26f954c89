"""The prompt timeline: its data by itself, against the parser of the nodes, and the editor on the real page."""
import json
import re

import pytest
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.track import KINDS
from forcing_pack.forcing_core.track_files import read_track

THREE = "0 | a red circle\n5 | a green circle\n10 | soft 4 | a blue circle"
GOOD = {
    "bars": THREE,
    "no bars": "0:00 a cat sits on a wall\n0:10 it jumps down\n1:02:03.5 it sleeps",
    "comments": "# one\n\n  0 | first  \n\n# two\n 7.25s | KEEP | second\n#end\n",
    "frames": "0f | first\n40f | cut | second\n120f | jump | third",
    "mixed": "0 | first\n9f | second\n3 | third",
    "default soft": "0 | first\n5 | soft | second",
    "one": "0 | only",
    "odd spaces": "0|first\n5   |  flush  |  second  one ",
    "carriage returns": "0 | first\r\n5 | second\r\n",
    "json": '{"prompts": ["first", "second | with a bar"], "switch_frame_indices": "40", "seed": 3}',
    "json list": '{"prompts": ["a", "b", "c"], "switch_frame_indices": [40, 80]}',
    "json one": '{"prompts": ["a"]}',
}
BAD = {
    "empty": ("  \n# nothing\n", 0),
    "no time": ("0 | first\nsecond", 2),
    "no time at all": ("a cat", 1),
    "glued": ("0 | first\n5x | second", 2),
    "bars": ("0 | keep | first | more", 1),
    "no prompt": ("0 | first\n\n5 | keep |", 3),
    "clock": ("0 | first\n1:75 | second", 2),
    "clock with hours": ("0 | first\n1:60:00 | second", 2),
    "transition": ("0 | first\n5 | dissolve | second", 2),
    "transition with a number": ("0 | first\n5 | cut 4 | second", 2),
    "tab": ("0 | first\n5 | soft\t6 | second", 2),
    "soft": ("0 | first\n5 | soft 1 | second", 2),
    "not at 0": ("1 | first", 1),
    "frame not at 0": ("3f | first", 1),
    "same": ("0 | first\n5 | second\n5 | third", 3),
    "same in other units": ("0 | first\n21f | second\n5.0625 | third", 3),
    "order": ("0 | first\n5 | second\n\n4 | third\nnonsense", 4),
    "json": ('{"prompts": [', 1),
    "json without": ('{"text": "a"}', 1),
    "json empty prompt": ('{"prompts": ["a", " "], "switch_frame_indices": "40"}', 1),
    "json count": ('{"prompts": ["a", "b"]}', 1),
    "json words": ('{"prompts": ["a", "b"], "switch_frame_indices": "forty"}', 1),
    "json order": ('{"prompts": ["a", "b", "c"], "switch_frame_indices": "40, 20"}', 1),
    "json negative": ('{"prompts": ["a", "b"], "switch_frame_indices": [-4]}', 1),
    "json lines": ('{"prompts": ["a"]}\n{"prompts": ["b"]}', 0),
}
READ = """({ timeline_model: { parse, format, secondsOf } }, { texts, kinds }) => texts.map(text => {
    try {
        const defaults = { transition: 'keep', blocks: 6 }
        const track = parse(text, kinds, defaults)
        const row = s => [s.start, s.text, s.transition ?? 'keep', s.blocks ?? 6, s.frames, secondsOf(s)]
        const rows = ({ segments }) => segments.map(row)
        const lines = track.segments.map(segment => ({ ...segment, line: null }))
        const anew = format({ ...track, segments: lines })
        return { rows: rows(track), same: format(track), anew, again: rows(parse(anew, kinds, defaults)) }
    } catch (error) {
        if (error.name !== 'Error' || !error.key) throw error
        return { key: error.key, line: error.line, values: error.values }
    }
})"""


def rows(text):
    """What the nodes read, as `READ` gives it."""
    return [[s.start, s.prompt, s.transition, s.blocks, s.frames, s.seconds] for s in read_track(text, "keep", 6).segments]


def read(js, texts):
    return js(READ, {"texts": list(texts), "kinds": list(KINDS)})


# -- the data -------------------------------------------------------------------------------------------------

def test_reads_and_writes_what_the_nodes_read(js):
    """Same segments as in Python; unchanged lines come out as they were, and new ones mean the same to both."""
    for name, text, found in zip(GOOD, GOOD.values(), read(js, GOOD.values())):
        assert found["rows"] == rows(text), name
        assert found["again"] == found["rows"] and rows(found["anew"]) == rows(text), name
        if not name.startswith("json"):
            assert found["same"].split() == text.split(), name


def test_json_stays_json_with_its_other_keys(js):
    written, = (found["same"] for found in read(js, [GOOD["json"]]))
    assert json.loads(written) == json.loads(GOOD["json"])


def test_refuses_what_the_nodes_refuse_and_names_the_same_line(js):
    words = js("({ strings: { translate } }, found) => found.map(({ key, values }) => translate(key, values))",
               found := read(js, [text for text, _ in BAD.values()]))
    for (name, (text, line)), error, sentence in zip(BAD.items(), found, words):
        with pytest.raises(ForcingError) as raised:
            read_track(text)
        named = re.match(r"Line (\d+):", str(raised.value))
        assert error["line"] == line == (int(named[1]) if named else 0), name
        assert error["key"].startswith("error.") and sentence != error["key"] and "{text}" not in sentence, name


EDITS = {
    "edge": ("moveEdge(t, 1, 6.5)", "0 | a\n6.5 | b\n10 | c"),
    "edge stops at the neighbour": ("moveEdge(t, 1, 20)", "0 | a\n9.75 | b\n10 | c"),
    "edge stops at the one before": ("moveEdge(t, 2, 1)", "0 | a\n5 | b\n5.25 | c"),
    "edge with all that follows": ("moveEdge(t, 1, 8, true)", "0 | a\n8 | b\n13 | c"),
    "the first stays at 0": ("move(moveEdge(t, 0, 3), 0, 3)", "0 | a\n5 | b\n10 | c"),
    "segment": ("move(t, 1, -2)", "0 | a\n3 | b\n8 | c"),
    "segment stops": ("move(t, 1, -9)", "0 | a\n0.25 | b\n5.25 | c"),
    "last segment": ("move(t, 2, 30)", "0 | a\n5 | b\n40 | c"),
    "split": ("split(t, 1, 7.6, 20)", "0 | a\n5 | b\n7.5 | b\n10 | c"),
    "split of the last": ("split(t, 2, 15, 20)", "0 | a\n5 | b\n10 | c\n15 | c"),
    "split outside": ("split(t, 1, 5.1, 20)", "0 | a\n5 | b\n10 | c"),
    "add": ("add(t)", "0 | a\n5 | b\n10 | c\n15 | c"),
    "remove": ("remove(t, 1)", "0 | a\n10 | c"),
    "remove the first": ("remove(t, 0)", "0 | b\n10 | c"),
    "remove all but one": ("remove(remove(remove(t, 0), 0), 0)", "0 | c"),
    "transition": ("setTransition(t, 1, 'cut', 7)", "0 | a\n5 | cut | b\n10 | c"),
    "soft transition": ("setTransition(t, 1, 'soft', 7)", "0 | a\n5 | soft 7 | b\n10 | c"),
    "soft as on the node": ("setTransition(t, 1, 'soft')", "0 | a\n5 | soft | b\n10 | c"),
    "back to the default": ("setTransition(setTransition(t, 1, 'cut'), 1, null)", "0 | a\n5 | b\n10 | c"),
    "text": ("setText(t, 1, ' x | y\\n z ')", "0 | a\n5 | x / y z\n10 | c"),
    "no text": ("setText(t, 1, '  ')", "0 | a\n5 | b\n10 | c"),
}


def test_edits(js):
    """By hand. Whatever an edit makes, the nodes read it."""
    source = "({ timeline_model: { parse, format }, timeline_edits: e }, kinds) => {\n" \
             "const { add, move, moveEdge, remove, setText, setTransition, split } = e\n" \
             "const t = parse('0 | a\\n5 | b\\n10 | c', kinds, { transition: 'recache', blocks: 4 })\n" \
             f"return [{', '.join(f'format({edit})' for edit, _ in EDITS.values())}]\n}}"
    for (name, (_, wanted)), found in zip(EDITS.items(), js(source, list(KINDS))):
        assert found == wanted, name
        read_track(found)


def test_frames_stay_frames_and_comments_stay(js):
    text = "# one\n0 | a\n# two\n41f | b\n# three"
    found = js("""({ timeline_model: { parse, format }, timeline_edits: { moveEdge, remove } }, { text, kinds }) => {
        const track = parse(text, kinds, { transition: 'recache', blocks: 4 })
        return [format(moveEdge(track, 1, 5)), format(remove(track, 1)), format(remove(track, 0))]
    }""", {"text": text, "kinds": list(KINDS)})
    assert found == ["# one\n0 | a\n# two\n21f | b\n# three", "# one\n0 | a\n# two\n# three", "# one\n# two\n0f | b\n# three"]


def test_history(js):
    """Undo, redo, steps of one tag as one, and a change that ends what could be redone."""
    assert js("""({ timeline_edits: { History } }) => {
        const history = new History('a')
        const seen = [history.undo()]
        for (const [text, tag] of [['b', 'move'], ['c', 'move'], ['c', 'other'], ['d', null]]) history.push(text, tag)
        seen.push(history.undo(), history.undo(), history.undo(), history.redo(), history.redo(), history.redo())
        history.undo()
        history.push('e')
        return [...seen, history.redo(), history.undo(), history.undo()]
    }""") == [None, "c", "a", None, "c", "d", None, None, "c", "a"]


# -- the page -------------------------------------------------------------------------------------------------

SCRIPT = "id => app.canvas.graph.getNodeById(id).widgets.find(widget => widget.name === 'script').value"


class Editor:
    """The timeline of one node on the page."""

    def __init__(self, page, node):
        self.comfy, self.page, self.node = page, page.page, node
        self.root = self.page.get_by_role("group", name="Prompt timeline")
        self.root.wait_for()

    @property
    def script(self):
        return self.comfy.evaluate(SCRIPT, self.node)

    def write(self, text):
        self.comfy.evaluate("([id, text]) => { app.canvas.graph.getNodeById(id).widgets[0].value = text }", [self.node, text])

    def prompt(self, number):
        return self.root.get_by_role("textbox", name=re.compile(f"^Prompt {number} of"))

    def drag(self, number, seconds, axis, edge=False):
        """By its left edge, or by its middle; the axis shows so many seconds."""
        box = self.root.locator(".forcing-segment").nth(number - 1).bounding_box()
        width = self.root.locator(".forcing-lane").bounding_box()["width"]
        x, y = box["x"] + (2 if edge else box["width"] / 2), box["y"] + box["height"] - 12
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + seconds * width / axis, y, steps=5)
        self.page.mouse.up()

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)


@pytest.fixture
def editor(rendered, add_node):
    return Editor(rendered, add_node("ForcingPromptTrack"))


def test_three_prompts_by_mouse_and_keyboard(editor, rendered, tmp_path, picture, request):
    """From one prompt to three, then saved, loaded and turned into what the server gets."""
    editor.write("0 | a red circle")
    editor.prompt(1).focus()
    editor.root.get_by_role("button", name="Add").click()
    editor.press("Enter", "Control+a")
    editor.page.keyboard.type("a green circle")
    editor.press("Enter", "Shift+ArrowRight", "s")
    assert editor.script == "0 | a red circle\n5.25 | a green circle\n10.25 | a green circle"
    editor.root.locator(".forcing-segment").nth(2).dblclick()
    editor.press("Control+a")
    editor.page.keyboard.type("a blue circle")
    editor.press("Enter")
    editor.root.get_by_role("combobox").select_option("soft")
    editor.root.get_by_role("spinbutton", name="Blocks").fill("6")
    editor.press("Enter")
    editor.drag(3, 3, axis=20)
    editor.drag(2, -1, axis=20, edge=True)
    wanted = "0 | a red circle\n4.25 | a green circle\n13.25 | soft 6 | a blue circle"
    assert editor.script == wanted
    (tmp_path / "saved.json").write_text(json.dumps(rendered.serialize()))
    rendered.load_workflow(tmp_path / "saved.json")
    editor = Editor(rendered, editor.node)
    assert editor.script == wanted and editor.prompt(3).input_value() == "a blue circle"
    inputs, = (node["inputs"] for node in rendered.graph_to_prompt().values())
    assert inputs == {"script": wanted, "transition": "recache", "soft_blocks": 4}
    picture(f"timeline_{request.node.callspec.id}_dark", editor.root)
    rendered.set_setting("Comfy.ColorPalette", "light")
    picture(f"timeline_{request.node.callspec.id}_light", editor.root)
    assert rendered.messages_about("forcing") == [] and rendered.errors == []


def test_undo_stays_inside(editor, rendered, add_node):
    """Ctrl+Z on a prompt undoes the timeline's own step, and neither it nor Delete reaches the graph."""
    other = add_node("PrimitiveInt", 700)
    editor.write(THREE)
    editor.prompt(2).focus()
    editor.press("ArrowRight", "ArrowRight", "Delete")
    assert editor.script == "0 | a red circle\n10.5 | soft 4 | a blue circle"
    editor.press("Control+z")
    assert editor.script == "0 | a red circle\n5.5 | a green circle\n10.5 | soft 4 | a blue circle"
    editor.press("Control+z")
    assert editor.script == THREE
    editor.press("Control+y", "Control+Shift+z")
    assert editor.script == "0 | a red circle\n10.5 | soft 4 | a blue circle"
    editor.press("Control+z", "Control+z")
    assert editor.script == THREE
    rendered.evaluate("() => new Promise(done => setTimeout(() => requestAnimationFrame(done)))")  # the page's own undo is late
    assert rendered.evaluate("app.graph.nodes.map(node => node.id)") == [editor.node, other]
    editor.press("Enter", "End")
    editor.page.keyboard.type("s, Delete")
    editor.press("Backspace", "Escape")
    assert editor.script == THREE


def test_the_page_learns_of_a_change_by_keyboard(editor, rendered):
    """Else it would be lost with the draft of the workflow, and the page could not undo it."""
    rendered.evaluate("""() => window.comfyAPI.api.api.addEventListener('graphChanged', ({ detail }) => {
        window.testkitChanged = JSON.stringify(detail.nodes)
    })""")
    editor.write(THREE)
    editor.prompt(3).focus()
    editor.press("ArrowRight")
    rendered.page.wait_for_function("window.testkitChanged?.includes('10.25 | soft 4 | a blue circle')")


def test_follows_the_script_and_shows_its_errors(editor, rendered):
    """Typing in the text changes the timeline at once; what is wrong in it is said, and nothing of it is lost."""
    text = rendered.page.locator("textarea.comfy-multiline-input, textarea[data-capture-wheel]:not(.forcing-segment *)").first
    text.fill("0 | one\n4 | cut | two")
    assert editor.prompt(2).get_attribute("aria-label") == "Prompt 2 of 2, from 4 s to the end, cut"
    text.fill("0 | one\n4 | cat | two")
    status = editor.root.get_by_role("status")
    assert status.inner_text().startswith('Line 2: "cat" is not a transition.')
    editor.prompt(2).focus()
    editor.press("Delete", "ArrowRight", "s")
    assert editor.script == "0 | one\n4 | cat | two"
    text.fill(THREE)
    assert status.inner_text().startswith("Drag")
    rendered.evaluate("""id => {
        const transition = app.graph.getNodeById(id).widgets[1]
        transition.value = 'flush'
        transition.callback('flush')
    }""", editor.node)
    assert editor.prompt(2).get_attribute("aria-label") == "Prompt 2 of 3, from 5 s to 10 s, flush"


def test_a_script_through_a_wire_is_not_edited(editor, rendered):
    rendered.evaluate("""id => {
        const text = LiteGraph.createNode('PrimitiveStringMultiline')
        app.graph.add(text)
        const track = app.graph.getNodeById(id)
        text.connect(0, track, track.inputs.findIndex(input => input.name === 'script'))
    }""", editor.node)
    before = editor.script
    editor.prompt(2).focus()
    assert editor.root.get_by_role("status").inner_text().startswith("The script comes from a connected node")
    editor.press("Delete")
    assert editor.script == before and editor.root.get_by_role("button", name="Add").is_disabled()


def test_works_inside_a_subgraph(editor, rendered):
    """Also after leaving it and coming back."""
    editor.write(THREE)
    rendered.evaluate("""id => {
        const { node, subgraph } = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]))
        window.testkitSubgraph = subgraph
        app.canvas.openSubgraph(subgraph, node)
    }""", editor.node)
    rendered.page.wait_for_function("app.canvas.graph === window.testkitSubgraph")
    inside = Editor(rendered, rendered.evaluate("app.canvas.graph.nodes[0].id"))
    inside.prompt(2).focus()
    inside.press("ArrowRight")
    changed = THREE.replace("\n5 ", "\n5.25 ").replace("\n10 ", "\n10.25 ")
    assert inside.script == changed
    rendered.evaluate("app.canvas.setGraph(app.rootGraph)")
    inside.root.wait_for(state="hidden")
    rendered.evaluate("app.canvas.setGraph(window.testkitSubgraph)")
    inside.prompt(3).focus()
    inside.press("Delete")
    assert inside.script == changed.rsplit("\n", 1)[0]
    found = [node["inputs"]["script"] for node in rendered.graph_to_prompt().values()]
    assert found == [inside.script]
