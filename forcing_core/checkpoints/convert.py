"""Write a checkpoint as one plain safetensors file that ComfyUI's own loader opens.

Every floating-point weight gets the same dtype, as in the Comfy repackages: norms and modulation included, which
the published pipelines also run in bfloat16. float32 keeps the file exact.
The file is written tensor by tensor, so it takes no more memory than its largest weight.
"""
from __future__ import annotations

import ctypes
import errno
import json
import logging
import math
import os
import struct
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import ForcingError
from .identify import META_KEY, META_LORA, META_PRESET, META_SOURCE, Loaded, open_lazily
from .lora import Merged

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Names of the safetensors format for what a checkpoint of this family may hold.
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
         torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL"}
CAUSAL_AR = json.dumps({"transformer": {"causal_ar": True}})

Progress = Callable[[int, int], None]


def convert(source, target, *, preset: str | None = None, key: str | None = None, lora=None, strength: float = 1.0,
            dtype: str = "bf16", causal_ar: bool = False, overwrite: bool = False,
            progress: Progress | None = None) -> Loaded:
    """Convert `source` to the safetensors file `target`; returns what was loaded, with its report.

    dtype: "bf16", "fp16" or "fp32". causal_ar: mark the file for ComfyUI's own autoregressive sampler (the
    mark is not needed by this pack). progress(done, total): called with bytes written.
    `target` appears only when it is complete. Raises ForcingError; leaves nothing behind on any error.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target, dtype, overwrite)
    loaded = open_lazily(source, preset, key, lora, strength)
    metadata = {"format": "pt", META_SOURCE: source.name, META_KEY: loaded.key}
    if loaded.preset_name:
        metadata[META_PRESET] = loaded.preset_name
    if loaded.loras:
        metadata[META_LORA] = json.dumps(loaded.loras)
    if causal_ar:
        metadata["config"] = CAUSAL_AR
    write_safetensors(loaded.state_dict, target, DTYPES[dtype], metadata, overwrite=overwrite, progress=progress)
    log.info("wrote %s from %s", target, source)
    return loaded


def write_safetensors(tensors: Mapping[str, Tensor], target, dtype: torch.dtype | None = None,
                      metadata: Mapping[str, str] | None = None, *, overwrite: bool = False,
                      progress: Progress | None = None) -> None:
    """Write `tensors` (asked for one by one, in order) to `target`, atomically.

    dtype: for floating-point tensors, None keeps each one's own.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise ForcingError(f"{target} exists already. Choose another name, or ask for it to be overwritten.")
    # In the target's own folder: os.replace is atomic only within one file system.
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            _write(stream, tensors, dtype, dict(metadata or {}), progress)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise ForcingError(f"{target} could not be written: {_why(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)  # after the replacement there is none


def _check_target(source: Path, target: Path, dtype: str, overwrite: bool) -> None:
    if dtype not in DTYPES:
        raise ForcingError(f"{dtype!r} is not a dtype to convert to. Choose one of {', '.join(DTYPES)}.")
    if target.suffix != ".safetensors":
        raise ForcingError(f"{target.name} does not end with .safetensors. Choose a name that does.")
    if target.exists() and source.exists() and target.samefile(source):
        raise ForcingError(f"{target} is the source itself. Choose another name for the result.")
    if target.exists() and not overwrite:
        raise ForcingError(f"{target} exists already. Choose another name, or ask for it to be overwritten.")


def _write(stream: BinaryIO, tensors: Mapping[str, Tensor], dtype, metadata: dict, progress) -> None:
    if sys.byteorder != "little":
        raise ForcingError("This machine is big-endian, and safetensors files are not. Convert on another one.")
    # A lazily merged state dict would compute every weight just to tell its shape.
    header, total = _header(tensors.base if isinstance(tensors, Merged) else tensors, dtype, metadata)
    stream.write(struct.pack("<Q", len(header)))
    stream.write(header)
    done = 0
    for name in tensors:
        tensor = _cast(name, tensors[name], dtype)
        if tensor.numel():
            stream.write(memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())))
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)


def _header(tensors: Mapping[str, Tensor], dtype, metadata: dict) -> tuple[bytes, int]:
    entries, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name in tensors:
        tensor = tensors[name]
        stored = _stored(tensor, dtype)
        if stored not in CODES:
            raise ForcingError(f"{name} has the dtype {stored}, which is not converted. Use the original file.")
        size = math.prod(tensor.shape) * stored.itemsize
        entries[name] = {"dtype": CODES[stored], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), offset  # the data starts aligned, as the format recommends


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = tensor.to("cpu", _stored(tensor, dtype)).contiguous()
    if cast.dtype is torch.float16 and not cast.isfinite().all() and tensor.isfinite().all():
        raise ForcingError(f"{name} has values too large for fp16. Convert to bf16 or fp32.")
    return cast


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _why(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full. Free some space (a 1.3B model takes 2.8 GB in bf16), or choose another disk."
    if isinstance(error, PermissionError):
        return "the folder may not be written to. Choose another one, or change its permissions."
    return f"{error.strerror or error}. Choose another folder."
