"""Keys and values of a few whole frames and of single tokens chosen from the frames that went.

Axis legend: B batch, T = capacity * frame_tokens, C = room * frame_tokens, n tokens, H heads, D head_dim.

A layer's buffers have no gaps: [ sink frames | chosen tokens | other frames ], so what is read is a view. Choosing
moves the few frames that stay. Which tokens were chosen differs by layer and sample, so where they come from is in
tensors; everything else is Python shared by all layers.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Iterator

import torch
from torch import Tensor

from .errors import ForcingError
from .plan import Plan
from .rope import Rope, rotate
from .saved import LARGEST, OTHER_LENGTH, Saved, Tree
from .store import Keys

FRAME, CELL, TIMES = range(3)  # rows of `_Layer.marks`


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
class _Layer:
    """v, raw, roped: [B, T, H, D], `roped` None for Keys.RAW. marks: int32 [B, 3, C], source frame of a chosen
    token, its place in the frame, how often it was chosen. queries: float32 [B, recent, H, D], the sum of each of
    the last frames' rotated queries. chosen: tokens chosen now."""

    v: Tensor
    raw: Tensor
    roped: Tensor | None
    marks: Tensor
    queries: Tensor
    chosen: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.buffers, self.marks, self.queries)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.v, self.raw, self.roped) if t is not None)


def token_store_bytes(choice: Choice, *, layers: int, capacity: int, frame_tokens: int, dim: int, batch: int,
                      element_size: int, keys: Keys) -> int:
    """Bytes that a `TokenStore` takes once its first frame is written; constant in video length."""
    tokens = capacity * frame_tokens * dim * element_size * keys.tensors
    return layers * batch * (tokens + 3 * choice.room * frame_tokens * 4 + choice.recent * dim * 4)


@dataclass
class TokenStore:
    """Store of one condition; what it has in common with `store.Store` is called the same there.

    keys: Keys.BOTH or Keys.RAW. frames: the whole frames held. Order of work for a layer, made by the pass:
    observe -> choose (where the plan evicts) -> write -> align -> read.
    """

    layers: int
    capacity: int
    frame_tokens: int
    keys: Keys
    choice: Choice
    frames: tuple[int, ...] = ()
    positions: dict[int, int] = field(default_factory=dict)
    _before: int = 0  # frames held before this pass
    _gone: dict[int, int] = field(default_factory=dict)  # frames that it evicts -> where their keys stand
    _stand: Stand = Stand()
    _data: list[_Layer | None] = field(init=False, repr=False)

    def __post_init__(self):
        self._data = [None] * self.layers

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return sum(t.nbytes for data in self._data if data for t in data.tensors)

    def clear(self) -> None:
        """Forget every frame, token and query; the buffers stay."""
        self.frames, self._before, self._gone, self._stand = (), 0, {}, Stand()
        self.positions.clear()
        for data in filter(None, self._data):
            data.chosen = 0
            data.queries.zero_()

    def free(self) -> None:
        """Forget everything and drop the buffers."""
        self._data = [None] * self.layers
        self.clear()

    def state(self) -> Tree:
        """As of `store.Store`."""
        tree = {"kind": [type(self).__name__, self.keys.value], "frames": list(self.frames),
                "positions": sorted(map(list, self.positions.items())), "over": self._stand.over, "behind": self._stand.first}
        for layer, data in enumerate(self._data):
            if data is not None:
                stop = data.chosen + len(self.frames) * self.frame_tokens
                tree[f"layer {layer}"] = {"chosen": data.chosen, "marks": data.marks[:, :, :data.chosen],
                                          "queries": data.queries,
                                          **{str(i): t[:, :stop] for i, t in enumerate(data.buffers)}}
        return tree

    def load(self, saved: Saved, like: Tensor) -> None:
        """As of `store.Store`."""
        saved.same("kind", [type(self).__name__, self.keys.value], OTHER_LENGTH)
        self.frames, self.positions = saved.frames("frames"), saved.pairs("positions", -LARGEST)
        if len(self.frames) > self.capacity or {*self.positions} - {*self.frames}:
            raise ForcingError("The frames of the snapshot contradict each other. Take an earlier or another snapshot.")
        self._stand = Stand(saved.integer("over", 0, LARGEST), saved.optional("behind", -LARGEST, LARGEST))
        for layer in range(self.layers if self.frames else 0):
            self._load_layer(self._layer(layer, like), saved.part(f"layer {layer}"))

    def _load_layer(self, data: _Layer, saved: Saved) -> None:
        room = min(self.choice.room, self.capacity - len(self.frames))
        most = room * self.frame_tokens if len(self.frames) > self.choice.sink else 0
        data.chosen = saved.integer("chosen", 0, most + 1)
        for i, t in enumerate(data.buffers):
            saved.fill(str(i), t[:, :data.chosen + len(self.frames) * self.frame_tokens])
        saved.fill("queries", data.queries)
        marks, first = data.marks[:, :, :data.chosen], self.frames[:self.choice.sink]
        saved.fill("marks", marks, 0)
        frames, cells = marks[:, FRAME], marks[:, CELL]
        # tables of rotations are looked up by these
        if data.chosen and not (cells.max() < self.frame_tokens and frames.min() > first[-1]
                                and frames.max() < self.frames[len(first)]):
            raise ForcingError("The tokens of the snapshot contradict its frames. Take an earlier or another snapshot.")

    def place(self, plan: Plan) -> None:
        """Take the frames of a plan in. What it evicts, `choose` turns into tokens, layer by layer."""
        self._before, self._gone = len(self.frames), {frame: self.positions.pop(frame) for frame in plan.evict}
        self.frames = tuple(sorted({*self.frames, *plan.write} - {*plan.evict}))
        for frame in plan.write:
            self.positions.pop(frame, None)  # written at the call's own position
        if len(self.frames) > self.capacity:
            raise ForcingError(f"The store holds {self.capacity} frames and cannot take {len(self.frames)}. "
                               "Use a larger window or a shorter video.")

    def observe(self, layer: int, q: Tensor, over: int, rope: Rope) -> None:
        """Remember the queries of a call's frames, rotated q [B, frames*tokens, H, D], as one sum a frame, turned
        to absolute time. Every call counts, repeated ones too."""
        data = self._layer(layer, q)
        sums = q.unflatten(1, (-1, self.frame_tokens)).sum(2, dtype=torch.float32)
        sums = torch.cat([data.queries, _later(sums, over, rope)], dim=1)
        data.queries.copy_(sums[:, -self.choice.recent:])

    def choose(self, layer: int, rope: Rope) -> None:
        """Turn the frames that the plan evicted into their best tokens, of those and of the tokens chosen before.

        A token's score is the product of its rotated key with the sum of the last queries, over all heads together, in
        float32 (the published code rounds it to the compute dtype). Equal scores go by age, so every run chooses alike.
        """
        data, cap, size = self._data[layer], self.choice.cap, self.frame_tokens
        start = self.choice.sink * size
        end = start + data.chosen + len(self._gone) * size
        stop = data.chosen + self._before * size
        marks = torch.cat([data.marks[:, :, :data.chosen], self._fresh(data.marks)], dim=2)
        free = marks[:, TIMES] < (torch.iinfo(marks.dtype).max if cap is None else cap)
        best = _best(self._scores(data, slice(start, end), rope), free, self._count(free))
        for buffer in filter(lambda t: t is not None, (data.v, data.raw, data.roped)):
            tokens = buffer[:, start:end].gather(1, best[..., None, None].expand(-1, -1, *buffer.shape[2:]))
            kept = torch.cat([tokens, buffer[:, end:stop]], dim=1)
            buffer[:, start:start + kept.shape[1]] = kept
        data.chosen = best.shape[1]
        data.marks[:, :, :data.chosen] = marks.gather(2, best[:, None].expand(-1, 3, -1))
        data.marks[:, TIMES] += 1

    def write(self, layer: int, frames: tuple[int, ...], raw: Tensor, roped: Tensor, v: Tensor) -> None:
        """Keep keys and values [B, len(frames)*tokens, H, D] of these placed frames."""
        data, size = self._layer(layer, raw), self.frame_tokens
        for first, last, at in self._runs(data, frames):
            here, these = slice(at, at + (last - first) * size), slice(first * size, last * size)
            for buffer, new in ((data.v, v), (data.raw, raw), (data.roped, roped)):
                if buffer is not None:
                    buffer[:, here] = new[:, these]

    def align(self, layer: int, plan: Plan, stand: Stand, rope: Rope) -> None:
        """Re-rotate what stands elsewhere in time than its rotated key does."""
        data, size = self._data[layer], self.frame_tokens
        if data.roped is None:
            return
        moved = {f: p for f, p in zip(plan.read, plan.positions) if self.positions.get(f, p) != p}
        for first, last, at in self._runs(data, tuple(moved)):
            here = slice(at, at + (last - first) * size)
            data.roped[:, here] = rotate(data.raw[:, here], rope.table(list(moved.values())[first:last]))
        if stand != self._stand or (plan.evict and stand.first is not None):
            here = self._chosen(data)
            data.roped[:, here] = self._turned(data, stand, rope)

    def read(self, layer: int, plan: Plan, stand: Stand, rope: Rope) -> tuple[Tensor, Tensor]:
        """(rotated keys, values) of everything held, [B, n, H, D] each. The keys may alias the store."""
        data = self._data[layer]
        stop = data.chosen + len(self.frames) * self.frame_tokens
        if data.roped is not None:
            return data.roped[:, :stop], data.v[:, :stop]
        sink, here = self.choice.sink, self._chosen(data)
        pieces = ((slice(0, here.start), plan.positions[:sink]), (slice(here.stop, stop), plan.positions[sink:]))
        sink, rest = (rotate(data.raw[:, part], rope.table(positions)) if positions else data.raw[:, part]
                      for part, positions in pieces)
        return torch.cat([sink, self._turned(data, stand, rope), rest], dim=1), data.v[:, :stop]

    def settle(self, plan: Plan, stand: Stand) -> None:
        """After the last layer: remember where in time everything now stands."""
        self.positions.update(zip(plan.read, plan.positions))
        self._stand = stand

    def _scores(self, data: _Layer, candidates: slice, rope: Rope) -> Tensor:
        """float32 [B, n] of the candidates. Their scale is left out: it changes no order."""
        if data.roped is not None:
            keys = data.roped[:, candidates]
        else:
            new = data.raw[:, candidates.start + data.chosen:candidates.stop]
            keys = torch.cat([self._turned(data, self._stand, rope),
                              rotate(new, rope.table(list(self._gone.values())))], dim=1)
        queries = _later(data.queries.sum(1, keepdim=True), -self._stand.over, rope)
        return torch.einsum("bhd,bnhd->bn", queries[:, 0], keys.float())

    def _fresh(self, like: Tensor) -> Tensor:
        """Marks [B, 3, n] of the tokens of evicted frames, which were never chosen."""
        frames = torch.tensor(list(self._gone)).repeat_interleave(self.frame_tokens)
        cells = torch.arange(self.frame_tokens).repeat(len(self._gone))
        return torch.stack([frames, cells, torch.zeros_like(cells)]).to(like).expand(like.shape[0], -1, -1)

    def _count(self, free: Tensor) -> int:
        """How many tokens are chosen: where the cap leaves too few, those that there are; in a batch, as many of each
        sample as of the one that has fewest."""
        wanted = self.choice.room * self.frame_tokens
        if len(self._gone) >= self.choice.room:  # enough that were never chosen: no need to ask the device
            return wanted
        return min(wanted, int(free.sum(1).min()))

    def _chosen(self, data: _Layer) -> slice:
        start = min(self.choice.sink, len(self.frames)) * self.frame_tokens
        return slice(start, start + data.chosen)

    def _turned(self, data: _Layer, stand: Stand, rope: Rope) -> Tensor:
        """The chosen tokens' keys, rotated from the raw ones."""
        raw, cells = data.raw[:, self._chosen(data)], data.marks[:, CELL, :data.chosen].long()
        if not data.chosen:
            return raw
        if stand.first is None:
            sink = self.frames[:self.choice.sink]
            low, high = (sink[-1] + 1 if sink else 0) - stand.over, self.frames[len(sink)] - stand.over
            positions = data.marks[:, FRAME, :data.chosen].long() - stand.over
        else:
            low, high = stand.first, stand.first + self.choice.room
            positions = stand.first + torch.arange(data.chosen, device=cells.device).expand_as(cells) // self.frame_tokens
        return rotate(raw, rope.tokens(positions, cells, low, high))

    def _runs(self, data: _Layer, frames: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
        """(first, last, token): stretches of `frames` that lie behind each other, from that token on."""
        size, start = self.frame_tokens, 0
        at = [i * size + (data.chosen if i >= self.choice.sink else 0) for i in map(self.frames.index, frames)]
        for i in range(1, len(at) + 1):
            if i == len(at) or at[i] != at[i - 1] + size:
                yield start, i, at[start]
                start = i

    def _layer(self, layer: int, like: Tensor) -> _Layer:
        if self._data[layer] is None:
            batch, _, heads, head_dim = like.shape
            tokens = lambda: like.new_empty(batch, self.capacity * self.frame_tokens, heads, head_dim)  # noqa: E731
            self._data[layer] = _Layer(
                v=tokens(), raw=tokens(), roped=None if self.keys is Keys.RAW else tokens(),
                marks=like.new_zeros(batch, 3, self.choice.room * self.frame_tokens, dtype=torch.int32),
                queries=like.new_zeros(batch, self.choice.recent, heads, head_dim, dtype=torch.float32))
        return self._data[layer]


def _later(x: Tensor, distance: int, rope: Rope) -> Tensor:
    """Rotated x [B, n, H, D] moved in time only: the table's first token stands at the origin of the picture."""
    return rotate(x, rope.table([distance])[:, :1]) if distance else x


def _best(scores: Tensor, free: Tensor, count: int) -> Tensor:
    """[B, count] places of the highest scores [B, n] among the free ones, in rising order; the first of equals wins."""
    ranked = scores.masked_fill(~free, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return ranked[:, :count].sort(dim=1).values
