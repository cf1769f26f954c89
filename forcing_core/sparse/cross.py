"""AnnCA: of the prompt, each head keeps for each latent frame those tokens that some query of the frame finds near it.

Hashing keeps tokens that share a bucket with one of the queries, up to a part of the prompt; low-bit similarity keeps those
with the highest product with any of them. Source: arXiv 2602.01801 (no public code). Needs no training.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .ann import bits_of, check_search, codes, most_shared, rounded, sharing
from .selection import Blocks, Selection, share, top
from .view import View


@dataclass(frozen=True)
class CrossOptions:
    """As `AnnOptions`, for the prompt: a frame asks as one group, so that more of it is found; bits: 8 with "lsh" unless given,
    since a frame has many queries."""

    search: str = "quant"
    bits: int | None = None
    tables: int = 1
    density: float = 0.33
    dense_steps: int = 1
    dense_layers: tuple[int, ...] = ()
    seed: int = 0
    name: ClassVar[str] = "ann_cross"

    def __post_init__(self):
        check_search(self)


def choose(options: CrossOptions, view: View, q: Tensor, k: Tensor) -> Selection | None:
    """Tokens of the prompt for every latent frame; None, all of them, in dense steps and layers."""
    if view.layer in options.dense_layers or (view.step is not None and view.step < options.dense_steps):
        return None
    frames, tokens = Blocks(q.shape[1], view.video.tokens, view.video.tokens), Blocks(k.shape[1], 1, 1)
    return Selection(frames, tokens, _SEARCHES[options.search](options, frames, q, k))


def _hashed(options: CrossOptions, frames: Blocks, q: Tensor, k: Tensor) -> Tensor:
    bits = 8 if options.bits is None else options.bits
    centred = k.float() - k.float().mean(dim=1, keepdim=True)
    asked, keys = (codes(t, bits, options.tables, options.seed) for t in (q, centred))
    return most_shared(sharing(frames, asked, keys, bits), options.density)


def _rounded(options: CrossOptions, frames: Blocks, q: Tensor, k: Tensor) -> Tensor:
    asked, keys = (rounded(t, bits_of(options)).transpose(1, 2) for t in (q, k))
    scores = asked @ keys.transpose(2, 3)
    whole = scores.new_full((*scores.shape[:2], frames.count, scores.shape[3]), float("-inf"))
    best = whole.scatter_reduce(2, frames.of(q.device)[:, None].expand_as(scores), scores, "amax")
    return top(best, share(k.shape[1], options.density))


_SEARCHES = {"lsh": _hashed, "quant": _rounded}
