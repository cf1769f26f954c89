"""Keys and values of past frames: one fixed buffer a layer, one slot a latent frame.

Axis legend: B batch, T = capacity * frame_tokens, H heads, D head_dim.

A slot is reused when its frame is evicted; nothing is ever moved. Softmax does not care in which order keys
lie, and every slot's temporal position is known, so a full window costs no copies. Which frame lies in which
slot is Python shared by all layers.

Three arrangements of the keys, chosen by what the policy needs (`Keys`):

    ROPED   only rotated keys. Smallest and fastest; for policies whose written keys never change position.
    BOTH    raw keys and a rotated view, re-rotated only where a plan moved a frame. For moving positions.
    RAW     raw keys only, rotated at every read. Moving positions with a third less memory, more time.

How the numbers lie in a buffer is a codec's business, and where the buffers are is `offload`'s (`Storage` says both).
A codec that rounds turns BOTH into RAW: a second rounding of the rotated view would add to the first, and its buffer
would be half of what the codec saves.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Iterable, Sequence

import torch
from torch import Tensor

from .buffers import PLAIN, Buffered, Keys, Layer, Storage
from .codecs import Codec
from .errors import ForcingError
from .offload import STAGES, Stages
from .plan import Plan
from .rope import Rope, rotate
from .saved import LARGEST, OTHER_LENGTH, Saved, Tree


def store_bytes(*, layers: int, capacity: int, frame_tokens: int, dim: int, batch: int, element_size: int,
                keys: Keys, storage: Storage = PLAIN, head_dim: int = 128) -> int:
    """Bytes of the device that a store takes once a frame went through all layers, scales included. dim = heads *
    head_dim (128 in all of Wan 2.1; only scales depend on it); constant in video length."""
    one = partial(_layer_bytes, frame_tokens=frame_tokens, dim=dim, batch=batch, element_size=element_size,
                  keys=storage.keys(keys), head_dim=head_dim)
    resident = min(STAGES, layers) if storage.offload else layers
    return resident * one(capacity, coder=storage.coder) + layers * one(min(storage.dense, capacity), coder=PLAIN.coder)


def store_host_bytes(*, layers: int, storage: Storage = PLAIN, **sizes) -> int:
    """Bytes of host memory that the same store takes beside them: all layers with offload, else none."""
    return store_bytes(layers=layers, storage=replace(storage, offload=False, dense=0), **sizes) * storage.offload


def _layer_bytes(capacity: int, *, frame_tokens: int, dim: int, batch: int, element_size: int, keys: Keys, head_dim: int,
                 coder: Codec) -> int:
    heads = max(1, dim // head_dim)
    return keys.tensors * coder.bytes((batch, capacity, frame_tokens, heads, dim // heads), element_size)


@dataclass
class Store(Buffered):
    """KV store of one condition.

    layers: number of transformer blocks; capacity: slots in latent frames; frame_tokens: tokens a frame.
    Buffers are allocated at the first write from the tensors seen, so dtype, device, batch and heads are
    never configured twice. Raises ForcingError when a plan needs more slots than there are.

    newest: with `storage.dense`, a plain store of so many slots with the newest frames once more; what is read of
    them comes from there.
    """

    layers: int
    capacity: int
    frame_tokens: int
    keys: Keys = Keys.ROPED
    slots: dict[int, int] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    storage: Storage = PLAIN
    newest: Store | None = field(init=False, repr=False, default=None)
    stretches: dict = field(init=False, repr=False, default_factory=dict)  # layouts of passes, kept for `stretch.py`
    _data: list[Layer | None] = field(init=False, repr=False)
    _stages: Stages | None = field(init=False, repr=False, default=None)
    _used: int = field(init=False, repr=False, default=0)  # slots that ever held a frame are the first so many

    def __post_init__(self):
        self.keys, self._codec = self.storage.keys(self.keys), self.storage.coder
        self._data = [None] * self.layers
        if self.storage.dense:
            self.newest = Store(self.layers, min(self.storage.dense, self.capacity), self.frame_tokens, self.keys)

    @property
    def frames(self) -> tuple[int, ...]:
        """Source frames held, in temporal order."""
        return tuple(sorted(self.slots))

    @property
    def nbytes(self) -> int:
        """Bytes of the device allocated now."""
        return self._resident_bytes() + (self.newest.nbytes if self.newest else 0)

    def clear(self) -> None:
        """Forget every frame; the buffers stay."""
        self.slots.clear()
        self.positions.clear()
        if self.newest:
            self.newest.clear()

    def keep(self, frames: Sequence[int]) -> None:
        """Forget every frame but these; the buffers stay."""
        for frame in set(self.slots) - set(frames):
            del self.slots[frame]
            self.positions.pop(frame, None)
        if self.newest:
            self.newest.keep(frames)

    def free(self) -> None:
        """Forget every frame and drop the buffers."""
        self.clear()
        self.stretches.clear()
        self._data, self._stages = [None] * self.layers, None
        if self.newest:
            self.newest.free()

    def place(self, plan: Plan) -> None:
        """Make room for a plan: drop its evicted frames, give its written frames a slot."""
        for frame in plan.evict:
            del self.slots[frame]
            del self.positions[frame]
        free = iter(sorted(set(range(self.capacity)) - set(self.slots.values())))
        for frame in plan.write:
            self.positions.pop(frame, None)  # written below at the call's own position
            if frame not in self.slots:
                slot = next(free, None)
                if slot is None:
                    raise ForcingError(f"The store holds {self.capacity} frames and has no room for frame {frame}. "
                                       "Use a larger window or a shorter video.")
                self.slots[frame] = slot
                self._used = max(self._used, slot + 1)
        if self.newest:
            latest = self._recent()[-self.newest.capacity:]
            self.newest.keep(latest)
            self.newest.place(replace(plan, evict=(), write=tuple(f for f in plan.write if f in latest)))

    def _recent(self) -> tuple[int, ...]:
        """The frames whose newest ones `newest` may hold, in temporal order."""
        return self.frames

    def write(self, layer: int, frames: tuple[int, ...], raw: Tensor, roped: Tensor, v: Tensor) -> None:
        """Keep keys and values [B, len(frames)*tokens, H, D] of these placed frames."""
        data = self._layer(layer, raw)
        for start, stop, slot in self._runs(frames):
            here = slice(slot, slot + stop - start)
            for buffer, new in ((data.v, v), (data.raw, raw), (data.roped, roped)):
                if buffer is not None:
                    self._codec.write(buffer, here, new.unflatten(1, (-1, self.frame_tokens))[:, start:stop])
            self._written(layer, here)
        if self.newest:
            self._write_newest(layer, frames, raw, roped, v)

    def _write_newest(self, layer: int, frames: tuple[int, ...], *new: Tensor) -> None:
        mine = [i for i, frame in enumerate(frames) if frame in self.newest.slots]
        if mine:
            new = (t.unflatten(1, (-1, self.frame_tokens))[:, mine].flatten(1, 2) for t in new)
            self.newest.write(layer, tuple(frames[i] for i in mine), *new)

    def buffers(self, layer: int, like: Tensor) -> Layer:
        """Those of a layer where they live, for keys or values like [B, n, H, D]."""
        return self._data[layer] or self._layer(layer, like)

    def spots(self, layer: int, frames: tuple[int, ...], like: Tensor) -> tuple[Layer, list[tuple[int, int, int]]]:
        """For who writes these placed frames without `write`: the buffers of the layer, and stretches (start, stop, slot) of
        the frames that lie in neighbouring slots. Only for a `storage` that keeps numbers as they are, on the device."""
        return self._layer(layer, like), [*self._runs(frames)]

    def layout(self, plan: Plan) -> tuple:
        """Which slots a placed plan writes and reads, and how it turns their keys: passes with the same layout do the same
        to the buffers, whatever frames they are about."""
        at = {Keys.ROPED: lambda f, p: None, Keys.RAW: lambda f, p: p,
              Keys.BOTH: lambda f, p: None if self.positions.get(f, p) == p else p}[self.keys]
        read = {f: (self.slots[f], at(f, p)) for f, p in zip(plan.read, plan.positions)}
        return tuple(self.slots[f] for f in plan.write), tuple(read[f] for f in self.order(plan.read))

    def tensors(self) -> tuple[Tensor, ...]:
        """All buffers allocated now, where they live."""
        return tuple(t for data in self._data if data for t in data.tensors())

    def align(self, layer: int, plan: Plan, rope: Rope) -> None:
        """Re-rotate the frames that the plan reads at another position than their rotated key has."""
        if self.keys is not Keys.BOTH:
            return
        moved = {f: p for f, p in zip(plan.read, plan.positions) if self.positions.get(f, p) != p}
        data = self._at(layer) if moved else None
        for start, stop, slot in self._runs(tuple(moved)):
            here = slice(slot, slot + stop - start)
            turn = rope.table(list(moved.values())[start:stop])
            data.roped[:, here] = rotate(data.raw[:, here].flatten(1, 2), turn).unflatten(1, (stop - start, -1))
            self._written(layer, here)

    def read(self, layer: int, plan: Plan, rope: Rope) -> tuple[Tensor, Tensor]:
        """(rotated keys, values) of the plan's read frames, [B, n*tokens, H, D] each; views where it can be.

        Frames come in the order of `order`. Both may alias the store: whoever hands them to a kernel that writes to
        its inputs must copy, and so must who needs them after the next layer has begun (with offload they are gone).
        """
        where = dict(zip(plan.read, plan.positions))
        frames = self.order(plan.read)
        if self.newest is None:
            return self._read(layer, frames, where, rope)
        older = tuple(f for f in frames if f not in self.newest.slots)
        parts = [self._read(layer, older, where, rope)] if older else []
        if len(older) < len(frames):
            parts.append(self.newest._read(layer, frames[len(older):], where, rope))
        return parts[0] if len(parts) == 1 else tuple(torch.cat(t, dim=1) for t in zip(*parts))

    def _read(self, layer: int, frames: tuple[int, ...], where: dict[int, int], rope: Rope) -> tuple[Tensor, Tensor]:
        data = self._at(layer)
        runs = [slice(slot, slot + stop - start) for start, stop, slot in self._runs(frames)]
        v = self._codec.read(data.v, runs)
        if self.keys is not Keys.RAW:
            return self._codec.read(data.roped, runs), v
        return rotate(self._codec.read(data.raw, runs), rope.table([where[f] for f in frames])), v

    def order(self, frames: Iterable[int]) -> tuple[int, ...]:
        """These frames in the order in which `read` gives them: by slot, those of `newest` last."""
        if self.newest is None:
            return tuple(sorted(frames, key=self.slots.__getitem__))
        return tuple(sorted(frames, key=lambda f: (f in self.newest.slots, self.slots[f])))

    def held(self) -> Store:
        """The same buffers with the bookkeeping of now, which later passes do not change."""
        view = copy.copy(self)
        view.slots, view.positions = dict(self.slots), dict(self.positions)
        view.newest = self.newest.held() if self.newest else None
        return view

    def settle(self, plan: Plan) -> None:
        """After the last layer: remember at which position every read frame's rotated key now stands."""
        self.positions.update(zip(plan.read, plan.positions))

    def state(self) -> Tree:
        """What a fresh store of the same sizes needs to go on: all slots that ever held a frame."""
        if self._stages is not None:
            self._stages.finish()
        tree = {"kind": self._kind, "used": self._used, "slots": sorted(map(list, self.slots.items())),
                "positions": sorted(map(list, self.positions.items()))}
        for layer, data in enumerate(self._data):
            if data is not None:
                tree[f"layer {layer}"] = {str(i): t[:, :self._used] for i, t in enumerate(data.tensors())}
        return tree | ({"newest": self.newest.state()} if self.newest else {})

    def load(self, saved: Saved, like: Tensor) -> None:
        """Become the store that was saved. like: [B, 0, H, D] in the compute dtype, on the device of the run."""
        saved.same("kind", self._kind, OTHER_LENGTH)
        self._used = saved.integer("used", 0, self.capacity + 1)
        self.slots = saved.pairs("slots", high=self._used)
        self.positions = saved.pairs("positions", -LARGEST, empty=True)
        if len({*self.slots.values()}) < len(self.slots) or {*self.positions} - {*self.slots}:
            raise ForcingError("The frames of the snapshot contradict each other. Take an earlier or another snapshot.")
        for layer in range(self.layers if self._used else 0):
            self._reserve(layer, like)
            for i, t in enumerate(self._data[layer].tensors()):
                saved.part(f"layer {layer}").fill(str(i), t[:, :self._used])
        if self.newest:
            self.newest.load(saved.part("newest"), like)

    @property
    def _kind(self) -> list:
        return [type(self).__name__, self.keys.value]

    def _runs(self, frames: tuple[int, ...]):
        """(start, stop, slot): stretches of `frames` that lie in neighbouring slots."""
        start = 0
        for i in range(1, len(frames) + 1):
            if i == len(frames) or self.slots[frames[i]] != self.slots[frames[i - 1]] + 1:
                yield start, i, self.slots[frames[start]]
                start = i

    def _layer(self, layer: int, like: Tensor) -> Layer:
        """The buffers of a layer, allocated at their first use."""
        self._reserve(layer, like)
        return self._at(layer)

    def _shape(self, like: Tensor) -> tuple[int, ...]:
        batch, _, heads, head_dim = like.shape
        return batch, self.capacity, self.frame_tokens, heads, head_dim
