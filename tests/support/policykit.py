"""Whole videos under a cache policy, on a tiny network, with noise and prompts that belong to a sample, not to a batch."""
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.memory import Memory, make_memory
from forcing_pack.forcing_core.plan import Block, layout
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.schedule import levels
from forcing_testkit import forcing_corekit as core
from torch import Tensor

SIZE, GRID, TOKENS = (4, 6), (2, 3), 6
LEVELS = levels([1000, 500], 5.0)


@functools.cache
def network():
    return core.network()


@dataclass
class SampleNoise:
    """Noise of samples by their numbers: [B, C, F, H, W], the same in every batch and for every length of video."""

    samples: tuple[int, ...]
    frames: int

    def __post_init__(self):
        self.draws = torch.stack([
            torch.randn(self.frames, len(LEVELS), core.CHANNELS, *SIZE, generator=torch.Generator().manual_seed(500 + s))
            for s in self.samples])

    def _of(self, block: Block, step: int) -> Tensor:
        return self.draws[:, block.first:block.end, step].transpose(1, 2)

    def initial(self, block: Block) -> Tensor:
        return self._of(block, 0)

    def renoise(self, block: Block, step: int) -> Tensor:
        return self._of(block, step + 1)


def empty(options, frames: int) -> Memory:
    net = network()
    return make_memory(options, frames, layers=net.config.layers, grid=GRID, head_dim=core.HEAD_DIM, device="cpu",
                       heads=net.config.heads)


def video(options, frames: int, *, samples=(0,), into: Memory | None = None, noise=None, seen=None) -> Tensor:
    """x0 [B, C, frames, H, W]. into: the memory to use; noise: instead of SampleNoise; seen: called with the memory
    after every block."""
    memory = into or empty(options, frames)
    prompts = torch.cat([core.prompts(seed=sample) for sample in samples])
    denoiser = NetworkDenoiser(network(), [Condition([prompts], memory)])
    parts = []
    for _, x0 in block_rollout(denoiser, layout(frames, options.block), LEVELS, noise or SampleNoise(samples, frames),
                               block=options.block):
        parts.append(x0)
        if seen is not None:
            seen(memory)
    return torch.cat(parts, dim=2)


def attended(now, layer: int, q: Tensor, k: Tensor, v: Tensor, attention=None) -> Tensor:
    """What the network makes of one layer of a pass: exchange, then attention."""
    attention = attention or core.Ops().attention
    q, keys, values = now.exchange(layer, q, k, v)
    attend = getattr(now, "attend", None)
    return attend(layer, q, keys, values, attention) if attend else attention(q, keys, values)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, n, H, d] in float64; bias [B or 1, m, H or 1] is added to the logits."""
    logits = torch.einsum("bnhd,bmhd->bnhm", q.double(), k.double()) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.double().transpose(1, 2)[:, None]
    return torch.einsum("bnhm,bmhd->bnhd", logits.softmax(dim=-1), v.double()).float()
