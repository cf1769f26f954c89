"""A store that knows what every frame it holds is about: the mean of its raw keys, for each head.

Of a policy that chooses frames by content (`policies/routing.py`, `policies/memflow.py`); a mean before any rotation favours
no frame for being near.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .saved import Saved, Tree
from .store import Store, store_bytes


def described_bytes(capacity: int, *, layers: int, dim: int, batch: int, **rest) -> int:
    """As `store.store_bytes`, with the float32 description of every frame."""
    return layers * capacity * batch * dim * 4 + store_bytes(layers=layers, capacity=capacity, dim=dim, batch=batch, **rest)


class DescribedStore(Store):
    """means: layer -> [B, capacity, H, D] float32."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.means: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(means.nbytes for means in self.means.values())

    def free(self) -> None:
        super().free()
        self.means.clear()

    def write(self, layer: int, frames: tuple[int, ...], raw: Tensor, roped: Tensor, v: Tensor) -> None:
        super().write(layer, frames, raw, roped, v)
        if layer not in self.means:
            self.means[layer] = self._no_means(raw)

    def describe(self, layer: int, frames: tuple[int, ...], raw: Tensor) -> None:
        """Note what these written frames are about; raw keys [B, len(frames) * tokens, H, D]."""
        means = raw.unflatten(1, (len(frames), -1)).mean(dim=2, dtype=torch.float32)
        self.means[layer][:, [self.slots[f] for f in frames]] = means

    def state(self) -> Tree:
        return super().state() | {f"means {layer}": {"all": means[:, :self._used]} for layer, means in self.means.items()}

    def load(self, saved: Saved, like: Tensor) -> None:
        super().load(saved, like)
        for layer in range(self.layers if self._used else 0):
            self.means[layer] = self._no_means(like)
            saved.part(f"means {layer}").fill("all", self.means[layer][:, :self._used])

    def _no_means(self, like: Tensor) -> Tensor:
        batch, _, heads, head_dim = like.shape
        return like.new_zeros(batch, self.capacity, heads, head_dim, dtype=torch.float32)
