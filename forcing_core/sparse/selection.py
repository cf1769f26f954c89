"""What a sparse attention attends to: blocks of keys for blocks of queries, and the dense mask that says the same.

Axis legend: B batch, n queries, m keys, H heads, Q blocks of queries, K blocks of keys, D head_dim.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """`tokens` in blocks of `size`, which end where a run of `run` tokens (a latent frame) does: the last block of a run may
    be shorter, as with 1560 tokens a frame in blocks of 64."""

    tokens: int
    size: int
    run: int

    @property
    def per(self) -> int:
        """Blocks of a run."""
        return -(-self.run // self.size)

    @property
    def count(self) -> int:
        return self.tokens // self.run * self.per + -(-(self.tokens % self.run) // self.size)

    def of(self, device) -> Tensor:
        """int64 [tokens]: the block of every token."""
        at = torch.arange(self.tokens, device=device)
        return at // self.run * self.per + at % self.run // self.size

    def table(self, device) -> Tensor:
        """int64 [count, size]: the tokens of every block, `tokens` where it has fewer."""
        block = torch.arange(self.count, device=device)[:, None]
        at = block // self.per * self.run + block % self.per * self.size + torch.arange(self.size, device=device)
        end = ((block // self.per + 1) * self.run).clamp(max=self.tokens)
        return torch.where(at < end, at, self.tokens)

    def mean(self, t: Tensor) -> Tensor:
        """[B, tokens, H, D] -> float32 [B, H, count, D]."""
        of = self.of(t.device)
        total = t.new_zeros(t.shape[0], self.count, *t.shape[2:], dtype=torch.float32).index_add_(1, of, t.float())
        return (total / of.bincount(minlength=self.count)[:, None, None]).transpose(1, 2)


@dataclass(frozen=True)
class Selection:
    """chosen: bool [B, H, Q, K], at least one for every block of queries. order: int64 [B, H, n], the queries in the order in
    which `queries` counts them; None: as they come. Raises nothing: methods see to it that no query is left without keys
    (`never_empty`)."""

    queries: Blocks
    keys: Blocks
    chosen: Tensor
    order: Tensor | None = None

    def mask(self) -> Tensor:
        """bool [B, H, n, m], queries as they come."""
        device = self.chosen.device
        rows = self.chosen[:, :, self.queries.of(device)][..., self.keys.of(device)]
        if self.order is None:
            return rows
        return torch.zeros_like(rows).scatter_(2, self.order[..., None].expand_as(rows), rows)


def never_empty(chosen: Tensor) -> Tensor:
    """The same with everything chosen for those blocks of queries that chose nothing."""
    return chosen | ~chosen.any(dim=-1, keepdim=True)


def top(scores: Tensor, count: int) -> Tensor:
    """bool like scores: the `count` highest ones of the last axis."""
    index = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)


def share(count: int, density: float) -> int:
    """How many of `count` a density stands for, at least one."""
    return max(1, int(count * density + 1e-6))


def density(selection: Selection) -> Tensor:
    """float32 [B, H]: the part of all pairs of query and key that is computed."""
    return selection.mask().float().mean(dim=(2, 3))
