"""The one seam through which every attention of the pack goes.

No mask ever: what a query may see is decided by slicing the store, so nothing can be dropped by a kernel that
ignores masks (SageAttention does). Kernels that write to their keys get a copy (SageAttention 1.x subtracts
the key mean in place, which would corrupt the store block by block).
"""
from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from typing import Callable

import torch.nn.functional as F
from torch import Tensor

from .errors import ForcingError


@dataclass(frozen=True)
class Backend:
    """kernel: (q, k, v), each [B, n, H, D], -> [B, n, H, D]. mutates: it writes to the k it is given."""

    kernel: Callable[[Tensor, Tensor, Tensor], Tensor]
    mutates: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.kernel(q, k.clone() if self.mutates else k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def sage_mutates_keys() -> bool:
    """Whether the installed SageAttention writes to its keys (every 1.x release does)."""
    try:
        return int(metadata.version("sageattention").split(".")[0]) < 2
    except metadata.PackageNotFoundError:  # a build without metadata: a copy too many is better than a lost store
        return True


def _sage_backend() -> Backend:
    if importlib.util.find_spec("sageattention") is None:
        raise ForcingError("SageAttention is not installed. Install it with 'pip install sageattention' "
                           "(NVIDIA GPU and Triton needed), or use the attention backend 'sdpa'.")
    from sageattention import sageattn  # optional CUDA package, present only where the user installed it

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sageattn(*(t.transpose(1, 2).contiguous() for t in (q, k, v)), tensor_layout="HND",
                        is_causal=False).transpose(1, 2)
    return Backend(kernel, mutates=sage_mutates_keys())


BACKENDS: dict[str, Callable[[], Backend]] = {
    "sdpa": lambda: Backend(_sdpa),
    "sage": _sage_backend,
}


def backend(name: str = "sdpa") -> Backend:
    """The backend of this name, or ForcingError naming the known ones."""
    if name not in BACKENDS:
        raise ForcingError(f"Attention backend {name!r} is not known. Use one of {', '.join(BACKENDS)}.")
    return BACKENDS[name]()
