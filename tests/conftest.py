"""Set-up of the import system, before any test module is imported.

The pack's folders `nodes` and `tests` have the names of ComfyUI's own modules, so the order here
matters: helpers and pack get names of their own, the checkout goes first on sys.path, and ComfyUI's
arguments are set before anything of it chooses a device or an attention backend.
"""
import importlib
import os
import sys
import types
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def _namespace(name, folder):
    """Make `folder` importable as package `name` without running its __init__.py."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


_namespace("forcing_pack", TESTS.parent)
_namespace("forcing_testkit", TESTS / "support")

os.environ.setdefault("TRITON_INTERPRET", "1")  # for the fused kernels; Triton decides at its import, which may be torch's

checkout = importlib.import_module("forcing_testkit.checkout").find()

if checkout.root is not None:
    sys.path.insert(0, str(checkout.root))
    importlib.import_module("forcing_testkit.cpu_wheels").install()
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = True
    args.use_pytorch_cross_attention = True

pytest_plugins = ["forcing_testkit.fixtures"]

# Why host or web tests were skipped -> what to do about it. Filled while the session runs.
not_run = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[not_run] = {}
    if importlib.util.find_spec("torch"):
        importlib.import_module("torch").set_num_threads(2)


class UncollectedModule(pytest.Module):
    """Stands for a module that imports ComfyUI where there is none: skipped, never silently absent."""

    def collect(self):
        pytest.skip(checkout.problem, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if checkout.root is None and TESTS / "host" in module_path.parents:
        parent.config.stash[not_run][checkout.problem] = checkout.fix
        return UncollectedModule.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items):
    for item in items:
        for folder in ("host", "web"):
            if TESTS / folder in item.path.parents:
                item.add_marker(folder)
    # Playwright keeps an event loop running in this thread, in which no later asyncio.run can start.
    items.sort(key=lambda item: item.get_closest_marker("web") is not None)


@pytest.fixture(scope="session")
def require(request):
    """require(ok, problem, fix): skip the test, and repeat problem and fix loudly at the end."""
    def check(ok, problem, fix):
        if not ok:
            request.config.stash[not_run][problem] = fix
            pytest.skip(problem)
    return check


@pytest.fixture(scope="session")
def comfy_checkout(require):
    """The ComfyUI checkout under test; skips where there is none."""
    require(checkout.root is not None, checkout.problem, checkout.fix)
    return checkout.root


def pytest_terminal_summary(terminalreporter, config):
    for problem, fix in config.stash[not_run].items():
        terminalreporter.section("HOST TESTS DID NOT RUN", sep="!", red=True, bold=True)
        terminalreporter.write_line(f"HOST TESTS DID NOT RUN: {problem}", red=True, bold=True)
        terminalreporter.write_line(f"Fix: {fix}")
