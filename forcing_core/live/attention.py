"""Rotary positions and block-causal attention of LIVE.

A token of frame f sees all tokens of the frames 0..f of its window. There is no mask: every frame's queries are given the
keys up to its own, which is the same and lets every attention backend take part.

Axes: B batch, n tokens, H heads, d head_dim. Source: arXiv 2602.03747, public repo Junchao-cs/LIVE @20c82a9.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor

from .config import LiveConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]


@dataclass
class Context:
    """Keys (rotated) and values of the frames in front of a call, one [B, n, H, d] a layer; empty before they are computed.

    frames: how many those are; the call's own first frame stands at that position of the window.
    """

    frames: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def extended(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that the call sees in this layer."""
        if not self.frames:
            return k, v
        return torch.cat([self.keys[layer], k], dim=1), torch.cat([self.values[layer], v], dim=1)


def rotary(config: LiveConfig, first: int, frames: int, device) -> Rotary:
    """(cos, sin), each float32 [frames * tokens, 1, head_dim], of frames at positions first..first+frames-1."""
    rows, columns = config.grid
    axes = (torch.arange(first, first + frames), torch.arange(rows), torch.arange(columns))
    angles = []
    for place, channels in zip(torch.meshgrid(*axes, indexing="ij"), config.rope):
        rates = 1.0 / config.theta ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)
        angles.append(torch.outer(place.flatten().float(), rates).repeat_interleave(2, dim=1))
    angle = torch.cat(angles, dim=1).unsqueeze(1).to(device)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: Rotary) -> Tensor:
    """x [B, n, H, d] with neighbouring channels as pairs, turned in float32."""
    cos, sin = turn
    y = x.float()
    crossed = torch.stack([-y[..., 1::2], y[..., ::2]], dim=-1).flatten(3)
    return (y * cos + crossed * sin).to(x.dtype)


def block_causal(q: Tensor, keys: Tensor, values: Tensor, tokens: int, attend: Attend) -> Tensor:
    """[B, n, H, d] of queries of the newest frames of `tokens` each; keys and values may begin earlier."""
    before = keys.shape[1] - q.shape[1]
    ends = range(tokens, q.shape[1] + 1, tokens)
    return torch.cat([attend(q[:, end - tokens:end], keys[:, :before + end], values[:, :before + end]) for end in ends], dim=1)
