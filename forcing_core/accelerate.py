"""What a device can be asked to do beside the plain forward. Everything on a card is off unless it is asked for; on a CPU its
kernels are always used, since there is nothing to set up and they were measured to be faster.

    kernels   fused Triton kernels (`kernels/`): less memory traffic between matrix products; rounds a little differently
    graphs    CUDA graphs (`graphs.py`): no time lost to launching kernels; the same numbers
    prefetch  weights that a host pages in come a block at a time, while the block before works; only a host can do that
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from .errors import ForcingError
from .graphs import Graphs, graphs_for
from .kernels import KINDS, PLAIN, Kernels, Ordinary, kernels_for, ordinary
from .wan import Ops
from .wan.model import Head

ours = partial(ordinary, kinds=KINDS | {Head})  # which modules of our own network are nothing but their numbers


@dataclass(frozen=True)
class Acceleration:
    kernels: bool = False
    graphs: bool = False
    prefetch: bool = False


WAYS = {"off": Acceleration(), "kernels": Acceleration(kernels=True), "graphs": Acceleration(graphs=True),
        "prefetch": Acceleration(prefetch=True), "all": Acceleration(True, True, True)}


def way(name: str) -> Acceleration:
    """The row of this name, or ForcingError naming the known ones."""
    if name not in WAYS:
        raise ForcingError(f"The acceleration {name!r} is not known. Use one of {', '.join(WAYS)}.")
    return WAYS[name]


def kernels_of(name: str, device: torch.device | str, modules: Ordinary = ours) -> Kernels:
    """The kernels that the device can run, if this way has them, and on a CPU in every way. Not for what is compiled, where
    the compiler makes kernels of its own. modules: which may be taken apart; ask again when modules were changed."""
    return kernels_for(device, modules) if way(name).kernels or torch.device(device).type == "cpu" else PLAIN


def faster(ops: Ops, name: str, device: torch.device | str) -> Ops:
    """The operations with those kernels."""
    return replace(ops, kernels=kernels_of(name, device))


def graphs_of(name: str, device: torch.device | str) -> Graphs | None:
    """What stands for `wan.forward`, if this way has graphs and the device can record them."""
    return graphs_for(device) if way(name).graphs else None
