"""Keys and values of a few whole frames and of single tokens chosen from the frames that went.

Axis legend: B batch, T = capacity * frame_tokens, C = room * frame_tokens, n tokens, H heads, D head_dim.

A layer's buffers have no gaps: [ sink frames | chosen tokens | other frames ], so what is read is a view. Choosing
moves the few frames that stay. Which tokens were chosen differs by layer and sample, so where they come from is in
tensors; everything else is Python shared by all layers.

For the codec every token is a frame of one token: it has scales of its own, which move along with it, so that no number
is rounded twice. With offload the buffers travel as those of `store.Store` do; the notes on tokens stay on the device.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Iterator

import torch
from torch import Tensor

from .buffers import PLAIN, Buffered, Keys, Layer, Storage
from .codecs import picked, tensors
from .errors import ForcingError
from .offload import Stages
from .plan import Plan
from .rope import Rope, rotate
from .saved import LARGEST, OTHER_LENGTH, Saved, Tree
from .store import Store
from .token_notes import CELL, FRAME, TIMES, Choice, Notes, Stand, dense_frames


@dataclass
class TokenStore(Buffered):
    """Store of one condition; what it has in common with `store.Store` is called the same there.

    keys: Keys.BOTH or Keys.RAW. frames: the whole frames held. Order of work for a layer, made by the pass:
    observe -> choose (where the plan evicts) -> write -> align -> read. newest: as in `store.Store`.
    """

    layers: int
    capacity: int
    frame_tokens: int
    keys: Keys
    choice: Choice
    frames: tuple[int, ...] = ()
    positions: dict[int, int] = field(default_factory=dict)
    storage: Storage = PLAIN
    newest: Store | None = field(init=False, repr=False, default=None)
    _before: int = 0  # frames held before this pass
    _gone: dict[int, int] = field(default_factory=dict)  # frames that it evicts -> where their keys stand
    _stand: Stand = Stand()
    _data: list[Layer | None] = field(init=False, repr=False)
    _notes: list[Notes | None] = field(init=False, repr=False)
    _stages: Stages | None = field(init=False, repr=False, default=None)
    _used: int = field(init=False, repr=False, default=0)  # tokens that some layer ever held

    def __post_init__(self):
        self.keys, self._codec = self.storage.keys(self.keys), self.storage.coder
        self._data, self._notes = [None] * self.layers, [None] * self.layers
        dense = dense_frames(self.storage, self.choice, self.capacity)
        if dense:
            self.newest = Store(self.layers, dense, self.frame_tokens, self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of the device allocated now."""
        notes = sum(notes.nbytes for notes in self._notes if notes)
        return self._resident_bytes() + notes + (self.newest.nbytes if self.newest else 0)

    def clear(self) -> None:
        """Forget every frame, token and query; the buffers stay."""
        self.frames, self._before, self._gone, self._stand = (), 0, {}, Stand()
        self.positions.clear()
        for notes in filter(None, self._notes):
            notes.clear()
        if self.newest:
            self.newest.clear()

    def free(self) -> None:
        """Forget everything and drop the buffers."""
        self._data, self._notes, self._stages, self._used = [None] * self.layers, [None] * self.layers, None, 0
        if self.newest:
            self.newest.free()
        self.clear()

    def state(self) -> Tree:
        """As of `store.Store`."""
        tree = {"kind": [type(self).__name__, self.keys.value], "frames": list(self.frames),
                "positions": sorted(map(list, self.positions.items())), "over": self._stand.over, "behind": self._stand.first}
        if self._stages is not None:
            self._stages.finish()
        for layer, (data, notes) in enumerate(zip(self._data, self._notes)):
            if data is not None:
                tree[f"layer {layer}"] = notes.state() | {str(i): t[:, :self._stop(layer), 0]
                                                          for i, t in enumerate(data.tensors())}
        return tree | ({"newest": self.newest.state()} if self.newest else {})

    def load(self, saved: Saved, like: Tensor) -> None:
        """As of `store.Store`."""
        saved.same("kind", [type(self).__name__, self.keys.value], OTHER_LENGTH)
        self.frames, self.positions = saved.frames("frames"), saved.pairs("positions", -LARGEST)
        if len(self.frames) > self.capacity or {*self.positions} - {*self.frames}:
            raise ForcingError("The frames of the snapshot contradict each other. Take an earlier or another snapshot.")
        self._stand = Stand(saved.integer("over", 0, LARGEST), saved.optional("behind", -LARGEST, LARGEST))
        for layer in range(self.layers if self.frames else 0):
            self._reserve(layer, like)
            self._load_layer(layer, saved.part(f"layer {layer}"))
        if self.newest:
            self.newest.load(saved.part("newest"), like)
            if self.newest.frames != self._latest():
                raise ForcingError("The frames of the snapshot contradict each other. Take an earlier or another snapshot.")

    def _load_layer(self, layer: int, saved: Saved) -> None:
        room, first = min(self.choice.room, self.capacity - len(self.frames)), self.frames[:self.choice.sink]
        behind = self.frames[len(first):]
        self._notes[layer].load(saved, room * self.frame_tokens if behind else 0, self.frame_tokens, first[-1],
                                behind[0] if behind else LARGEST)
        self._used = max(self._used, self._stop(layer))
        for i, t in enumerate(self._data[layer].tensors()):
            saved.fill(str(i), t[:, :self._stop(layer), 0])

    def place(self, plan: Plan) -> None:
        """Take the frames of a plan in. What it evicts, `choose` turns into tokens, layer by layer."""
        self._before, self._gone = len(self.frames), {frame: self.positions.pop(frame) for frame in plan.evict}
        self.frames = tuple(sorted({*self.frames, *plan.write} - {*plan.evict}))
        for frame in plan.write:
            self.positions.pop(frame, None)  # written at the call's own position
        if len(self.frames) > self.capacity:
            raise ForcingError(f"The store holds {self.capacity} frames and cannot take {len(self.frames)}. "
                               "Use a larger window or a shorter video.")
        if self.newest:
            latest = self._latest()
            self.newest.keep(latest)
            self.newest.place(replace(plan, evict=(), write=tuple(f for f in plan.write if f in latest)))

    def _latest(self) -> tuple[int, ...]:
        """The frames that `newest` holds."""
        return self.frames[self.choice.sink:][-self.newest.capacity:]

    def observe(self, layer: int, q: Tensor, over: int, rope: Rope) -> None:
        """Remember the queries of a call's frames, rotated q [B, frames*tokens, H, D], as one sum a frame, turned
        to absolute time. Every call counts, repeated ones too."""
        self._reserve(layer, q)
        self._notes[layer].observe(q, self.frame_tokens, over, rope)

    def choose(self, layer: int, rope: Rope) -> None:
        """Turn the frames that the plan evicted into their best tokens, of those and of the tokens chosen before.

        A token's score is the product of its rotated key with the sum of the last queries, over all heads together, in
        float32 (the published code rounds it to the compute dtype). Equal scores go by age, so every run chooses alike.
        """
        data, notes, cap, size = self._at(layer), self._notes[layer], self.choice.cap, self.frame_tokens
        start = self.choice.sink * size
        end = start + notes.chosen + len(self._gone) * size
        stop = notes.chosen + self._before * size
        marks = notes.candidates([*self._gone], size)
        free = marks[:, TIMES] < (torch.iinfo(marks.dtype).max if cap is None else cap)
        best = _best(self._scores(layer, slice(start, end), rope), free, self._count(free))
        stay = torch.arange(end - start, stop - start, device=best.device).expand(len(best), -1)
        moved = torch.cat([best, stay], dim=1)[..., None, None, None]
        here = slice(start, start + moved.shape[1])
        for buffer in filter(lambda t: t is not None, (data.v, data.raw, data.roped)):
            kept = picked(buffer, lambda t: t[:, start:stop].gather(1, moved.expand(-1, -1, *t.shape[2:])))
            for old, new in zip(tensors(buffer), tensors(kept)):
                old[:, here] = new
        self._written(layer, here)
        notes.take(marks, best)

    def write(self, layer: int, frames: tuple[int, ...], raw: Tensor, roped: Tensor, v: Tensor) -> None:
        """Keep keys and values [B, len(frames)*tokens, H, D] of these placed frames."""
        data, size = self._at(layer), self.frame_tokens
        self._used = max(self._used, self._stop(layer))
        for first, last, at in self._runs(layer, frames):
            here, these = slice(at, at + (last - first) * size), slice(first * size, last * size)
            for buffer, new in ((data.v, v), (data.raw, raw), (data.roped, roped)):
                if buffer is not None:
                    self._codec.write(buffer, here, new[:, these, None])
            self._written(layer, here)
        mine = [i for i, frame in enumerate(frames) if self.newest and frame in self.newest.slots]
        if mine:
            new = (t.unflatten(1, (-1, size))[:, mine].flatten(1, 2) for t in (raw, roped, v))
            self.newest.write(layer, tuple(frames[i] for i in mine), *new)

    def align(self, layer: int, plan: Plan, stand: Stand, rope: Rope) -> None:
        """Re-rotate what stands elsewhere in time than its rotated key does."""
        if self.keys is Keys.RAW:
            return
        data, size = self._at(layer), self.frame_tokens
        moved = {f: p for f, p in zip(plan.read, plan.positions) if self.positions.get(f, p) != p}
        for first, last, at in self._runs(layer, tuple(moved)):
            here = slice(at, at + (last - first) * size)
            self._turn(layer, data, here, rotate(self._raw(data, here), rope.table(list(moved.values())[first:last])))
        if stand != self._stand or (plan.evict and stand.first is not None):
            self._turn(layer, data, self._chosen(layer), self._turned(layer, stand, rope))

    def _turn(self, layer: int, data: Layer, here: slice, keys: Tensor) -> None:
        self._codec.write(data.roped, here, keys[:, :, None])
        self._written(layer, here)

    def read(self, layer: int, plan: Plan, stand: Stand, rope: Rope) -> tuple[Tensor, Tensor]:
        """(rotated keys, values) of everything held, [B, n, H, D] each, dense frames last. They may alias the store, and
        are gone when the next layer has begun (with offload)."""
        dense = [f for f in plan.read if self.newest and f in self.newest.slots]
        at, older = dict(zip(plan.read, plan.positions)), len(plan.read) - len(dense)
        data, stop = self._at(layer), self._stop(layer) - len(dense) * self.frame_tokens
        keys, v = self._keys(layer, plan.positions[:older], stop, stand, rope), self._codec.read(data.v, [slice(0, stop)])
        if not dense:
            return keys, v
        where = replace(plan, read=tuple(dense), positions=tuple(at[f] for f in dense))
        return tuple(torch.cat(pair, dim=1) for pair in zip((keys, v), self.newest.read(layer, where, rope)))

    def _keys(self, layer: int, positions: tuple[int, ...], stop: int, stand: Stand, rope: Rope) -> Tensor:
        """Rotated keys [B, stop, H, D] of the leading tokens; positions: of the whole frames among them."""
        data = self._at(layer)
        if self.keys is not Keys.RAW:
            return self._codec.read(data.roped, [slice(0, stop)])
        sink, here = self.choice.sink, self._chosen(layer)
        pieces = ((slice(0, here.start), positions[:sink]), (slice(here.stop, stop), positions[sink:]))
        sink, rest = (rotate(self._raw(data, part), rope.table(positions)) if positions else self._raw(data, part)
                      for part, positions in pieces)
        return torch.cat([sink, self._turned(layer, stand, rope), rest], dim=1)

    def settle(self, plan: Plan, stand: Stand) -> None:
        """After the last layer: remember where in time everything now stands."""
        self.positions.update(zip(plan.read, plan.positions))
        self._stand = stand

    def _scores(self, layer: int, candidates: slice, rope: Rope) -> Tensor:
        """float32 [B, n] of the candidates. Their scale is left out: it changes no order."""
        data, notes = self._at(layer), self._notes[layer]
        if self.keys is not Keys.RAW:
            keys = self._codec.read(data.roped, [candidates])
        else:
            new = self._raw(data, slice(candidates.start + notes.chosen, candidates.stop))
            keys = torch.cat([self._turned(layer, self._stand, rope),
                              rotate(new, rope.table(list(self._gone.values())))], dim=1)
        return torch.einsum("bhd,bnhd->bn", notes.asked(self._stand.over, rope), keys.float())

    def _count(self, free: Tensor) -> int:
        """How many tokens are chosen: where the cap leaves too few, those that there are; in a batch, as many of each
        sample as of the one that has fewest."""
        wanted = self.choice.room * self.frame_tokens
        if len(self._gone) >= self.choice.room:  # enough that were never chosen: no need to ask the device
            return wanted
        return min(wanted, int(free.sum(1).min()))

    def _chosen(self, layer: int) -> slice:
        start = min(self.choice.sink, len(self.frames)) * self.frame_tokens
        return slice(start, start + self._notes[layer].chosen)

    def _stop(self, layer: int) -> int:
        """Tokens that a layer holds."""
        return self._notes[layer].chosen + len(self.frames) * self.frame_tokens

    def _raw(self, data: Layer, tokens: slice) -> Tensor:
        return self._codec.read(data.raw, [tokens])

    def _turned(self, layer: int, stand: Stand, rope: Rope) -> Tensor:
        """The chosen tokens' keys, rotated from the raw ones."""
        notes, raw = self._notes[layer], self._raw(self._at(layer), self._chosen(layer))
        if not notes.chosen:
            return raw
        cells = notes.row(CELL)
        if stand.first is None:
            sink = self.frames[:self.choice.sink]
            low, high = (sink[-1] + 1 if sink else 0) - stand.over, self.frames[len(sink)] - stand.over
            positions = notes.row(FRAME) - stand.over
        else:
            low, high = stand.first, stand.first + self.choice.room
            positions = stand.first + torch.arange(notes.chosen, device=cells.device).expand_as(cells) // self.frame_tokens
        return rotate(raw, rope.tokens(positions, cells, low, high))

    def _runs(self, layer: int, frames: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
        """(first, last, token): stretches of `frames` that lie behind each other, from that token on."""
        size, start, chosen = self.frame_tokens, 0, self._notes[layer].chosen
        at = [i * size + (chosen if i >= self.choice.sink else 0) for i in map(self.frames.index, frames)]
        for i in range(1, len(at) + 1):
            if i == len(at) or at[i] != at[i - 1] + size:
                yield start, i, at[start]
                start = i

    def _shape(self, like: Tensor) -> tuple[int, ...]:
        batch, _, heads, head_dim = like.shape
        return batch, self.capacity * self.frame_tokens, 1, heads, head_dim

    def _reserve(self, layer: int, like: Tensor) -> None:
        super()._reserve(layer, like)
        if self._notes[layer] is None:
            self._notes[layer] = Notes.empty(self.choice, self.frame_tokens, like)


def _best(scores: Tensor, free: Tensor, count: int) -> Tensor:
    """[B, count] places of the highest scores [B, n] among the free ones, in rising order; the first of equals wins."""
    ranked = scores.masked_fill(~free, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return ranked[:, :count].sort(dim=1).values
