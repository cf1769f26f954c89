"""Where a stream's file goes, and what it says about itself."""
from __future__ import annotations

import json
import logging
from pathlib import Path

import folder_paths
from comfy.cli_args import args

from ..forcing_core.files import whole
from ..forcing_core.streaming.recorder import Recorder

log = logging.getLogger(__name__)
# inputs on the way from a stream to the text of its prompt, and those that hold one
WAYS, TEXTS = ("guider", "positive", "conditioning", "previous", "text"), ("text", "value", "string")


def stores_metadata() -> bool:
    """Whether ComfyUI was not told to store nothing."""
    return not args.disable_metadata


def metadata(hidden) -> dict:
    """What core's Save Video stores, unless ComfyUI was told to store nothing."""
    if not stores_metadata():
        return {}
    prompt = {} if hidden.prompt is None else {"prompt": json.dumps(hidden.prompt)}
    return {**(hidden.extra_pnginfo or {}), **prompt}


def new_file(prefix: str, height: int, width: int) -> tuple[Path, str]:
    """(path without suffix, subfolder) of a new file in the output folder."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), width, height)
    return Path(folder) / f"{name}_{counter:05}_", subfolder


def words_of(graph: dict | None, node: str | None) -> str:
    """Text of the prompt that a node of a prompt graph gets through its guider; "" where that is not plain to see."""
    graph, seen = graph or {}, set()
    while node in graph and node not in seen:
        seen.add(node)
        inputs = graph[node].get("inputs", {})
        plain = next((inputs[name] for name in TEXTS if isinstance(inputs.get(name), str)), None)
        if plain is not None:
            return plain
        link = next((inputs[name] for name in WAYS if isinstance(inputs.get(name), list) and inputs[name]), [None])
        node = str(link[0])
    return ""


def log_beside(path: Path, recorder: Recorder) -> None:
    """A log that has no room in the file."""
    place = path.with_suffix(".steering.json")
    with whole(place) as temporary:
        temporary.write_text(json.dumps(recorder.noted()), encoding="utf-8")
    log.info("The log of this stream is in %s: it is too long for the video's metadata.", place)
