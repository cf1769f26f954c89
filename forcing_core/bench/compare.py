"""Our sampler beside ComfyUI's own, in one process.

ComfyUI is never imported from here: `nodes/compare.py` of the pack does that. It is loaded by path under
synthetic parent packages: the pack's own folder usually has a name that cannot be imported, its `nodes` would
hide ComfyUI's module of the same name, and the node definitions in nodes/__init__.py would load ComfyUI before
compare.py has told it which device to use.
"""
from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any, Callable, Sequence

from ..errors import ForcingError
from .timing import Case

PARENT = "forcing_pack"
REPOSITORY = Path(__file__).resolve().parents[2]
Compare = Callable[..., list[dict[str, Any]]]


def _is_checkout(place: Path) -> bool:
    return (place / "main.py").is_file() and (place / "comfy").is_dir()


def find_comfyui(repository: Path = REPOSITORY) -> Path:
    """The ComfyUI checkout: COMFYUI_PATH, the one whose custom_nodes holds the pack, or comfy-cli's default place."""
    named = os.environ.get("COMFYUI_PATH")
    # asked for by name: another checkout would be a comparison with something else
    around = [p.parent for p in repository.parents if p.name == "custom_nodes"]
    places = [Path(named).expanduser()] if named else [*around, Path.home() / "comfy" / "ComfyUI"]
    found = next((place for place in places if _is_checkout(place)), None)
    if found is None:
        raise ForcingError(f"--compare needs a ComfyUI checkout, and there is none in {places[0]}. Set COMFYUI_PATH to "
                           "one, or put this pack into the custom_nodes folder of a ComfyUI.")
    return found.resolve()


def load_compare(repository: Path = REPOSITORY) -> Compare:
    """`compare` of nodes/compare.py. Raises ForcingError without that file or without ComfyUI."""
    if not (repository / "nodes" / "compare.py").is_file():
        raise ForcingError("--compare needs nodes/compare.py, which is not part of a pip installation. Run the command "
                           "in a checkout of the pack.")
    host = str(find_comfyui(repository))
    # first on the path: the checkout's module `nodes`, not a folder `nodes` of the working directory
    sys.path[:] = [host, *(entry for entry in sys.path if entry != host)]
    package(PARENT, repository)
    package(f"{PARENT}.nodes", repository / "nodes")
    try:
        return importlib.import_module(f"{PARENT}.nodes.compare").compare
    except ImportError as error:
        raise ForcingError(f"ComfyUI could not be loaded: {error}. Use the Python environment that ComfyUI runs in, "
                           "and ComfyUI 0.21 or later.") from error


def package(name: str, folder: Path) -> None:
    """Make `folder` importable as `name` without running its __init__.py."""
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package


def run_compare(cases: Sequence[Case], runs: int, progress: Callable[[str], None], compare: Compare, *how: str) -> list[dict]:
    """The rows of `compare([(frames, window), ...], runs, progress, *how)`, with at least frames, window, ratio,
    core_seconds and our_seconds. how: its clock and its model. Its errors are told as ours."""
    if runs < 1 or not cases:
        raise ForcingError(f"{runs} runs of {len(cases)} cases compare nothing. Use at least 1 of each.")
    try:
        return list(compare([(case.frames, case.window) for case in cases], runs, progress, *how))
    except ValueError as error:
        # loaded under the synthetic parent, the core exists twice, and so does its error class
        if type(error).__name__ == ForcingError.__name__:
            raise ForcingError(str(error)) from error
        raise
