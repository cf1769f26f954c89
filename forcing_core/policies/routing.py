"""History routing: every query attends to its own frames and to the few past frames that fit it best.

A past frame is described by the mean of its raw keys, for each head; its score for a query is their product, before
any rotation (which would favour near frames). The chosen frames are packed: in temporal order they stand at positions
0, 1, ..., the call's own frames right behind them, so no distance ever exceeds what was chosen and the length is
unlimited. Own frames are always attended to.

Source: arXiv 2512.15702 (Resampling Forcing), which chooses for each query token and has neither public code nor
weights. Here it runs without training, on any weights of the family, and three sizes of group share a choice:

    token   the paper's rule, by a dense mask: exact, and as slow as no routing at all
    block   128 queries in a row; one attention call a group
    head    all queries of a call; one attention call, so the only one that saves time
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Iterator

import torch
from torch import Tensor

from ..bias import Attention
from ..codecs import Buffer, Codec, picked
from ..described_store import DescribedStore, described_bytes
from ..errors import ForcingError
from ..passes import Pass
from ..plan import Call, Plan
from ..rope import Rope, rotate
from ..store import Keys
from .base import CacheOptions
from .window import Window, WindowOptions

QUERY_BLOCK = 128


@dataclass(frozen=True)
class RoutingOptions(CacheOptions):
    """top_k: past latent frames chosen by score. sink: first latent frames of the video that are always chosen
    beside them; recent: the newest past ones (paper: neither). group: "head", "block" or "token", see the module.
    window: latent frames kept, current block included; None keeps all of them. block: latent frames a block.
    store, offload, dense: as in `CacheOptions`; own frames are attended to as they are.
    """

    top_k: int = 5
    sink: int = 1
    recent: int = 3
    group: str = "head"
    window: int | None = None
    block: int = 3
    positions: ClassVar[str] = "packed"
    overlaps: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.group not in GROUPS:
            raise ForcingError(f"group = {self.group!r} is not known. Use one of {', '.join(GROUPS)}.")
        if self.top_k < 0 or self.recent < 0 or self.chosen < 1:
            raise ForcingError(f"top_k {self.top_k} and recent {self.recent} make no sense. Use at least 0 for each, and "
                               "choose at least 1 frame.")
        WindowOptions(self.window, self.sink, self.block, "relative")  # checks the rest

    @property
    def chosen(self) -> int:
        """Past frames that a query attends to, once there are so many."""
        return self.top_k + self.sink + self.recent


class Routing:
    """Plans of routed history: a window of candidates.

    A plan's `positions` are the earliest places that its past frames can get; which one they do is for the pass.
    """

    keys = Keys.RAW

    def __init__(self, options: RoutingOptions, frames: int):
        self.options = options
        self._window = Window(WindowOptions(options.window, options.sink, options.block, "relative"), frames)
        self.capacity = self._window.capacity

    def plan(self, call: Call) -> Plan:
        plan = self._window.plan(call)
        past = [f for f in plan.read if f not in plan.write]
        chosen, first = min(len(past), self.options.chosen), min(plan.write, default=call.first)
        stands = {f: max(0, i - len(past) + chosen) for i, f in enumerate(past)}
        stands.update((f, chosen + f - first) for f in plan.write)
        query = tuple(stands[f] if f in plan.write else max(0, chosen + f - first) for f in call.span)
        return replace(plan, positions=tuple(stands[f] for f in plan.read), query=query)

    def flushed(self, held: tuple[int, ...], last: int) -> tuple[int, ...]:
        """What a flush leaves of the held frames: the sink and the newest `last`."""
        return self._window.flushed(held, last)

    def make_pass(self, plan: Plan, call: Call, store: RoutedStore, rope: Rope) -> RoutedPass:
        return RoutedPass(plan, call, store, rope, self.options)

    def make_store(self, layers: int, capacity: int, frame_tokens: int, keys: Keys, **variant) -> RoutedStore:
        return RoutedStore(layers, capacity, frame_tokens, keys, **variant)

    def store_bytes(self, *, layers: int, frame_tokens: int, dim: int, batch: int, element_size: int) -> int:
        return described_bytes(self.capacity, layers=layers, frame_tokens=frame_tokens, dim=dim, batch=batch,
                               element_size=element_size, keys=self.keys, storage=self.options.storage)


class RoutedStore(DescribedStore):
    """A store that can hand out other frames to every head."""

    def scores(self, layer: int, frames: list[int], q: Tensor) -> Tensor:
        """[B, n, H, len(frames)] of raw queries [B, n, H, D]."""
        means = self.means[layer][:, [self.slots[f] for f in frames]]
        return torch.einsum("bnhd,bfhd->bnhf", q.float(), means)

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(raw keys, values) [B, F * tokens, H, D] of slots [B, H, F], another list for every head."""
        data, newest = self._at(layer), self.newest
        found = [_gathered(self._codec, buffer, slots) for buffer in (data.raw, data.v)]
        if newest is not None and newest.slots:
            copies = slots.new_full((self.capacity,), -1)
            copies[[self.slots[f] for f in newest.slots]] = slots.new_tensor([*newest.slots.values()])
            copies, data = copies[slots], newest._at(layer)
            dense = [_gathered(newest.storage.coder, buffer, copies.clamp(min=0)) for buffer in (data.raw, data.v)]
            found = [torch.where(copies[..., None, None] < 0, a, b) for a, b in zip(found, dense)]
        return tuple(t.permute(0, 2, 3, 1, 4).flatten(1, 2) for t in found)


def _gathered(codec: Codec, buffer: Buffer, slots: Tensor) -> Tensor:
    """[B, H, F, tokens, D] of slots [B, H, F]."""
    b, h = (torch.arange(size, device=slots.device) for size in slots.shape[:2])
    return codec.unpack(picked(buffer, lambda t: t.permute(0, 3, 1, 2, 4)[b[:, None, None], h[None, :, None], slots]))


@dataclass
class RoutedPass(Pass):
    """A pass that hands out its own frames and brings the chosen past ones to the attention itself.

    `past`: candidates, in temporal order.
    """

    store: RoutedStore
    options: RoutingOptions
    past: list[int] = field(init=False)
    _raw: Tensor | None = field(init=False, default=None, repr=False)

    def __post_init__(self):
        self.past = [f for f in self.plan.read if f not in self.plan.write]
        super().__post_init__()

    @property
    def order(self) -> tuple[int, ...]:
        return self.plan.write

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        self._raw = q
        out = super().exchange(layer, q, k, v)
        if self.silent and self.plan.write:
            self.store.describe(layer, self.plan.write, self._clip(k, self._kept))
        return out

    def _read(self, layer: int, roped: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._clip(roped, self._kept), self._clip(v, self._kept)

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        """Attention of rotated q to the chosen frames and to the own ones, which are what `exchange` gave."""
        group = GROUPS[self.options.group] if len(self.past) > self.options.chosen else _everything
        return group(self, layer, q, keys, values, attention) if self.past else attention(q, keys, values)

    def chosen(self, scores: Tensor) -> Tensor:
        """[..., F] scores of `past` -> [..., options.chosen] indices into it, in temporal order."""
        sink = [self.past.index(f) for f in self.plan.read[:self.options.sink] if f in self.past]
        always = sink + list(range(max(0, len(self.past) - self.options.recent), len(self.past)))
        scores = scores.index_fill(-1, torch.tensor(always, dtype=torch.long, device=scores.device), torch.inf)
        return scores.topk(self.options.chosen, dim=-1).indices.sort(dim=-1).values

    def grouped(self, layer: int, size: int) -> Iterator[tuple[slice, Tensor]]:
        """(queries, their choice [B, H, chosen] of `past`) of groups of `size` queries in a row."""
        scores = self.store.scores(layer, self.past, self._raw)
        for start in range(0, scores.shape[1], size):
            here = slice(start, min(start + size, scores.shape[1]))
            yield here, self.chosen(scores[:, here].mean(dim=1))

    def packed(self, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(rotated keys, values) of the frames that each head chose, at the leading positions."""
        slots = torch.tensor([self.store.slots[f] for f in self.past], device=chosen.device)
        raw, values = self.store.gather(layer, slots[chosen])
        return rotate(raw, self.rope.table(range(chosen.shape[-1]))), values


def _everything(now: RoutedPass, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
    """There is nothing to choose: all past frames, in their order."""
    index = torch.arange(len(now.past), device=q.device).expand(q.shape[0], q.shape[2], -1)
    return _joint(attention, q, now.packed(layer, index), (keys, values))


def _by_block(now: RoutedPass, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention,
              size: int = QUERY_BLOCK) -> Tensor:
    return torch.cat([_joint(attention, q[:, here], now.packed(layer, chosen), (keys, values))
                      for here, chosen in now.grouped(layer, size)], dim=1)


def _by_head(now: RoutedPass, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
    return _by_block(now, layer, q, keys, values, attention, q.shape[1])


def _joint(attention: Attention, q: Tensor, *parts: tuple[Tensor, Tensor]) -> Tensor:
    keys, values = (torch.cat(t, dim=1) for t in zip(*parts))
    return attention(q, keys, values)


def _by_token(now: RoutedPass, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
    """Softmax under a dense mask in float32. A frame stands at another place for every query, so the logits are made
    once for each place, with all past frames there, and every query takes those of the place that it gave a frame."""
    scores = now.store.scores(layer, now.past, now._raw)
    picked = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, now.chosen(scores), True)
    place = (picked.cumsum(dim=-1) - 1).masked_fill(~picked, -1)
    index = torch.arange(len(now.past), device=q.device).expand(q.shape[0], q.shape[2], -1)
    slots = torch.tensor([now.store.slots[f] for f in now.past], device=q.device)
    raw, past_values = now.store.gather(layer, slots[index])
    tokens = now.store.frame_tokens
    logits = q.new_full((q.shape[0], q.shape[1], q.shape[2], raw.shape[1]), -torch.inf, dtype=torch.float32)
    for at in range(now.options.chosen):
        there = rotate(raw, now.rope.table([at] * len(now.past)))
        logits = torch.where((place == at).repeat_interleave(tokens, dim=-1), _logits(q, there), logits)
    weights = torch.cat([logits, _logits(q, keys)], dim=-1).softmax(dim=-1)
    return torch.einsum("bnhm,bmhd->bnhd", weights, torch.cat([past_values, values], dim=1).float()).type_as(q)


def _logits(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bnhd,bmhd->bnhm", q.float(), k.float()) * q.shape[-1] ** -0.5


# size of the group that shares a choice -> attention(pass, layer, q, own keys, own values, attention)
GROUPS = {"head": _by_head, "block": _by_block, "token": _by_token}
