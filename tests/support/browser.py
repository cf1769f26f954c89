"""The real frontend in a real browser: a thin page object over Playwright."""
import contextlib
import json
import os
import shutil
from pathlib import Path

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync"]
# Drawing the default graph is the last step of the start: anything opened before would be replaced by it.
# Playwright calls a function if the expression returns one, hence the booleans.
READY = """!!(window.app?.extensionManager && window.LiteGraph?.registered_node_types['KSampler']
    && window.app.graph?.nodes.length)"""
# True once the view is where it was at the call before: fitting is animated.
STILL = """() => {
    const before = window.testkitView, { offset, scale } = app.canvas.ds
    window.testkitView = [...offset, scale].join()
    return window.testkitView === before
}"""


def find_chromium():
    """Path of a chromium to drive, or None. `playwright install` is not needed."""
    names = (os.environ.get("CHROMIUM_PATH", ""), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@contextlib.contextmanager
def open_page(url, executable, size=(1600, 1000)):
    """Yields a ComfyPage on the running server."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=ARGS)
        page = chromium.new_page(viewport={"width": size[0], "height": size[1]})
        yield ComfyPage(page, url)
        chromium.close()


class ComfyPage:
    """`page` is Playwright's own object; `console` and `errors` collect since `open()`."""

    def __init__(self, page, url):
        self.page, self.url = page, url
        self.console, self.errors = [], []
        page.on("console", lambda message: self.console.append((message.type, message.text)))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        # After a click, leaving a page with unsaved changes asks first; Playwright would answer "stay".
        page.on("dialog", lambda dialog: dialog.accept())
        self.open()

    def open(self, query=""):
        """Load the page afresh, e.g. with query "?template=NAME&source=ComfyUI-Forcing"."""
        self.console.clear()
        self.errors.clear()
        self.page.goto(f"{self.url}/{query}")
        self.page.wait_for_function(READY, timeout=60_000)

    def messages_about(self, word):
        """Console errors, console warnings and page errors that contain `word` (the rest of the page is noisy).

        Not those about the model hub: the page asks it for file sizes, and repositories have such words in their names.
        """
        texts = [text for kind, text in self.console if kind in ("error", "warning")] + self.errors
        return [text for text in texts if word.lower() in text.lower() and "huggingface.co" not in text]

    def evaluate(self, script, argument=None):
        return self.page.evaluate(script, argument)

    def load_workflow(self, path):
        """Open a workflow file (UI or API format) as a user does by "Open", and wait until it is drawn."""
        workflow = json.loads(Path(path).read_text(encoding="utf-8"))
        expected = len(workflow["nodes"]) if isinstance(workflow.get("nodes"), list) else len(workflow)
        self.evaluate("window.app.graph.clear()")
        self.page.locator("#comfy-file-input").set_input_files(str(path))
        self.page.wait_for_function("count => window.app.graph.nodes.length === count", arg=expected)

    def missing_node_types(self):
        """Types in the open graph, subgraphs included, that no loaded extension registered."""
        return self.evaluate("""() => {
            const graphs = [app.graph, ...(app.graph.subgraphs?.values() ?? [])]
            const types = graphs.flatMap(graph => graph.nodes).filter(node => !node.isSubgraphNode?.())
                .map(node => node.type)
            return [...new Set(types)].filter(type => !LiteGraph.registered_node_types[type]).sort()
        }""")

    def registered(self, node_id):
        return self.evaluate("id => !!LiteGraph.registered_node_types[id]", node_id)

    def graph_to_prompt(self):
        """The open graph as an API prompt, exactly as the Run button would send it."""
        return self.evaluate("async () => (await app.graphToPrompt()).output")

    def serialize(self):
        """The open graph as a UI-format workflow, exactly as Save would write it."""
        return json.loads(self.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def set_setting(self, name, value):
        """E.g. set_setting("Comfy.VueNodes.Enabled", True); takes effect at once."""
        self.evaluate("async ([name, value]) => { await app.extensionManager.setting.set(name, value) }",
                      [name, value])

    def screenshot(self, path):
        """Fit the graph into the view and save a picture."""
        self.evaluate("async () => { await app.extensionManager.command.execute('Comfy.Canvas.FitView') }")
        self.page.wait_for_function(STILL, polling=200)
        self.page.screenshot(path=str(path))
        return Path(path)
