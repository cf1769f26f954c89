"""One forward over a whole clip under a dense mask: the training half of every causal model of the family.

Axis legend: B batch, F latent frame, S tokens a frame, n = F*S tokens. Masks are bool, True = visible, first per
frame [F, F] and then per token [n, n]. Positions are temporal RoPE positions, one per frame.

Sources: arXiv 2506.08009 (Self Forcing), 2412.07772 (CausVid), 2602.02214 (Causal Forcing); masks as in the public
repo guandeh17/Self-Forcing.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import layout
from ..rope import Rope, rotate
from ..wan import Ops, TextState, WanModel, forward

PLAIN = Ops()


def block_ends(frames: int, block: int, independent_first: bool = False) -> Tensor:
    """End frame of the block of every frame, [F]."""
    blocks = layout(frames, block, independent_first=independent_first)
    return torch.tensor([b.end for b in blocks for _ in range(b.frames)])


def block_causal(frames: int, block: int, *, window: int | None = None, sink: int = 0,
                 independent_first: bool = False) -> Tensor:
    """[F, F]: a frame sees its own block, and everything before it that is in the window or a sink.

    Diffusion forcing: all frames are noisy, each block at a level of its own.
    """
    ends = block_ends(frames, block, independent_first)[:, None]
    key = torch.arange(frames)[None]
    visible = key < ends
    if window is not None:
        visible &= (key < sink) | (key >= ends - (window - sink))
    return visible


def teacher_forcing(frames: int, block: int, *, window: int | None = None, sink: int = 0,
                    independent_first: bool = False) -> Tensor:
    """[2F, 2F] for the sequence [clean | noisy]: a clean frame sees clean blocks up to its own; a noisy frame
    sees clean blocks before its own and its own noisy block. Both halves stand at the same positions."""
    causal = block_causal(frames, block, window=window, sink=sink, independent_first=independent_first)
    ends = block_ends(frames, block, independent_first)
    own = ends[:, None] == ends[None]
    nothing = torch.zeros_like(own)
    return torch.cat([torch.cat([causal, nothing], 1), torch.cat([causal & ~own, own], 1)])


def per_token(mask: Tensor, tokens: int) -> Tensor:
    """A mask per frame to one per token."""
    return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


class WholeClip:
    """The `Exchange` of a parallel forward: nothing is stored, everything stands at its position."""

    silent = False

    def __init__(self, rope: Rope, positions: Sequence[int]):
        self._table = rope.table(positions)

    def exchange(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return rotate(q, self._table), rotate(k, self._table), v


def masked(mask: Tensor):
    """Attention [B, n, H, D] under a mask [n, n]."""
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return attend


def parallel_velocity(net: WanModel, x: Tensor, timesteps: Tensor, text: TextState, mask: Tensor, *,
                      positions: Sequence[int] | None = None, ops: Ops = PLAIN) -> Tensor:
    """Velocity [B, C, F, h, w] of all frames at once.

    x: [B, C, F, h, w]; timesteps: [B, F], 0..1000; mask: per frame [F, F]. positions: 0..F-1 by default.
    """
    grid = x.shape[3] // net.patch_size[1], x.shape[4] // net.patch_size[2]
    rope = Rope(grid, net.config.dim // net.config.heads, x.device)
    clip = WholeClip(rope, range(x.shape[2]) if positions is None else positions)
    dense = masked(per_token(mask, grid[0] * grid[1]).to(x.device))

    def cross(layer, block, y, state, _, owner):  # the prompt is never masked
        return ops.cross_attention(layer, block, y, state, ops, owner)

    return forward(net, x, timesteps, text, clip, replace(ops, attention=dense, cross_attention=cross))


def teacher_forced_velocity(net: WanModel, clean: Tensor, noisy: Tensor, timesteps: Tensor, text: TextState,
                            mask: Tensor, *, clean_timesteps: Tensor | None = None, ops: Ops = PLAIN) -> Tensor:
    """Velocity of the noisy half of [clean | noisy]; each half [B, C, F, h, w], timesteps [B, F], mask [2F, 2F]."""
    frames = clean.shape[2]
    before = torch.zeros_like(timesteps) if clean_timesteps is None else clean_timesteps
    both = torch.cat([clean, noisy], 2), torch.cat([before, timesteps], 1)
    out = parallel_velocity(net, *both, text, mask, positions=[*range(frames)] * 2, ops=ops)
    return out[:, :, frames:]
