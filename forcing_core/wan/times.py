"""What a network makes of noise levels, once for every set of levels that a rollout comes back to.

A rollout goes through the same few levels block after block. The timestep embedding, its projection and its sum with every
layer's modulation depend on nothing else, so they are kept. Where all frames of a forward stand at one level, as in a block
rollout, one row does for all of them, and nothing has to be told frame from frame.
"""
from __future__ import annotations

from collections import OrderedDict
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..schedule import Level

KEPT = 12  # sets of levels: more than few-step systems have; what comes round later is computed again
HEAD = -1  # beside the numbers of layers
Parameter = Callable[[Tensor, Tensor], Tensor]


def timestep_embedding(timesteps: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """[m] timesteps (0..1000) -> [m, dim] of [cos | sin] with angles computed in `dtype`."""
    half = dim // 2
    exponent = -torch.arange(half, dtype=dtype, device=timesteps.device).div(half)
    angle = torch.outer(timesteps.to(dtype), torch.pow(10000, exponent))
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Embedded:
    """One set of levels. timesteps: float32 [B, F]. alike: all frames are known to stand at the same level.

    After `begin`: e [B, F, D], as the head wants it, and projected [B, F, 6, D], as blocks want it.
    """

    def __init__(self, timesteps: Tensor, alike: bool = False):
        self.timesteps, self.alike = timesteps, alike
        self.e = self.projected = None
        self._layers: dict[int, tuple[Tensor, ...]] = {}

    def begin(self, net: Any, dtype: torch.dtype, sinusoid: torch.dtype) -> "Embedded":
        """Embed for a network in this compute dtype. sinusoid: dtype of the angles."""
        if self.e is None or self.e.dtype != dtype:
            rows = timestep_embedding(self.timesteps.flatten(), net.freq_dim, sinusoid).to(dtype)
            self.e = net.time_embedding(rows).unflatten(0, self.timesteps.shape)
            self.projected = net.time_projection(self.e).unflatten(2, (6, -1))
            self._layers.clear()
        return self

    def modulation(self, index: int, block: nn.Module, like: Tensor, parameter: Parameter) -> tuple[Tensor, ...]:
        """shift, factor, gate (self-attention), shift, factor, gate (ffn) of layer `index`: [B, F, 1, D] each, [B, 1, D]
        where all frames are `alike`. The network has scales; a factor is 1 + scale."""
        if index not in self._layers:
            shift, scale, gate, shift2, scale2, gate2 = self._rows(parameter(block.modulation, like), self.projected)
            self._layers[index] = shift, 1 + scale, gate, shift2, 1 + scale2, gate2
        return self._layers[index]

    def last_modulation(self, head: nn.Module, like: Tensor, parameter: Parameter, leading: int) -> tuple[Tensor, Tensor]:
        """shift, factor of the head, the same way, of all frames but the first `leading`."""
        if HEAD not in self._layers:
            shift, scale = self._rows(parameter(head.modulation, like), self.e.unsqueeze(2))
            self._layers[HEAD] = shift, 1 + scale
        shift, factor = self._layers[HEAD]
        return (shift, factor) if self.alike else (shift[:, leading:], factor[:, leading:])

    def _rows(self, raw: Tensor, of: Tensor) -> Iterator[Tensor]:
        """raw [1, k, D] + of [B, F, 1 or k, D], one by one."""
        sums = raw + of[:, 0] if self.alike else raw.unsqueeze(0) + of
        return (m.unsqueeze(-2) for m in sums.unbind(-2))

    def ending(self, leading: int) -> Tensor:
        """e of all frames but the first `leading`, for the head; of one of them where they are `alike`."""
        return self.e[:, :1] if self.alike else self.e[:, leading:]


class Times:
    """The sets of levels that one set of weights was told. Good for as long as the weights stay."""

    def __init__(self):
        self._known: OrderedDict[tuple, Embedded] = OrderedDict()

    def steps(self, levels: Sequence[Level], x: Tensor) -> Tensor:
        """float32 [B, F]: the timesteps of x [B, C, F, H, W]. The same tensor for the same levels, and `of` knows it."""
        values = tuple(level.timestep for level in levels)
        key = values, x.shape[0], x.device
        if key not in self._known:
            timesteps = x.new_tensor(values, dtype=torch.float32).expand(x.shape[0], -1)
            self._known[key] = Embedded(timesteps, len(set(values)) == 1)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key].timesteps

    def of(self, timesteps: Tensor) -> Embedded:
        """What is known of a tensor from `steps`. Nothing is known of any other, nor where gradients are wanted: what was
        kept carries none."""
        if not torch.is_grad_enabled():
            for known in self._known.values():
                if known.timesteps is timesteps:
                    return known
        return Embedded(timesteps)
