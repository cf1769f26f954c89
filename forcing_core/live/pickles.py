"""Tensors out of a pickle that also holds other objects, without running any of its code.

Lightning checkpoints keep the whole training run: configurations, optimizers, callbacks. PyTorch's own safe reader refuses
them for that. Here every foreign class is replaced by one that takes anything and does nothing, so only tensors come out.
"""
from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any, Mapping

import torch

from ..checkpoints.containers import DAMAGED
from ..errors import ForcingError

# The only callables of a file that are taken at their word: they make tensors and dictionaries.
ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
}
STORAGES = frozenset(name for name in dir(torch) if name.endswith("Storage"))


class Inert:
    """Stands for an object of a foreign class."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass

    def add(self, item):
        pass

    def __hash__(self):
        return id(self)


class Unpickler(pickle.Unpickler):
    """A `pickle.Unpickler` that finds no classes but those of ALLOWED and torch's storages and dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name in STORAGES or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        return ALLOWED.get((module, name), Inert)


def _module() -> ModuleType:
    """What `torch.load` wants in place of `pickle`."""
    module = ModuleType("tensors_only")
    module.Unpickler = Unpickler
    return module


def _is_program(path: Path) -> bool:
    """PyTorch would hand such a file to its own interpreter."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False  # the reader will say so


def read_pickle(path: Path) -> Mapping[str, Any]:
    """The top level of a checkpoint in PyTorch's zip format, mapped, so that unused tensors take no memory. Raises
    ForcingError for damaged files and older formats."""
    with path.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            raise ForcingError(f"{path.name} is no checkpoint in PyTorch's zip format, or {DAMAGED}")
    if _is_program(path):
        raise ForcingError(f"{path.name} is a compiled program (TorchScript), which is not run here. Use the authors' "
                           "original file.")
    try:
        raw = torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=_module())
    except MemoryError:
        raise
    except Exception as error:  # damaged pickle bytes can raise nearly anything
        raise ForcingError(f"{path.name} {DAMAGED}") from error
    if not isinstance(raw, Mapping):
        raise ForcingError(f"{path.name} holds a {type(raw).__name__}, not named tensors. Use the authors' original file.")
    return raw
