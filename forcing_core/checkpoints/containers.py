"""Open a weights file of any published form and pick one set of tensors out of it.

A container is what the file puts around the tensors: `generator`, `generator_ema` and the like in a pickle, or
nothing ("flat"). Pickles are read with weights_only, so no code of a downloaded file ever runs, and mapped
rather than read, so that only the tensors in use take memory.
"""
from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ForcingError
from ..presets import FLAT

log = logging.getLogger(__name__)

MODEL_KEYS = ("generator_ema", "generator", "model")
LORA_KEYS = ("generator_lora",)
CRITIC_KEYS = ("critic", "critic_ema", "critic_lora")

DOWNLOAD_AGAIN = "Download it again, for example with `python -m forcing_core fetch`."
# Starts of files that are no weights at all -> what they are and what to do.
IMPOSTORS = (
    (b"<", f"is a web page, not weights: the download led to a login or licence page. {DOWNLOAD_AGAIN}"),
    (b"version https://git-lfs", f"is a Git LFS pointer, not the weights themselves. {DOWNLOAD_AGAIN}"),
    (b"{", f"is a JSON text, not weights: the download led to an error message. {DOWNLOAD_AGAIN}"),
    (b"GGUF", "is a GGUF file, which this pack does not read. Use the .pt or .safetensors file."),
)
DAMAGED = f"is damaged or was not downloaded completely. {DOWNLOAD_AGAIN}"


@dataclass(frozen=True)
class Container:
    """Tensors of one container of a file, names as in the file.

    key: name of the container, "flat" where there is none. keys: all containers found in the file.
    metadata: text metadata of a safetensors file.
    """

    path: Path
    key: str
    keys: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_model(path, prefer: str | None = None, key: str | None = None) -> Container:
    """The model of a file: container `key` if given, else `prefer` if present, else the usual order.

    Raises ForcingError for files that are empty, damaged, unsafe, no weights, or hold a critic or a LoRA only.
    """
    path, groups, metadata = _read(path)
    order = ((prefer,) if prefer else ()) + MODEL_KEYS + (FLAT,)
    return _pick(path, groups, metadata, order, key, _why_no_model)


def open_lora(path, key: str | None = None) -> Container:
    """The LoRA of a file, by default the generator's. Raises ForcingError as open_model does."""
    path, groups, metadata = _read(path)
    return _pick(path, groups, metadata, LORA_KEYS + (FLAT,), key, _why_no_lora)


def _pick(path, groups, metadata, order, key, why_not) -> Container:
    chosen = key or next((k for k in order if k in groups), None)
    if chosen is None or chosen in CRITIC_KEYS:
        raise ForcingError(f"{path.name} {why_not(groups)}" if key is None else
                           f"{key} judges videos during training and cannot make any. Choose a generator.")
    if chosen not in groups:
        raise ForcingError(f"{path.name} holds no weights under {key!r}. Choose one of {', '.join(groups)}.")
    return Container(path, chosen, tuple(groups), groups[chosen], metadata)


def _why_no_model(groups) -> str:
    if set(groups) & set(LORA_KEYS):
        return "holds a LoRA, not a model. Load the base model, and give this file as its LoRA."
    if set(groups) & set(CRITIC_KEYS):
        return ("holds a critic only, a network that judges videos during training and cannot make any. "
                "Use the file with generator or generator_ema.")
    return f"holds no model ({_listed(groups)}). {DOWNLOAD_AGAIN}"


def _why_no_lora(groups) -> str:
    if set(groups) & set(MODEL_KEYS):
        return "holds a model, not a LoRA. Give it as the checkpoint."
    if set(groups) & set(CRITIC_KEYS):
        return "holds the LoRA of a critic only, which cannot make videos. Use the file with generator_lora."
    return f"holds no LoRA ({_listed(groups)}). {DOWNLOAD_AGAIN}"


def _listed(groups) -> str:
    return "found: " + ", ".join(groups) if groups else "no tensors in it"


def _read(path) -> tuple[Path, dict[str, Mapping[str, Tensor]], dict[str, str]]:
    path = Path(path)
    try:
        raw, metadata = READERS[_kind(path)](path)
    except OSError as error:
        raise ForcingError(f"{path} cannot be read ({error.strerror or error}). "
                           "Check the disk and your permissions.") from error
    return path, _groups(raw), metadata


def _kind(path: Path) -> str:
    """Form of the file by its first bytes: extensions are renamed too often to be trusted."""
    if not path.is_file():
        raise ForcingError(f"There is no file {path}. Check the folder and the spelling.")
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        raise ForcingError(f"{path.name} is empty. {DOWNLOAD_AGAIN}")
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    for start, what in IMPOSTORS:
        if head.lstrip().startswith(start):
            raise ForcingError(f"{path.name} {what}")
    raise ForcingError(f"{path.name} is neither a PyTorch nor a safetensors file, or {DAMAGED}")


def _safetensors(path: Path) -> tuple[Mapping, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ForcingError(f"{path.name} {DAMAGED}") from error


def _torch(path: Path, mmap: bool) -> tuple[Mapping, dict[str, str]]:
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # damaged pickle bytes can raise nearly anything
        raise ForcingError(f"{path.name} {_refusal(error)}") from error
    if not isinstance(raw, Mapping):
        raise ForcingError(f"{path.name} holds a {type(raw).__name__}, not named tensors. {DOWNLOAD_AGAIN}")
    return raw, {}


def _refusal(error: Exception) -> str:
    """Tells a pickle with foreign objects (refused) from a damaged one."""
    unsafe = re.search(r"(?:GLOBAL|class|function) ([\w.]+) was not an allowed", str(error))
    if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
        what = f" ({unsafe[1]})" if unsafe else ""
        return (f"contains Python objects besides tensors{what}, which could run code when opened. "
                "Use the authors' original file, or a safetensors version of it.")
    return DAMAGED


READERS = {
    "safetensors": _safetensors,
    "zip": lambda path: _torch(path, mmap=True),
    "pickle": lambda path: _torch(path, mmap=False),  # files from before PyTorch 1.6 cannot be mapped
}


def _groups(raw: Mapping) -> dict[str, Mapping[str, Tensor]]:
    """Containers of a file in its own order; tensors at the top level are the container "flat"."""
    flat = {name: value for name, value in raw.items() if isinstance(value, Tensor)}
    groups = {FLAT: flat} if flat else {}
    for name, value in raw.items():
        if isinstance(value, Mapping):
            tensors = {key: item for key, item in value.items() if isinstance(item, Tensor)}
            if tensors:
                groups[str(name)] = tensors
    log.debug("containers: %s", {name: len(tensors) for name, tensors in groups.items()})
    return groups
