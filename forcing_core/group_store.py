"""Groups of merged tokens: a store that keeps, beside whole frames, one entry for all tokens that say the same.

Axis legend: B batch, G groups of a layer, n tokens, H heads, D head_dim.

What a group is, and who joins which, is told in `policies/merging.py`. Every layer and sample has groups of its own.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .codecs import CODECS, Buffer, Codec, Empty, bits, picked, tensors
from .errors import ForcingError
from .offload import Stages, pinned
from .rope import Rope, rotate
from .saved import Saved, Tree
from .store import Store


class Rule(Protocol):
    """tau: cosine above which a token joins a group. radius: rows and columns that it may lie away from it."""

    tau: float
    radius: int


def group_bytes(count: int, coder: Codec, *, dim: int, element_size: int) -> int:
    """Bytes of so many groups; dim = heads * 128."""
    heads = max(1, dim // 128)
    numbers = coder.bytes((count, 1, 1, heads, dim // heads), element_size) + count * dim * sum_type(coder).itemsize
    return numbers + count * (4 + 2 * 8)  # members, last frame, cell


def sum_type(coder: Codec) -> torch.dtype:
    """Of the sums of values. Sums are added to for as long as a group lives, so codes of one byte would not do; what
    bfloat16 loses is less than what such codes lose of the keys."""
    return torch.float32 if coder.exact else torch.bfloat16


@dataclass
class Groups:
    """Groups of one layer. keys: latest raw key, a buffer of `codec` [B, G, 1, H, D]. values [B, G, H, D] of `sum_type`:
    sum over members. members [B, G] float32. last, cells [B, G] int64: frame of the latest member, its number in that
    frame. used: groups of each sample; what lies behind them means nothing."""

    codec: Codec
    keys: Buffer
    values: Tensor
    members: Tensor
    last: Tensor
    cells: Tensor
    used: list[int]

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, [B, G, ...]."""
        return *(t[:, :, 0] for t in tensors(self.keys)), self.values, self.members, self.last, self.cells

    @classmethod
    def empty(cls, size: int, like: Tensor, codec: Codec = CODECS["model"], empty: Empty | None = None) -> Groups:
        """Room for `size` groups of tokens like [B, n, H, D], in memory from `empty` or where `like` is."""
        batch, _, heads, head_dim = like.shape
        empty = empty or like.new_empty
        zeros = lambda shape, dtype: empty(shape, dtype=dtype).zero_()  # noqa: E731
        return cls(codec, codec.make((batch, size, 1, heads, head_dim), like.dtype, zeros),
                   zeros((batch, size, heads, head_dim), sum_type(codec)), zeros((batch, size), torch.float32),
                   zeros((batch, size), torch.long), zeros((batch, size), torch.long), [0] * batch)

    def at(self, groups: slice, samples: slice = slice(None)) -> Tensor:
        """Raw keys [B, n, H, D] of these groups."""
        return self.codec.unpack(picked(self.keys, lambda t: t[samples, groups]))[:, :, 0]

    def add(self, frame: int, keys: Tensor, values: Tensor, rule: Rule, columns: int) -> None:
        """Merge a whole frame; raw keys and values [B, tokens, H, D]."""
        for sample in range(keys.shape[0]):
            joins, group = self._matches(sample, keys[sample], rule, columns)
            self._join(sample, frame, keys[sample], values[sample], joins, group[joins])
            rest = (~joins).nonzero()[:, 0]
            self._trim(sample, frame, self.members.shape[1] - len(rest))
            self._start(sample, frame, keys[sample], values[sample], rest)

    def _matches(self, sample: int, keys: Tensor, rule: Rule, columns: int) -> tuple[Tensor, Tensor]:
        """(whether a token joins a group, the group most like it), each [tokens]."""
        used, tokens = self.used[sample], torch.arange(keys.shape[0], device=keys.device)
        if used == 0:
            return torch.zeros_like(tokens, dtype=torch.bool), tokens
        cells = self.cells[sample, :used]
        known = self.at(slice(used), slice(sample, sample + 1))[0]
        alike = normalize(keys.flatten(1).float(), dim=1) @ normalize(known.flatten(1).float(), dim=1).T
        rows_apart = (tokens[:, None] // columns - cells // columns).abs()
        columns_apart = (tokens[:, None] % columns - cells % columns).abs()
        best = alike.masked_fill(torch.maximum(rows_apart, columns_apart) > rule.radius, -2.0).max(dim=1)
        return best.values > rule.tau, best.indices

    def _join(self, sample: int, frame: int, keys: Tensor, values: Tensor, joins: Tensor, group: Tensor) -> None:
        """Put tokens into groups; where several join one, the last of them leaves its key."""
        token = joins.nonzero()[:, 0]
        self.values[sample].index_put_((group,), values[token].to(self.values.dtype), accumulate=True)
        self.members[sample].index_put_((group,), torch.ones_like(group, dtype=torch.float32), accumulate=True)
        latest = torch.full_like(self.cells[sample], -1).scatter_reduce(0, group, token, "amax")
        met = (latest >= 0).nonzero()[:, 0]
        self._place(sample, met, frame, keys, latest[met])

    def _trim(self, sample: int, frame: int, room: int) -> None:
        """Leave at most `room` groups: those with the most members for the frames since the last one joined."""
        used = self.used[sample]
        if used <= room:
            return
        worth = self.members[sample, :used] / (1 + frame - self.last[sample, :used])
        stay = worth.argsort(descending=True, stable=True)[:room].sort().values
        for tensor in map(bits, self.tensors()):
            tensor[sample, :room] = tensor[sample, stay]
        self.used[sample] = room

    def _start(self, sample: int, frame: int, keys: Tensor, values: Tensor, token: Tensor) -> None:
        """A group for each of these tokens."""
        first = self.used[sample]
        self.used[sample] = first + len(token)
        new = torch.arange(first, self.used[sample], device=token.device)
        self.values[sample, new] = values[token].to(self.values.dtype)
        self.members[sample, new] = 1.0
        self._place(sample, new, frame, keys, token)

    def _place(self, sample: int, group: Tensor, frame: int, keys: Tensor, token: Tensor) -> None:
        packed = self.codec.pack(keys[token][None, :, None])
        for kept, latest in zip(tensors(self.keys), tensors(packed)):
            bits(kept)[sample, group] = bits(latest)[0]
        self.last[sample, group] = frame
        self.cells[sample, group] = token

    def state(self) -> Tree:
        most = max(self.used)
        return {"used": list(self.used), **{str(i): t[:, :most] for i, t in enumerate(self.tensors())}}

    def load(self, saved: Saved, cells: int) -> None:
        """cells: tokens of a frame."""
        used = saved.integers("used", 0, self.members.shape[1] + 1)
        if len(used) != len(self.used):
            raise ForcingError("The groups of the snapshot are those of another batch. Take the latent of the first run.")
        self.used = list(used)
        for i, t in enumerate(self.tensors()):  # the cells, by which tables of rotations are looked up, are the last
            saved.fill(str(i), t[:, :max(used)], *((0, cells - 1) if t is self.cells else (0,) if t is self.last else ()))

    def read(self, shift: int, lowest: int, rows: int, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(rotated keys, mean values [B, n, H, D], log of the members [B, n]) of as many groups as the fullest sample
        has. A group stands at its last frame - shift, but not below `lowest`; all positions are below `rows`. The other
        samples are filled up with entries of weight 0."""
        n = max(self.used)
        table = rope.tokens((self.last[:, :n] - shift).clamp(min=lowest), self.cells[:, :n], 0, rows)
        filled = torch.arange(n, device=table.device) < torch.tensor(self.used, device=table.device)[:, None]
        members = self.members[:, :n].masked_fill(~filled, 0.0)
        keys = self.at(slice(n))
        keys = torch.where(filled[..., None, None], keys, keys[:, :1])
        values = self.values[:, :n] / members.clamp(min=1.0)[..., None, None]
        return rotate(keys, table), values.type_as(keys).masked_fill(~filled[..., None, None], 0.0), members.log()


class MergedStore(Store):
    """A store with groups of merged tokens beside its frames. size: most groups of a layer. groups: layer -> its groups,
    where they live; with offload that is host memory, and `at` gives them to work with."""

    def __init__(self, *args, groups: int, **variant):
        super().__init__(*args, **variant)
        self.size = groups
        self.groups: dict[int, Groups] = {}
        self._shown: Stages | None = None  # the device's share of them, with offload

    @property
    def nbytes(self) -> int:
        here = 0 if self.storage.offload else self._bytes_of_groups()
        return super().nbytes + here + (self._shown.nbytes if self._shown else 0)

    @property
    def host_nbytes(self) -> int:
        return super().host_nbytes + self.storage.offload * self._bytes_of_groups()

    def _bytes_of_groups(self) -> int:
        return sum(t.nbytes for groups in self.groups.values() for t in groups.tensors())

    def clear(self) -> None:
        super().clear()
        self._forget_groups()

    def keep(self, frames: Sequence[int]) -> None:
        super().keep(frames)
        self._forget_groups()

    def _forget_groups(self) -> None:
        for groups in self.groups.values():
            groups.used = [0] * len(groups.used)

    def free(self) -> None:
        super().free()
        self.groups.clear()
        self._shown = None

    def state(self) -> Tree:
        if self._shown is not None:
            self._shown.finish()
        return super().state() | {f"groups {layer}": groups.state() for layer, groups in self.groups.items()}

    def load(self, saved: Saved, like: Tensor) -> None:
        super().load(saved, like)
        for layer in range(self.layers):
            if f"groups {layer}" in saved:
                self._make_groups(layer, like)
                self.groups[layer].load(saved.part(f"groups {layer}"), self.frame_tokens)

    def merge(self, layer: int, leaving: Sequence[tuple[int, int]], rule: Rule, columns: int) -> None:
        """Merge these frames, each with the slot that it lies in."""
        data = self._at(layer)
        for frame, slot in leaving:
            raw, v = (self._codec.read(buffer, [slice(slot, slot + 1)]) for buffer in (data.raw, data.v))
            if layer not in self.groups:
                self._make_groups(layer, raw)
            self.at(layer).add(frame, raw, v, rule, columns)
        if self._shown is not None:
            self._shown.keep(self.groups[layer], slice(max(self.groups[layer].used)))

    def at(self, layer: int) -> Groups | None:
        """The groups of a layer where they can be worked on, or None where nothing was merged yet."""
        groups = self.groups.get(layer)
        if groups is None or self._shown is None:
            return groups
        most = max(max(each.used) for each in self.groups.values())
        shown = self._shown.enter(layer, [self.groups.get(each) for each in range(self.layers)], slice(most))
        return replace(shown, used=groups.used)

    def _make_groups(self, layer: int, like: Tensor) -> None:
        make = partial(Groups.empty, self.size, like[:, :0], self._codec)
        self.groups[layer] = make(pinned(like.device)) if self.storage.offload else make()
        if self.storage.offload and self._shown is None:
            self._shown = Stages(like.device, make)
