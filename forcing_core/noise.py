"""Where every random number of a rollout comes from.

A rollout asks for noise by (block, step) and never touches a global generator. `Noise` is the contract:

    initial(block)          -> [B, C, n, H, W] noise that block starts from
    renoise(block, step)    -> [B, C, n, H, W] fresh noise mixed in after `step` (0 is the noisiest step)

`block` is a `plan.Block`. Tensors are float32 on the device of the rollout.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .plan import Block

_MASK = (1 << 64) - 1
INITIAL = 0


class Noise(Protocol):
    def initial(self, block: Block) -> Tensor: ...

    def renoise(self, block: Block, step: int) -> Tensor: ...


def mix(*words: int) -> int:
    """One 63-bit seed from integers (splitmix64 finaliser), so that neighbouring keys share no stream."""
    state = 0
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class BlockNoise:
    """Noise of (seed, block, step), drawn on CPU: equal on every device, and a longer video has the
    shorter one as its prefix.

    channels: (B, C); size: (H, W) of the latent.
    """

    seed: int
    channels: tuple[int, int]
    size: tuple[int, int]
    device: torch.device | str = "cpu"

    def _draw(self, block: Block, step: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(mix(self.seed, block.index, step))
        shape = (*self.channels, block.frames, *self.size)
        return torch.randn(shape, generator=generator).to(self.device)

    def initial(self, block: Block) -> Tensor:
        return self._draw(block, INITIAL)

    def renoise(self, block: Block, step: int) -> Tensor:
        return self._draw(block, step + 1)


@dataclass
class ReferenceNoise:
    """The official pipelines' order: one draw for the whole clip, then one draw a step from the same generator.

    Not prefix-stable, and the numbers depend on device and dtype; for comparing with a reference run.
    Public repo guandeh17/Self-Forcing: [B, F, C, H, W] first, then [B*n, C, H, W] a step.
    """

    seed: int
    channels: tuple[int, int]
    size: tuple[int, int]
    frames: int
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    _generator: torch.Generator = field(init=False, repr=False)
    _clip: Tensor = field(init=False, repr=False)
    _start: int | None = field(init=False, default=None, repr=False)

    def __post_init__(self):
        b, c = self.channels
        self._generator = torch.Generator(self.device).manual_seed(self.seed)
        self._clip = self._randn(b, self.frames, c, *self.size)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=self.dtype)

    def initial(self, block: Block) -> Tensor:
        if self._start is None:  # given frames have no slot in the clip's noise
            self._start = block.first
        first = block.first - self._start
        return self._clip[:, first:first + block.frames].transpose(1, 2).float()

    def renoise(self, block: Block, step: int) -> Tensor:
        b, c = self.channels
        return self._randn(b * block.frames, c, *self.size).unflatten(0, (b, -1)).transpose(1, 2).float()


@dataclass(frozen=True)
class CoreNoise:
    """The numbers of ComfyUI's own AR sampler: the graph's NOISE for the start, then a generator seeded with
    seed + 1000*block + step on the latent's device. For bit comparisons and for reusing old seeds.

    clip: [B, C, F, H, W], the noise that the graph made for the whole latent.
    """

    seed: int
    clip: Tensor

    def initial(self, block: Block) -> Tensor:
        return self.clip[:, :, block.first:block.first + block.frames]

    def renoise(self, block: Block, step: int) -> Tensor:
        generator = torch.Generator(self.clip.device).manual_seed(self.seed + block.index * 1000 + step)
        b, c, _, h, w = self.clip.shape
        return torch.randn((b, c, block.frames, h, w), generator=generator, device=self.clip.device,
                           dtype=self.clip.dtype)
