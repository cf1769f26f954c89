"""Cross-attention keys and values of one prompt, computed once a run.

The network attends to all 512 rows, zero padding included: padding is zeroed before the text embedding and
is never masked.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .times import Times


def pad_rows(context: Tensor, rows: int = 512) -> Tensor:
    """[B, n, text_dim] -> [B, rows, text_dim] with zero rows at the end; longer input is cut."""
    missing = rows - context.shape[1]
    return context[:, :rows] if missing <= 0 else torch.nn.functional.pad(context, (0, 0, 0, missing))


def blended(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """(1 - weight) * a + weight * b of two prompts [B, n, text_dim], in the dtype of `a`. The shorter one is padded
    with zero rows, which is what the text encoder pads with."""
    rows = max(a.shape[1], b.shape[1])
    return torch.lerp(pad_rows(a, rows).float(), pad_rows(b, rows).float(), weight).to(a.dtype)


class TextState:
    """One prompt (or batch of prompts), [B, 512, text_dim] in the compute dtype.

    `embedded` is the prompt after `text_embedding`; `keys_values(layer, attention)` its cached projections. `times` is what
    the same weights make of noise levels, which is good for as long.
    """

    def __init__(self, context: Tensor):
        self.context = context
        self.times = Times()
        self._embedded: Tensor | None = None
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}

    def embedded(self, text_embedding: nn.Module) -> Tensor:
        if self._embedded is None:
            self._embedded = text_embedding(self.context)
        return self._embedded

    def keys_values(self, layer: int, attention: nn.Module, text_embedding: nn.Module) -> tuple[Tensor, Tensor]:
        if layer not in self._cache:
            context = self.embedded(text_embedding)
            self._cache[layer] = attention.norm_k(attention.k(context)), attention.v(context)
        return self._cache[layer]

    def knows(self, layer: int) -> bool:
        """Whether the keys and values of a layer are there already."""
        return layer in self._cache

    def mean_key(self, layer: int, attention: nn.Module, text_embedding: nn.Module, heads: int) -> Tensor:
        """[B, H, d] float32: mean of the layer's keys over the rows that are not padding, or over all where all are."""
        keys, _ = self.keys_values(layer, attention, text_embedding)
        real = self.context.ne(0).any(dim=2)
        weight = (real | ~real.any(dim=1, keepdim=True)).float()
        weight = weight / weight.sum(dim=1, keepdim=True)
        return torch.einsum("br,brd->bd", weight, keys.float()).unflatten(1, (heads, -1))
