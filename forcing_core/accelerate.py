"""What a card can be asked to do beside the plain forward. Everything is off unless it is asked for.

    kernels   fused Triton kernels (`kernels/`): less memory traffic between matrix products; rounds a little differently
    graphs    CUDA graphs (`graphs.py`): no time lost to launching kernels; the same numbers
    prefetch  weights that a host pages in come a block at a time, while the block before works; only a host can do that
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .errors import ForcingError
from .graphs import Graphs, graphs_for
from .kernels import Ordinary, kernels_for, ordinary
from .wan import Ops


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


def faster(ops: Ops, name: str, device: torch.device | str, norms: Ordinary = ordinary) -> Ops:
    """The operations with fused kernels, if this way has them and the device can run them. Not for what is compiled, where
    the compiler makes kernels of its own. norms: which may be taken apart."""
    return replace(ops, kernels=kernels_for(device, norms)) if way(name).kernels else ops


def graphs_of(name: str, device: torch.device | str) -> Graphs | None:
    """What stands for `wan.forward`, if this way has graphs and the device can record them."""
    return graphs_for(device) if way(name).graphs else None
