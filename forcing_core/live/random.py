"""Random weights of LIVE's shape, for tests, for recording golden cases and for a first look without a download.

Uniform numbers of a CPU generator are the same bits on every machine, which normal ones are not; so a case need not hold
the weights it was recorded with.
"""
from __future__ import annotations

import math
from typing import Mapping

import torch
from torch import Tensor, nn

MODULATION = 0.3


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """float32 weights under these names, drawn in the order of the names: unit gain for matrices and convolutions, scales of
    norms around 1, small biases. Modulation is weaker, as in trained networks; at unit gain the rounding of norms to float16
    makes the network answer to the last bit of its input."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _draw(name, shapes[name], generator) for name in sorted(shapes)}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn = 2 * torch.rand(shape, generator=generator) - 1
    if len(shape) > 1:
        gain = MODULATION if "modulation" in name else 1.0
        return drawn * gain * math.sqrt(3 / math.prod(shape[1:]))
    return 0.1 * drawn + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def fill(net: nn.Module, seed: int) -> nn.Module:
    """The same network with weights of `random_state`, frozen."""
    net.load_state_dict(random_state({name: tuple(t.shape) for name, t in net.state_dict().items()}, seed))
    return net.eval().requires_grad_(False)
