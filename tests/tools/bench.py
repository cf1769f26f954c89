"""What the tools share: the test kit and the pack under their usual names, and a page of the real frontend."""
import contextlib
import sys
import tempfile
import types
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
WORKFLOWS = REPO / "workflows"


def _namespace(name, folder):
    """As in tests/conftest.py, which may have done it already."""
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module


_namespace("forcing_pack", REPO)
_namespace("forcing_testkit", REPO / "tests" / "support")


@contextlib.contextmanager
def frontend(url=None, size=(1600, 1000)):
    """A ComfyPage on the server at `url`, or on one started for the purpose (no models in it)."""
    from forcing_testkit import browser, checkout, server

    with contextlib.ExitStack() as stack:
        if url is None:
            found = checkout.find()
            if found.root is None:
                sys.exit(f"{found.problem}; {found.fix}")
            base = stack.enter_context(tempfile.TemporaryDirectory())
            running = server.ComfyServer(found.root, server.prepare(Path(base)))
            stack.callback(running.stop)
            url = running.start().url
        yield stack.enter_context(browser.open_page(url, browser.find_chromium(), size))
