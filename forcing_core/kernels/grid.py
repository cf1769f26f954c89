"""What the Triton kernels of this folder have in common: where they are launched, and with how many threads."""
from __future__ import annotations

from contextlib import nullcontext
from typing import ContextManager

import torch
from torch import Tensor


def warps(block: int) -> int:
    """Warps of one program over a row of so many numbers: 4 to 16, so that a thread holds 8 to 16 of them."""
    return min(16, max(4, block // 256))


def rows(x: Tensor) -> ContextManager:
    """Launch on the device of x, which need not be the current one. (The interpreter has none.)"""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
