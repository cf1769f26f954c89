"""Additive key biases through attention kernels that know neither masks nor biases.

softmax(s + b) v is softmax(s) [w v] / softmax(s) [w] with w = exp(b): the weights ride along as one more channel of
the values, which divides the others afterwards (the "bias as re-weighting" identity of arXiv 2609.19729; TempCache,
2602.01801, needs it with w = the number of merged tokens). Exact for any kernel that accepts a head EXTRA wider;
SageAttention does not (128 is its limit).

Axis legend: B batch, n queries, m keys, H heads, d head_dim.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .passes import Pass

EXTRA = 8  # channels added to a head: one for the weights, the rest up to a width that kernels take
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def biased_attention(attention: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k / sqrt(d) + bias) v, [B, n, H, d].

    attention: the kernel, as `wan.Ops.attention`; q [B, n, H, d], k and v [B, m, H, d]. bias: float32 [m], [B, m] or
    [B, m, H], natural logarithm of a key's weight; -inf removes the key, but at least one has to stay.
    """
    width = q.shape[-1]
    weight = _weights(bias)
    wide = F.pad(torch.cat([v * weight, weight.expand(*v.shape[:-1], 1)], dim=-1).type_as(v), (0, EXTRA - 1))
    scale = ((width + EXTRA) / width) ** 0.5  # the kernel divides by the root of the wider head
    out = attention(F.pad(q * scale, (0, EXTRA)), F.pad(k, (0, EXTRA)), wide).float()
    return (out[..., :width] / out[..., width:width + 1]).type_as(v)


def _weights(bias: Tensor) -> Tensor:
    """[B or 1, m, H or 1, 1], the largest weight of a row being 1: a common factor cancels, and half precision
    has no room for more."""
    bias = bias if bias.dim() > 1 else bias[None]
    bias = bias if bias.dim() > 2 else bias[..., None]
    return (bias.float() - bias.float().amax(dim=1, keepdim=True)).exp()[..., None]


def frame_bias(now: Pass, biases: Mapping[int, float], tokens: int) -> Tensor:
    """float32 [m] on the CPU: the bias of every key that `now.exchange` hands out, 0 for frames without one.

    biases: source frame -> bias; tokens: of a latent frame. `BiasedPass` is the usual way to add it.
    """
    return torch.tensor([biases.get(frame, 0.0) for frame in now.order]).repeat_interleave(tokens)


@dataclass
class BiasedPass(Pass):
    """A pass that adds a bias to the keys of some frames. biases: as in `frame_bias`; with none it is a plain pass."""

    biases: Mapping[int, float]

    def __post_init__(self):
        super().__post_init__()
        self._bias: Tensor | None = None

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        if not self.biases:
            return attention(q, keys, values)
        if self._bias is None:
            self._bias = frame_bias(self, self.biases, self.store.frame_tokens).to(q.device)
        return biased_attention(attention, q, keys, values, self._bias)
