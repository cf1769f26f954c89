"""What a store of single tokens knows about them besides their keys and values, and what all of it takes in bytes.

Axis legend: B batch, C = room * frame_tokens, n tokens, H heads, D head_dim.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Sequence

import torch
from torch import Tensor

from .buffers import PLAIN, Keys, Storage
from .errors import ForcingError
from .rope import Rope, rotate
from .saved import Saved, Tree
from .store import store_bytes, store_host_bytes

FRAME, CELL, TIMES = range(3)  # rows of `Notes.marks`


@dataclass(frozen=True)
class Choice:
    """sink: leading frames that stay whole. room: frames' worth of tokens that are chosen. recent: newest frames
    that stay whole; their queries are what tokens are ranked by. cap: how often one token may be chosen at most."""

    sink: int
    room: int
    recent: int
    cap: int | None


@dataclass(frozen=True)
class Stand:
    """Where chosen tokens stand in time: at their own source frame less `over`, or, where `first` is given, in order
    from that position on, one frame's worth of tokens at each."""

    over: int = 0
    first: int | None = None


@dataclass
class Notes:
    """Of one layer. marks: int32 [B, 3, C], source frame of a chosen token, its place in the frame, how often it was
    chosen. queries: float32 [B, recent, H, D], the sum of each of the last frames' rotated queries. chosen: tokens
    chosen now."""

    marks: Tensor
    queries: Tensor
    chosen: int = 0

    @classmethod
    def empty(cls, choice: Choice, frame_tokens: int, like: Tensor) -> Notes:
        """like: [B, n, H, D] on the device of the run."""
        batch, _, heads, head_dim = like.shape
        return cls(like.new_zeros(batch, 3, choice.room * frame_tokens, dtype=torch.int32),
                   like.new_zeros(batch, choice.recent, heads, head_dim, dtype=torch.float32))

    @property
    def nbytes(self) -> int:
        return self.marks.nbytes + self.queries.nbytes

    def clear(self) -> None:
        self.chosen = 0
        self.queries.zero_()

    def row(self, which: int) -> Tensor:
        """int64 [B, n] of the chosen tokens: FRAME, CELL or TIMES."""
        return self.marks[:, which, :self.chosen].long()

    def observe(self, q: Tensor, frame_tokens: int, over: int, rope: Rope) -> None:
        """Remember rotated queries [B, frames * tokens, H, D] as one sum a frame, turned to absolute time."""
        sums = q.unflatten(1, (-1, frame_tokens)).sum(2, dtype=torch.float32)
        sums = torch.cat([self.queries, _later(sums, over, rope)], dim=1)
        self.queries.copy_(sums[:, -self.queries.shape[1]:])

    def asked(self, over: int, rope: Rope) -> Tensor:
        """[B, H, D]: the sum of all remembered queries, `over` positions earlier than absolute time."""
        return _later(self.queries.sum(1, keepdim=True), -over, rope)[:, 0]

    def candidates(self, gone: Sequence[int], frame_tokens: int) -> Tensor:
        """Marks [B, 3, n] of the chosen tokens and of those of whole frames, which were never chosen."""
        frames = torch.tensor(list(gone)).repeat_interleave(frame_tokens)
        cells = torch.arange(frame_tokens).repeat(len(gone))
        fresh = torch.stack([frames, cells, torch.zeros_like(cells)]).to(self.marks)
        return torch.cat([self.marks[:, :, :self.chosen], fresh.expand(self.marks.shape[0], -1, -1)], dim=2)

    def take(self, candidates: Tensor, best: Tensor) -> None:
        """Choose these places [B, n] of the candidates."""
        self.chosen = best.shape[1]
        self.marks[:, :, :self.chosen] = candidates.gather(2, best[:, None].expand(-1, 3, -1))
        self.marks[:, TIMES] += 1

    def state(self) -> Tree:
        return {"chosen": self.chosen, "marks": self.marks[:, :, :self.chosen], "queries": self.queries}

    def load(self, saved: Saved, most: int, frame_tokens: int, low: int, high: int) -> None:
        """most: tokens there is room for. low, high: frames between which a token must come from. Tables of rotations are
        looked up by what is read here, so ForcingError for what does not fit."""
        self.chosen = saved.integer("chosen", 0, most + 1)
        saved.fill("queries", self.queries)
        saved.fill("marks", self.marks[:, :, :self.chosen], 0)
        frames, cells = self.row(FRAME), self.row(CELL)
        if self.chosen and not (cells.max() < frame_tokens and frames.min() > low and frames.max() < high):
            raise ForcingError("The tokens of the snapshot contradict its frames. Take an earlier or another snapshot.")


def _later(x: Tensor, distance: int, rope: Rope) -> Tensor:
    """Rotated x [B, n, H, D] moved in time only: the table's first token stands at the origin of the picture."""
    return rotate(x, rope.table([distance])[:, :1]) if distance else x


def token_store_bytes(choice: Choice, *, layers: int, capacity: int, frame_tokens: int, dim: int, batch: int,
                      element_size: int, keys: Keys, storage: Storage = PLAIN) -> int:
    """Bytes of the device that a `TokenStore` takes once its first frame is written, or where frames are kept dense its
    first one behind the sink; constant in video length."""
    notes = 3 * choice.room * frame_tokens * 4 + choice.recent * dim * 4
    sizes = {"layers": layers, "dim": dim, "batch": batch, "element_size": element_size, "keys": storage.keys(keys)}
    dense = store_bytes(capacity=dense_frames(storage, choice, capacity), frame_tokens=frame_tokens, **sizes)
    tokens = store_bytes(capacity=capacity * frame_tokens, frame_tokens=1, storage=replace(storage, dense=0), **sizes)
    return tokens + dense + layers * batch * notes


def token_store_host_bytes(*, capacity: int, frame_tokens: int, storage: Storage, **sizes) -> int:
    """Bytes of host memory that it takes beside them, as `store.store_host_bytes`."""
    return store_host_bytes(capacity=capacity * frame_tokens, frame_tokens=1, storage=storage, **sizes)


def dense_frames(storage: Storage, choice: Choice, capacity: int) -> int:
    """Frames kept dense at most: those behind the sink, so that they are always the last ones of a buffer."""
    return min(storage.dense, capacity - choice.sink)
