"""Deep Forcing's participative compression: past frames shrink to the tokens that recent queries ask for most.

When a block would overflow the window, the frames between the sink and the newest ones are replaced by their best
tokens, chosen layer by layer over all heads together (scores are products of keys with the sum of the queries of the
newest frames). The sink moves along as in `deep_sink`, but only then: it starts `budget` frames before the block.
Until the window is full again nothing moves. Source: arXiv 2512.05081 (Deep Forcing), public repo
cvlab-kaist/DeepForcing; runs on Self Forcing weights without training.

Plans know whole frames only. Whether a block overflows is decided with the chosen tokens counted as
`budget - sink - recent` frames, also where the reuse cap leaves fewer.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Sequence

from torch import Tensor

from ..errors import ForcingError
from ..passes import Pass
from ..plan import Call, Plan
from ..rope import TABLE_ROWS, Rope, rotate
from ..saved import LARGEST, Saved, Tree
from ..store import Keys, Store, store_bytes, store_host_bytes
from ..token_notes import Choice, Stand, token_store_bytes, token_store_host_bytes
from ..token_store import TokenStore
from .base import CacheOptions
from .deep_sink import bounded, check_length, check_limit, rebased


@dataclass(frozen=True)
class DeepCompressOptions(CacheOptions):
    """window: latent frames that may be held, the block included, before a compression. sink: leading frames that stay
    whole and move along. block: latent frames a block. budget: frames that a compression leaves: the sink, the
    `recent` newest ones (the block among them) and tokens for the rest. reuse_cap: how often a token may be chosen
    (the released code; None is the paper: no limit).
    aligned: False is the released code: chosen tokens keep their own temporal positions. True is the paper: they
    stand in order right behind the sink, a frame's worth of them at each position.
    hole: as in `DeepSinkOptions`; the paper is hole False with aligned True. positions, limit: as there.
    compact: keep only raw keys (a third less memory, rotated at every read). store, offload, dense: as in
    `CacheOptions`; dense frames lie behind the sink.
    """

    window: int = 21
    sink: int = 10
    block: int = 3
    budget: int = 16
    recent: int = 4
    reuse_cap: int | None = 7
    aligned: bool = False
    hole: bool = True
    positions: str = "absolute"
    limit: int = TABLE_ROWS
    compact: bool = False
    overlaps: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        bounded(self)
        check_limit(self)
        if self.sink < 1:
            raise ForcingError("A compression needs a sink, in front of which nothing was ever evicted. Use a sink of 1 or "
                               "more frames; 10 is published.")
        if self.recent < self.block:
            raise ForcingError(f"recent = {self.recent} frames cannot hold a block of {self.block}, which must stay whole. "
                               f"Use recent {self.block} or more.")
        if not self.sink + self.recent <= self.budget <= self.window:
            raise ForcingError(f"A budget of {self.budget} frames does not lie between sink + recent = "
                               f"{self.sink + self.recent} and the window of {self.window}. Use a number between them.")
        if self.reuse_cap is not None and self.reuse_cap < 1:
            raise ForcingError(f"reuse_cap = {self.reuse_cap} makes no sense. Use at least 1, or None for no limit.")

    @property
    def room(self) -> int:
        """Frames' worth of tokens that a compression chooses."""
        return self.budget - self.sink - self.recent


def compressed(held: tuple[int, ...]) -> bool:
    """Whether frames are missing among those held, as they are from the first compression on."""
    return bool(held) and held[-1] - held[0] + 1 > len(held)


class DeepCompress:
    """Plans of the compression. `frames` is the length of the whole video in latent frames; one that fits into the
    window is never compressed and has a plain store.

    Remembers where the last compression put the sink. Raises ForcingError when absolute positions would run past the table.
    """

    def __init__(self, options: DeepCompressOptions, frames: int):
        check_length(options, frames)
        self.options = options
        self.capacity = min(options.window, frames)
        self._compresses = frames > options.window
        self.keys = Keys.ROPED if not self._compresses else Keys.RAW if options.compact else Keys.BOTH
        # how many compressions the tokens of a frame may outlive it
        self._lingers = 0 if not options.room else frames if options.reuse_cap is None else options.reuse_cap
        self._sink_at = 0  # where the sink starts since the last compression
        self._choice = Choice(options.sink, options.room, options.recent, options.reuse_cap)

    def plan(self, call: Call) -> Plan:
        """The pass of `call`. It compresses exactly when it evicts."""
        options, held = self.options, call.held
        replay = call.phase == "recache" and bool(held)
        new = () if replay else tuple(f for f in call.span if f not in held)
        whole, evict = held + new, ()
        if len(whole) + options.room * compressed(held) > options.window:
            evict = whole[options.sink:len(whole) - options.recent]
        read = tuple(f for f in whole if f not in evict)
        if evict:
            touching = read[options.sink] - options.room - options.sink
            self._sink_at = call.first - options.budget if options.hole else touching
        locked = held[:options.sink] if replay and call.first > held[0] else ()
        write = tuple(f for f in call.span if f in read and f not in locked)
        over = rebased(call, options.limit)
        return Plan(evict, write, read, tuple(p - over for p in self._positions(read)),
                    tuple(f - over for f in call.span))

    def _positions(self, read: tuple[int, ...]) -> tuple[int, ...]:
        if not compressed(read):
            return read
        sink = self.options.sink
        return tuple(range(self._sink_at, self._sink_at + sink)) + read[sink:]

    def lingering(self, evictions: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Frames of which tokens may have been chosen, where one compression after the other evicted these."""
        return tuple(chain.from_iterable(evictions[max(0, len(evictions) - self._lingers):]))

    def make_pass(self, plan: Plan, call: Call, store: Store | TokenStore, rope: Rope) -> Pass:
        if not self._compresses:
            return Pass(plan, call, store, rope)
        over, options = rebased(call, self.options.limit), self.options
        behind = self._sink_at + options.sink - over if options.aligned and compressed(plan.read) else None
        return CompressPass(plan, call, store, rope, Stand(over, behind))

    def make_store(self, layers: int, capacity: int, frame_tokens: int, keys: Keys, **variant) -> Store | TokenStore:
        if not self._compresses:
            return Store(layers, capacity, frame_tokens, keys, **variant)
        return TokenStore(layers, capacity, frame_tokens, keys, self._choice, **variant)

    def state(self) -> Tree:
        return {"sink_at": self._sink_at}

    def load(self, saved: Saved) -> None:
        self._sink_at = saved.integer("sink_at", -LARGEST, LARGEST)

    def store_bytes(self, **sizes: int) -> int:
        """As `store.store_bytes`, with the records of chosen tokens and of queries."""
        sizes |= {"capacity": self.capacity, "keys": self.keys, "storage": self.options.storage}
        return token_store_bytes(self._choice, **sizes) if self._compresses else store_bytes(**sizes)

    def store_host_bytes(self, **sizes: int) -> int:
        """As `store.store_host_bytes`."""
        sizes |= {"capacity": self.capacity, "keys": self.keys, "storage": self.options.storage}
        return token_store_host_bytes(**sizes) if self._compresses else store_host_bytes(**sizes)


@dataclass
class CompressPass(Pass):
    """A pass that lets the store see its queries and compresses where its plan evicts.

    observes: the network makes queries even where nothing attends with them, in the last layer of a silent pass.
    """

    store: TokenStore
    stand: Stand
    observes: ClassVar[bool] = True

    def exchange(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        store, plan, rope = self.store, self.plan, self.rope
        q, roped = rotate(q, self._turn), rotate(k, self._turn)
        store.observe(layer, q, self.stand.over, rope)
        if plan.evict:
            store.choose(layer, rope)
        if plan.write:
            store.write(layer, plan.write, *(self._clip(t, self._kept) for t in (k, roped, v)))
        store.align(layer, plan, self.stand, rope)
        keys, values = store.read(layer, plan, self.stand, rope)
        if layer == store.layers - 1:
            store.settle(plan, self.stand)
        return q, keys, values
