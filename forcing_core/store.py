"""Keys and values of past frames: one fixed buffer a layer, one slot a latent frame.

Axis legend: B batch, T = capacity * frame_tokens, H heads, D head_dim.

A slot is reused when its frame is evicted; nothing is ever moved. Softmax does not care in which order keys
lie, and every slot's temporal position is known, so a full window costs no copies. Which frame lies in which
slot is Python shared by all layers.

Three arrangements of the keys, chosen by what the policy needs (`Keys`):

    ROPED   only rotated keys. Smallest and fastest; for policies whose written keys never change position.
    BOTH    raw keys and a rotated view, re-rotated only where a plan moved a frame. For moving positions.
    RAW     raw keys only, rotated at every read. Moving positions with a third less memory, more time.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from .errors import ForcingError
from .plan import Plan
from .rope import Rope, rotate


class Keys(Enum):
    ROPED = "roped"
    BOTH = "both"
    RAW = "raw"

    @property
    def tensors(self) -> int:
        """Buffers a layer, values included."""
        return 3 if self is Keys.BOTH else 2


def store_bytes(*, layers: int, capacity: int, frame_tokens: int, dim: int, batch: int, element_size: int,
                keys: Keys) -> int:
    """Bytes a store takes once its first frame is written. dim = heads * head_dim; constant in video length."""
    return layers * capacity * frame_tokens * dim * batch * element_size * keys.tensors


@dataclass
class _Layer:
    """Buffers of one layer, each [B, capacity, tokens, H, D]. `raw` or `roped` is None by arrangement."""

    v: Tensor
    raw: Tensor | None
    roped: Tensor | None


@dataclass
class Store:
    """KV store of one condition.

    layers: number of transformer blocks; capacity: slots in latent frames; frame_tokens: tokens a frame.
    Buffers are allocated at the first write from the tensors seen, so dtype, device, batch and heads are
    never configured twice. Raises ForcingError when a plan needs more slots than there are.
    """

    layers: int
    capacity: int
    frame_tokens: int
    keys: Keys = Keys.ROPED
    slots: dict[int, int] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    _data: list[_Layer | None] = field(init=False, repr=False)

    def __post_init__(self):
        self._data = [None] * self.layers

    @property
    def frames(self) -> tuple[int, ...]:
        """Source frames held, in temporal order."""
        return tuple(sorted(self.slots))

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return sum(t.nbytes for data in self._data if data for t in (data.v, data.raw, data.roped) if t is not None)

    def clear(self) -> None:
        """Forget every frame; the buffers stay."""
        self.slots.clear()
        self.positions.clear()

    def free(self) -> None:
        """Forget every frame and drop the buffers."""
        self.clear()
        self._data = [None] * self.layers

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

    def write(self, layer: int, frames: tuple[int, ...], raw: Tensor, roped: Tensor, v: Tensor) -> None:
        """Keep keys and values [B, len(frames)*tokens, H, D] of these placed frames."""
        data = self._layer(layer, raw)
        for start, stop, slot in self._runs(frames):
            here = slice(slot, slot + stop - start)
            for buffer, new in ((data.v, v), (data.raw, raw), (data.roped, roped)):
                if buffer is not None:
                    buffer[:, here] = new.unflatten(1, (-1, self.frame_tokens))[:, start:stop]

    def align(self, layer: int, plan: Plan, rope: Rope) -> None:
        """Re-rotate the frames that the plan reads at another position than their rotated key has."""
        if self.keys is not Keys.BOTH:
            return
        moved = {f: p for f, p in zip(plan.read, plan.positions) if self.positions.get(f, p) != p}
        data = self._data[layer]
        for start, stop, slot in self._runs(tuple(moved)):
            here = slice(slot, slot + stop - start)
            turn = rope.table(list(moved.values())[start:stop])
            data.roped[:, here] = rotate(data.raw[:, here].flatten(1, 2), turn).unflatten(1, (stop - start, -1))

    def read(self, layer: int, plan: Plan, rope: Rope) -> tuple[Tensor, Tensor]:
        """(rotated keys, values) of the plan's read frames, [B, n*tokens, H, D] each; views where it can be.

        Frames come in slot order. The keys may alias the store: whoever hands them to a kernel that writes to
        its inputs must copy.
        """
        data = self._data[layer]
        where = dict(zip(plan.read, plan.positions))
        frames = tuple(sorted(plan.read, key=self.slots.__getitem__))
        runs = [slice(slot, slot + stop - start) for start, stop, slot in self._runs(frames)]
        v = self._joined(data.v, runs)
        if self.keys is not Keys.RAW:
            return self._joined(data.roped, runs), v
        return rotate(self._joined(data.raw, runs), rope.table([where[f] for f in frames])), v

    def settle(self, plan: Plan) -> None:
        """After the last layer: remember at which position every read frame's rotated key now stands."""
        self.positions.update(zip(plan.read, plan.positions))

    @staticmethod
    def _joined(buffer: Tensor, runs: list[slice]) -> Tensor:
        parts = [buffer[:, run] for run in runs]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(1, 2)

    def _runs(self, frames: tuple[int, ...]):
        """(start, stop, slot): stretches of `frames` that lie in neighbouring slots."""
        start = 0
        for i in range(1, len(frames) + 1):
            if i == len(frames) or self.slots[frames[i]] != self.slots[frames[i - 1]] + 1:
                yield start, i, self.slots[frames[start]]
                start = i

    def _layer(self, layer: int, like: Tensor) -> _Layer:
        if self._data[layer] is None:
            batch, _, heads, head_dim = like.shape
            shape = (batch, self.capacity, self.frame_tokens, heads, head_dim)
            self._data[layer] = _Layer(
                v=like.new_empty(shape),
                raw=None if self.keys is Keys.ROPED else like.new_empty(shape),
                roped=None if self.keys is Keys.RAW else like.new_empty(shape))
        return self._data[layer]
