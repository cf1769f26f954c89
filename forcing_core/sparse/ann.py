"""AnnSA: a query attends to those keys that a cheap search finds near it.

Two searches. Hashing: random hyperplanes give queries and keys codes of a few bits, in several tables; what shares a bucket
in one of them is attended to. The mean key is taken off first: that changes no attention, and keys that all point one way
would share a bucket. Low-bit similarity: products of numbers rounded to a few bits, and the highest ones stay.

Queries ask in groups, since a kernel wants rows of them: with hashing those with alike codes (which attend to what they find
most often together), else neighbours (which ask with their mean). Groups of 1 are the paper's rule.

Source: arXiv 2602.01801, which has no public code. It takes over the buckets that prompts make in cross-attention; here the
self-attention's own queries and keys are hashed, so that the method stands alone. Needs no training.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ForcingError
from .selection import Blocks, Selection, never_empty, share, top
from .view import View

USUAL_BITS = {"lsh": 6, "quant": 8}
BITS = {"lsh": (0, 12), "quant": (2, 8)}
TABLES = 64


def check_search(options) -> None:
    """Raise ForcingError for settings of a search that make no sense."""
    if options.search not in BITS:
        raise ForcingError(f"search = {options.search!r} is not known. Use one of {', '.join(BITS)}.")
    low, high = BITS[options.search]
    if not (options.bits is None or low <= options.bits <= high) or not 1 <= options.tables <= TABLES:
        raise ForcingError(f"{options.bits} bits in {options.tables} tables make no sense. Use {low} to {high} bits and 1 to "
                           f"{TABLES} tables.")
    if not 0 < options.density <= 1:
        raise ForcingError(f"A density of {options.density} makes no sense. Use a part of all keys, above 0 and at most 1.")
    if options.dense_steps < 0 or min(options.dense_layers, default=0) < 0:
        raise ForcingError(f"{options.dense_steps} dense steps and the dense layers {options.dense_layers} make no sense. Use "
                           "numbers from 0 on.")


@dataclass(frozen=True)
class AnnOptions:
    """search: "lsh" or "quant". bits: of a code (lsh; 6 unless given, 0 finds everything) or of a number (quant; 8). tables:
    of codes. density: part of the keys that "quant" keeps, and "lsh" at most: of what shares a bucket, for one query about
    1 - (1 - 2 ** -bits) ** tables of all keys, those that share most often. group: queries that choose together.
    dense_steps: first denoising steps of a block without sparsity (paper: 30 % of them). dense_layers: layers without it
    (paper: those found not to be sparse, 30 %). seed: of the hyperplanes. Raises ForcingError.
    """

    search: str = "lsh"
    bits: int | None = None
    tables: int = 18
    density: float = 0.28
    group: int = 64
    dense_steps: int = 1
    dense_layers: tuple[int, ...] = ()
    seed: int = 0
    name: ClassVar[str] = "ann"

    def __post_init__(self):
        check_search(self)
        if self.group < 1:
            raise ForcingError(f"Groups of {self.group} queries make no sense. Use at least 1.")


def bits_of(options) -> int:
    return USUAL_BITS[options.search] if options.bits is None else options.bits


def codes(t: Tensor, bits: int, tables: int, seed: int) -> Tensor:
    """[B, n, H, D] -> int64 [B, H, n, tables]: buckets 0 .. 2 ** bits - 1. Channels added behind the others, as a key bias
    does, change nothing while they are 0."""
    planes = torch.randn(t.shape[-1], tables * bits, generator=torch.Generator().manual_seed(seed)).to(t.device)
    signs = (t.float() @ planes > 0).unflatten(-1, (tables, bits))
    weights = 2 ** torch.arange(bits, device=t.device)
    return (signs * weights).sum(dim=-1).transpose(1, 2)


def sharing(groups: Blocks, asked: Tensor, keys: Tensor, bits: int) -> Tensor:
    """int32 [B, H, Q, m]: how often a key shares a bucket with a query of a group, over all tables. asked: codes
    [B, H, n, tables] in the order of the groups; keys: [B, H, m, tables]."""
    batch, heads, _, tables = asked.shape
    of = groups.of(asked.device)
    found = torch.zeros(batch, heads, groups.count, keys.shape[2], dtype=torch.int32, device=asked.device)
    for table in range(tables):
        full, bucket = found.new_zeros(batch, heads, groups.count << bits), (of << bits) + asked[..., table]
        full.scatter_add_(2, bucket, torch.ones_like(bucket, dtype=torch.int32))
        found += full.unflatten(2, (groups.count, -1)).gather(3, keys[..., None, :, table].expand_as(found))
    return found


def most_shared(counts: Tensor, density: float) -> Tensor:
    """bool like counts: what shares a bucket at all, and of that no more than the part `density` of all keys."""
    return never_empty((counts > 0) & top(counts, share(counts.shape[-1], density)))


def rounded(t: Tensor, bits: int) -> Tensor:
    """Whole numbers of so many bits in place of t [..., D], times the scale of each vector; float32, in which their products
    are exact."""
    most = 2 ** (bits - 1) - 1
    scale = t.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / most
    return (t.float() / scale).round() * scale


def choose(options: AnnOptions, view: View, q: Tensor, k: Tensor) -> Selection | None:
    """Single keys for groups of queries; None, all of them, in dense steps and layers."""
    if view.layer in options.dense_layers or (view.step is not None and view.step < options.dense_steps):
        return None
    return _SEARCHES[options.search](options, view, q, k)


def _hashed(options: AnnOptions, view: View, q: Tensor, k: Tensor) -> Selection:
    bits, groups = bits_of(options), Blocks(q.shape[1], min(options.group, q.shape[1]), q.shape[1])
    centred = k.float() - k.float().mean(dim=1, keepdim=True)
    asked, keys = (codes(t, bits, options.tables, options.seed) for t in (q, centred))
    order = asked[..., 0].sort(dim=-1, stable=True).indices
    asked = asked.gather(2, order[..., None].expand_as(asked))
    return Selection(groups, Blocks(k.shape[1], 1, 1), most_shared(sharing(groups, asked, keys, bits), options.density), order)


def _rounded(options: AnnOptions, view: View, q: Tensor, k: Tensor) -> Selection:
    groups = Blocks(q.shape[1], min(options.group, view.video.tokens), view.video.tokens)
    asked, keys = rounded(groups.mean(q), bits_of(options)), rounded(k, bits_of(options))
    scores = asked @ keys.permute(0, 2, 3, 1)
    return Selection(groups, Blocks(k.shape[1], 1, 1), top(scores, share(k.shape[1], options.density)))


_SEARCHES = {"lsh": _hashed, "quant": _rounded}
