"""Tensors and a text in one safetensors file that ends with a checksum of itself.

Layout, readable by every safetensors library: 8 bytes length of the header, the header (JSON: dtype, shape and place of
every tensor; the text is metadata), the tensors. The last tensor, "checksum", is the SHA-256 of all bytes before it. Files
are written one tensor at a time, so a store of many gigabytes is never copied as a whole.
"""
from __future__ import annotations

import hashlib
import json
import os
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .errors import ForcingError
from .files import sweep, whole

DTYPES = {"F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32, "F16": torch.float16,
          "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
KEY, CHECKSUM, DIGEST = "forcing.snapshot", "checksum", 32
LONGEST_HEADER = 64 << 20


def write(path: Path, text: str, tensors: dict[str, Tensor]) -> None:
    """Replace or make `path` in one go; tensors without numbers are left out. Raises ForcingError where it cannot be
    written to; the old file stays then."""
    tensors = {name: t for name, t in tensors.items() if t.numel()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # numbers at multiples of their size
    entries, at = {}, 0
    for name in order:
        size = tensors[name].nbytes
        entries[name] = _entry(NAMES[tensors[name].dtype], tensors[name].shape, at, at + size)
        at += size
    entries[CHECKSUM] = _entry("U8", (DIGEST,), at, at + DIGEST)
    header = json.dumps({"__metadata__": {KEY: text}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    sweep(path.parent, path.name.__eq__)
    with whole(path) as temporary, open(temporary, "wb") as file:
        digest = hashlib.sha256()
        for part in (len(header).to_bytes(8, "little"), header, *(_bytes_of(tensors[name]) for name in order)):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())


def read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The text and the tensors, in host memory. Raises ForcingError for a file that is cut, changed, or something else."""
    try:
        with open(path, "rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        raise ForcingError(f"There is no snapshot {path.name}. Choose one that exists.") from error
    except OSError as error:
        raise ForcingError(f"{path.name} was not read: {error.strerror or error}. Check the file.") from error
    except ForcingError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:  # of a header that is not ours
        raise _damaged() from error


def _read(file: BinaryIO, size: int) -> tuple[str, dict[str, Tensor]]:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if not 2 <= length <= min(LONGEST_HEADER, size - 8 - DIGEST):
        raise _damaged()
    raw = file.read(length)
    header = json.loads(raw)
    text = header.pop("__metadata__")[KEY]
    entries = sorted(header.items(), key=lambda entry: tuple(entry[1]["data_offsets"]))
    if not isinstance(text, str) or [name for name, _ in entries[-1:]] != [CHECKSUM]:
        raise _damaged()
    _check_places([entry for _, entry in entries], size - 8 - length)
    digest = hashlib.sha256(start + raw)
    tensors = {name: _tensor(file, entry, digest) for name, entry in entries[:-1]}
    if file.read(DIGEST + 1) != digest.digest():
        raise _damaged()
    return text, tensors


def _check_places(entries: list[dict], size: int) -> None:
    """Tensors without gaps, each as long as its shape says, that make up the rest of the file: no file can ask for more
    memory than it is long."""
    at = 0
    for entry in entries:
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        fits = len(shape) <= 8 and all(type(n) is int and n > 0 for n in (*shape, end)) and begin == at
        if not fits or end - begin != prod(shape) * DTYPES[entry["dtype"]].itemsize:
            raise _damaged()
        at = end
    if at != size or entries[-1]["shape"] != [DIGEST] or entries[-1]["dtype"] != "U8":
        raise _damaged()


def _tensor(file: BinaryIO, entry: dict, digest) -> Tensor:
    begin, end = entry["data_offsets"]
    data = torch.empty(end - begin, dtype=torch.uint8)
    buffer = memoryview(data.numpy())
    if file.readinto(buffer) != end - begin:
        raise _damaged()
    digest.update(buffer)
    return data.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def _bytes_of(t: Tensor) -> memoryview:
    return memoryview(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _entry(dtype: str, shape, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _damaged() -> ForcingError:
    return ForcingError("This file is no snapshot, or was cut or changed. Take an earlier or another snapshot.")
