"""Session fixtures: everything slow is built once."""
import importlib.util

import pytest
from forcing_testkit import browser, server, tiny


@pytest.fixture(scope="session")
def comfy_models(comfy_checkout, tmp_path_factory):
    """A models folder with the checkpoints of tiny.tiny_models; a test may add files to it."""
    return tiny.tiny_models(tmp_path_factory.mktemp("comfy_models"))


@pytest.fixture(scope="session")
def comfy_server(comfy_checkout, comfy_models, tmp_path_factory):
    """The one running ComfyServer of the session."""
    base = server.prepare(tmp_path_factory.mktemp("comfy_base"), comfy_models)
    running = server.ComfyServer(comfy_checkout, base).start(timeout=240)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def comfy_page(require, comfy_checkout, request):
    """The one ComfyPage of the session, opened and ready. Skips where no browser can be driven."""
    require(importlib.util.find_spec("playwright"), "web tests: playwright is not installed", "pip install playwright")
    executable = browser.find_chromium()
    require(executable, "web tests: no chromium on the PATH", "install the chromium package, or set CHROMIUM_PATH")
    with browser.open_page(request.getfixturevalue("comfy_server").url, executable) as page:
        yield page


@pytest.fixture(scope="module")
def one_thread():
    """Tiny networks gain nothing from threads, and lose much where other programs hold the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
