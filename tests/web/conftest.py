"""The modules of web/ by themselves, and nodes on the real page."""
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

WEB = Path(__file__).resolve().parents[2] / "web"
MODULES = ("timeline_model", "timeline_edits", "live_player", "live_client", "live_panel", "live_holder", "live_pad",
           "timeline_view", "strings", "dom")
NODE_MAIN = """
const modules = Object.fromEntries(await Promise.all(%s.map(async name => [name, await import(`./${name}.js`)])))
const run = %s
let text = ''
for await (const part of process.stdin) text += part
console.log(JSON.stringify(await run(modules, JSON.parse(text))) ?? 'null')
"""
PAGE_MAIN = """async ([names, argument]) => {
    const load = async name => [name, await import(`/extensions/ComfyUI-Forcing/${name}.js`)]
    const modules = Object.fromEntries(await Promise.all(names.map(load)))
    return await (%s)(modules, argument)
}"""


@pytest.fixture(scope="session")
def js(request, tmp_path_factory):
    """js(source, argument): what `(modules, argument) => ...` returns, in node where there is one, else in the page."""
    if shutil.which("node") is None:
        page = request.getfixturevalue("comfy_page")
        return lambda source, argument=None: page.evaluate(PAGE_MAIN % source, [list(MODULES), argument])
    folder = tmp_path_factory.mktemp("modules")
    for name in (*MODULES, "live_controls"):
        shutil.copy(WEB / f"{name}.js", folder)
    (folder / "package.json").write_text('{"type": "module"}')

    def run(source, argument=None):
        (folder / "main.js").write_text(NODE_MAIN % (json.dumps(MODULES), source), encoding="utf-8")
        done = subprocess.run(["node", "main.js"], cwd=folder, input=json.dumps(argument), capture_output=True, text=True,
                              timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(params=["classic", "vue"])
def rendered(request, comfy_page):
    """The page with an empty graph at full size, in each of both renderings of nodes. Ends classic and dark."""
    comfy_page.page.keyboard.press("Escape")
    comfy_page.evaluate("() => { app.canvas.setGraph(app.rootGraph ?? app.graph); app.graph.clear() }")
    comfy_page.set_setting("Comfy.VueNodes.Enabled", request.param == "vue")
    comfy_page.evaluate("() => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [120, 80]; app.canvas.setDirty(true, true) }")
    yield comfy_page
    comfy_page.set_setting("Comfy.VueNodes.Enabled", False)
    comfy_page.set_setting("Comfy.ColorPalette", "dark")


@pytest.fixture
def picture():
    """picture(name, locator): keep a screenshot in screens/ as documentation, with FORCING_UPDATE_SCREENS=1 only."""
    def keep(name, locator):
        if os.environ.get("FORCING_UPDATE_SCREENS"):
            locator.screenshot(path=str(Path(__file__).parent / "screens" / f"{name}.png"))

    return keep


@pytest.fixture
def add_node(rendered):
    """add_node(type, x, y): its id in the open graph."""
    return lambda kind, x=0, y=0: rendered.evaluate("""([kind, x, y]) => {
        const node = LiteGraph.createNode(kind)
        node.pos = [x, y]
        app.canvas.graph.add(node)
        return node.id
    }""", [kind, x, y])


@pytest.fixture
def ended(comfy_server):
    """No stream runs when the test is over, however it ends."""
    yield
    comfy_server.post("/queue", {"clear": True})
    comfy_server.interrupt()
