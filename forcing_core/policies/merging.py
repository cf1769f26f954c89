"""TempCache: tokens that leave the window are merged with the older token they resemble, instead of being dropped.

Sink, recent frames and the current block are kept as they are. A frame that leaves them is merged, layer by layer:
each of its tokens joins the group whose latest raw key is most similar to its own, if the cosine (over all heads) is
above tau and the two lie near each other in the picture; otherwise it starts a group. A group stands for its m members
by one entry: the latest key, at its place in time and picture, the mean of the values, and log m added to the logits,
which is exact where the members' keys are equal. Merging is done at the first forward of a block, so on final keys and
once a block.

The number of groups is capped: the ones with the fewest members for the time since the last one joined go first.

Source: arXiv 2602.01801 (TempCache). The paper finds the most similar key by approximate search over the previous
frame; here the search is exact, over all groups nearby.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..bias import Attention, biased_attention
from ..errors import ForcingError
from ..passes import Pass
from ..plan import Call, Plan
from ..rope import TABLE_ROWS, Rope, rotate
from ..saved import Saved, Tree
from ..store import Keys, Store, store_bytes
from .base import CacheOptions
from .window import Window, WindowOptions


@dataclass(frozen=True)
class MergingOptions(CacheOptions):
    """tau: cosine above which a token joins a group; 0.9 is the paper's, more than 1 merges nothing. sink: first latent
    frames of the video, kept as they are. recent: newest past frames that are. block: latent frames a block.
    radius: rows and columns that a token may lie away from the group it joins. budget: most groups, in latent frames'
    worth of tokens. limit: first temporal position that may not be used; beyond it everything but the sink slides
    along. compact: as in `WindowOptions`, for the frames kept as they are.
    """

    tau: float = 0.9
    sink: int = 1
    recent: int = 3
    radius: int = 1
    budget: int = 12
    block: int = 3
    limit: int = TABLE_ROWS
    compact: bool = False
    positions: ClassVar[str] = "rebased"
    variants: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.recent < 0 or self.radius < 0 or self.budget < 1:
            raise ForcingError(f"recent {self.recent}, radius {self.radius}, budget {self.budget} make no sense. "
                               "Use at least 0, 0 and 1.")
        self.kept()  # checks the rest

    @property
    def window(self) -> int:
        """Latent frames kept as they are, current block included."""
        return self.sink + self.recent + self.block

    def kept(self) -> WindowOptions:
        """The window of those frames."""
        return WindowOptions(self.window, self.sink, self.block, "rebased", self.limit)


class Merging:
    """Plans of the window of dense frames. What became of the others is known to the store."""

    def __init__(self, options: MergingOptions, frames: int):
        self.options = options
        self._window = Window(options.kept(), frames)
        self.capacity = self._window.capacity
        self.groups = min(options.budget, max(0, frames - self.capacity))  # in latent frames' worth of tokens
        self.keys = self._window.keys if not self.groups else Keys.RAW if options.compact else Keys.BOTH

    def plan(self, call: Call) -> Plan:
        return self._window.plan(call)

    def flushed(self, held: tuple[int, ...], last: int) -> tuple[int, ...]:
        """What a flush leaves of the held frames: the sink and the newest `last`; all groups go."""
        return self._window.flushed(held, last)

    def make_pass(self, plan: Plan, call: Call, store: MergedStore, rope: Rope) -> MergingPass:
        return MergingPass(plan, call, store, rope, self.options)

    def make_store(self, layers: int, capacity: int, frame_tokens: int, keys: Keys) -> MergedStore:
        return MergedStore(layers, capacity, frame_tokens, keys, groups=self.groups * frame_tokens)

    def store_bytes(self, *, layers: int, frame_tokens: int, dim: int, batch: int, element_size: int) -> int:
        """As `store.store_bytes`, with the groups; reached when the first frame is merged."""
        group = dim * (element_size + 4) + 4 + 2 * 8  # key, sum of values, members, last frame, cell
        return layers * self.groups * frame_tokens * batch * group + store_bytes(
            layers=layers, capacity=self.capacity, frame_tokens=frame_tokens, dim=dim, batch=batch,
            element_size=element_size, keys=self.keys)


@dataclass
class Groups:
    """Groups of one layer. keys [B, G, H, D]: latest raw key. values [B, G, H, D] float32: sum over members.
    members [B, G] float32. last, cells [B, G] int64: frame of the latest member, its number in that frame.
    used: groups of each sample; what lies behind them means nothing."""

    keys: Tensor
    values: Tensor
    members: Tensor
    last: Tensor
    cells: Tensor
    used: list[int]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.members, self.last, self.cells

    @classmethod
    def empty(cls, size: int, like: Tensor) -> Groups:
        """Room for `size` groups of tokens like [B, n, H, D]."""
        batch, _, heads, head_dim = like.shape
        whole = batch, size, heads, head_dim
        zeros = like.new_zeros
        return cls(zeros(whole), zeros(whole, dtype=torch.float32), zeros(whole[:2], dtype=torch.float32),
                   zeros(whole[:2], dtype=torch.long), zeros(whole[:2], dtype=torch.long), [0] * batch)

    def add(self, frame: int, keys: Tensor, values: Tensor, options: MergingOptions, columns: int) -> None:
        """Merge a whole frame; raw keys and values [B, tokens, H, D]."""
        for sample in range(keys.shape[0]):
            joins, group = self._matches(sample, keys[sample], options, columns)
            self._join(sample, frame, keys[sample], values[sample], joins, group[joins])
            rest = (~joins).nonzero()[:, 0]
            self._trim(sample, frame, self.members.shape[1] - len(rest))
            self._start(sample, frame, keys[sample], values[sample], rest)

    def _matches(self, sample: int, keys: Tensor, options: MergingOptions, columns: int) -> tuple[Tensor, Tensor]:
        """(whether a token joins a group, the group most like it), each [tokens]."""
        used, tokens = self.used[sample], torch.arange(keys.shape[0], device=keys.device)
        if used == 0:
            return torch.zeros_like(tokens, dtype=torch.bool), tokens
        cells = self.cells[sample, :used]
        alike = normalize(keys.flatten(1).float(), dim=1) @ normalize(self.keys[sample, :used].flatten(1).float(), dim=1).T
        rows_apart = (tokens[:, None] // columns - cells // columns).abs()
        columns_apart = (tokens[:, None] % columns - cells % columns).abs()
        best = alike.masked_fill(torch.maximum(rows_apart, columns_apart) > options.radius, -2.0).max(dim=1)
        return best.values > options.tau, best.indices

    def _join(self, sample: int, frame: int, keys: Tensor, values: Tensor, joins: Tensor, group: Tensor) -> None:
        """Put tokens into groups; where several join one, the last of them leaves its key."""
        token = joins.nonzero()[:, 0]
        self.values[sample].index_put_((group,), values[token].float(), accumulate=True)
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
        for tensor in self.tensors:
            tensor[sample, :room] = tensor[sample, stay]
        self.used[sample] = room

    def _start(self, sample: int, frame: int, keys: Tensor, values: Tensor, token: Tensor) -> None:
        """A group for each of these tokens."""
        first = self.used[sample]
        self.used[sample] = first + len(token)
        new = torch.arange(first, self.used[sample], device=token.device)
        self.values[sample, new] = values[token].float()
        self.members[sample, new] = 1.0
        self._place(sample, new, frame, keys, token)

    def _place(self, sample: int, group: Tensor, frame: int, keys: Tensor, token: Tensor) -> None:
        self.keys[sample, group] = keys[token]
        self.last[sample, group] = frame
        self.cells[sample, group] = token

    def state(self) -> Tree:
        most = max(self.used)
        return {"used": list(self.used), **{str(i): t[:, :most] for i, t in enumerate(self.tensors)}}

    def load(self, saved: Saved, cells: int) -> None:
        """cells: tokens of a frame."""
        used = saved.integers("used", 0, self.members.shape[1] + 1)
        if len(used) != len(self.used):
            raise ForcingError("The groups of the snapshot are those of another batch. Take the latent of the first run.")
        self.used = list(used)
        for i, t in enumerate(self.tensors):  # the cells, by which tables of rotations are looked up, are the last
            saved.fill(str(i), t[:, :max(used)], *((0, cells - 1) if t is self.cells else (0,) if t is self.last else ()))

    def read(self, shift: int, lowest: int, rows: int, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(rotated keys, mean values [B, n, H, D], log of the members [B, n]) of as many groups as the fullest sample
        has. A group stands at its last frame - shift, but not below `lowest`; all positions are below `rows`. The other
        samples are filled up with entries of weight 0."""
        n = max(self.used)
        table = rope.tokens((self.last[:, :n] - shift).clamp(min=lowest), self.cells[:, :n], 0, rows)
        filled = torch.arange(n, device=table.device) < torch.tensor(self.used, device=table.device)[:, None]
        members = self.members[:, :n].masked_fill(~filled, 0.0)
        keys = torch.where(filled[..., None, None], self.keys[:, :n], self.keys[:, :1])
        values = self.values[:, :n] / members.clamp(min=1.0)[..., None, None]
        return rotate(keys, table), values.type_as(keys).masked_fill(~filled[..., None, None], 0.0), members.log()


class MergedStore(Store):
    """A store with groups of merged tokens beside its frames. size: most groups of a layer."""

    def __init__(self, *args, groups: int):
        super().__init__(*args)
        self.size = groups
        self.groups: dict[int, Groups] = {}

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(t.nbytes for groups in self.groups.values() for t in groups.tensors)

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

    def state(self) -> Tree:
        return super().state() | {f"groups {layer}": groups.state() for layer, groups in self.groups.items()}

    def load(self, saved: Saved, like: Tensor) -> None:
        super().load(saved, like)
        for layer in range(self.layers):
            if f"groups {layer}" in saved:
                self.groups[layer] = Groups.empty(self.size, like)
                self.groups[layer].load(saved.part(f"groups {layer}"), self.frame_tokens)

    def merge(self, layer: int, frame: int, slot: int, options: MergingOptions, columns: int) -> None:
        """Merge what lies in this slot."""
        data = self._at(layer)
        if layer not in self.groups:
            self.groups[layer] = Groups.empty(self.size, data.raw[:, slot])
        self.groups[layer].add(frame, data.raw[:, slot], data.v[:, slot], options, columns)


@dataclass
class MergingPass(Pass):
    """A pass that merges the frames that it evicts, and attends to the groups beside the frames."""

    store: MergedStore
    options: MergingOptions

    def __post_init__(self):
        # content of evicted frames stays in their slots until this pass writes over it, layer by layer
        self._leaving = [(frame, self.store.slots[frame]) for frame in self.plan.evict]
        self._bias: Tensor | None = None
        super().__post_init__()

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        for frame, slot in self._leaving:
            self.store.merge(layer, frame, slot, self.options, self.rope.grid[1])
        return super().exchange(layer, q, k, v)

    def _read(self, layer: int, roped: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super()._read(layer, roped, v)
        self._bias = None
        groups = self.store.groups.get(layer)
        if groups is None or not any(groups.used):
            return keys, values
        end, limit = self.call.first + self.call.frames, self.options.limit
        merged, means, log = groups.read(max(0, end - limit), self.options.sink, min(end, limit), self.rope)
        self._bias = torch.cat([log.new_zeros(len(log), keys.shape[1]), log], dim=1)
        return torch.cat([keys, merged], dim=1), torch.cat([values, means], dim=1)

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        """Attention with the logarithm of a group's size added to its logits."""
        if self._bias is None:
            return attention(q, keys, values)
        return biased_attention(attention, q, keys, values, self._bias)
