"""A window of W latent frames, the first S of them a sink that is never evicted.

Sources: Self Forcing (arXiv 2506.08009; W, S = 0), LongLive (2509.22622; W 12, S 3, and its "infinity"
variant with block-relative positions), Infinity-RoPE (2511.20649), LoL (2601.16914; jitter 0.8 over a window of 12
with a sink of 3; here in time only, with a draw of our own: neither its seed nor its axes are published in words).
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import ForcingError
from ..plan import Call, Plan
from ..rope import TABLE_ROWS, THETA
from ..store import Keys
from .base import CacheOptions

JITTER_SEED = 0  # the published one is not known


@dataclass(frozen=True)
class WindowOptions(CacheOptions):
    """window: latent frames one pass may attend to, sink and current block included; None is everything.
    sink: leading frames that are never evicted. block: latent frames a block.
    positions: "absolute" (as trained; at most `limit` frames), "relative" (counted inside the window) or
    "rebased" (absolute until frame `limit`, then everything but the sink slides along; unlimited length).
    limit: first temporal position that may not be used; 1024 is the published table, smaller values bound
    the distance between sink and query to what the model was trained on.
    compact: keep only raw keys where positions move (a third less memory, rotated at every read; int8 and fp8
    stores always do). jitter: every head turns in time by a base of its own, 10000 * (1 - jitter .. 1 + jitter), so
    that the heads do not all find the sink again at the same distance; 0 is the trained base. store, offload, dense:
    as in `CacheOptions`.
    """

    window: int | None = None
    sink: int = 0
    block: int = 3
    positions: str = "absolute"
    limit: int = TABLE_ROWS
    compact: bool = False
    jitter: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.jitter < 1:
            raise ForcingError(f"jitter = {self.jitter} makes no sense: it is a share of the base of the positions. Use at "
                               "least 0 and less than 1, 0.8 as published.")
        if self.positions not in POSITIONS:
            raise ForcingError(f"positions = {self.positions!r} is not known. Use one of {', '.join(POSITIONS)}.")
        if self.sink < 0 or self.block < 1 or (self.window is not None and self.window < 1):
            raise ForcingError(f"window {self.window}, sink {self.sink}, block {self.block} make no sense. "
                               "The window and the block need at least 1 frame, the sink at least 0.")
        if self.window is not None and self.window - self.sink < self.block:
            raise ForcingError(f"A window of {self.window} frames with {self.sink} sink frames leaves no room for a "
                               f"block of {self.block}. Use a window of at least {self.sink + self.block} frames.")
        if self.limit < self.span:
            raise ForcingError(f"The position limit {self.limit} is smaller than the window of {self.span} frames. "
                               f"Use a limit of at least {self.span}.")

    @property
    def span(self) -> int:
        """Most frames that can stand behind each other: the window, or one block where it is unlimited."""
        return self.window if self.window is not None else self.block


def _absolute(read: tuple[int, ...], span: tuple[int, ...], options: WindowOptions):
    return read, span


def _rebased(read: tuple[int, ...], span: tuple[int, ...], options: WindowOptions):
    """Slide everything but the sink so that the newest frame stays below the limit.

    Attention depends on differences of positions only, so without a sink this is exact; with one, the
    distance to the sink stops growing at the limit. A sink that would collide stands right before the rest, and so
    does every sink in relative positions, whatever was forgotten between them. A scene that began with an empty
    memory counts from its first sink frame.
    """
    sink, rest = read[:options.sink], read[options.sink:]
    start = sink[0] if sink else 0
    over = start + max(0, span[-1] - start - options.limit + 1)
    query = tuple(f - over for f in span)
    if not rest:
        return tuple(f - over for f in sink), query
    before, packed = rest[0] - over - len(sink), options.positions == "relative"
    stand = tuple(before + i if packed else min(f - start, before + i) for i, f in enumerate(sink))
    return stand + tuple(f - over for f in rest), query


# name -> (read frames, frames of the call, options) -> (positions of the read frames, query positions)
POSITIONS = {"absolute": _absolute, "rebased": _rebased, "relative": _rebased}


class Window:
    """Plans of the sliding window. `frames` is the length of the whole video in latent frames.

    Raises ForcingError when absolute positions would run past the table.
    """

    def __init__(self, options: WindowOptions, frames: int):
        self.capacity = frames if options.window is None else min(options.window, frames)
        if options.positions == "relative":  # counted inside the window: the limit is the window itself
            options = replace(options, limit=options.window or max(frames, options.block))
        self.options = options
        moving = frames > options.limit
        self.keys = (Keys.RAW if options.compact else Keys.BOTH) if moving else Keys.ROPED
        if moving and (options.positions == "absolute" or options.window is None):
            raise ForcingError(f"{frames} latent frames need temporal positions past {options.limit - 1}, where "
                               f"{options.positions} positions end without a window. Set a window and positions to "
                               f"'relative' or 'rebased', or make at most {options.limit} latent frames.")
        self._place = POSITIONS[options.positions]

    def plan(self, call: Call) -> Plan:
        """The pass of `call`: overwrite what is held, else evict the oldest frames after the sink."""
        replay = call.phase == "recache" and bool(call.held)
        new = () if replay else tuple(f for f in call.span if f not in call.held)
        evict = self._evicted(call.held, len(new))
        read = tuple(sorted({*call.held, *new} - {*evict}))
        # a replay that does not start at the first frame of the scene leaves the sink as it was, and frames that
        # already left the window only query: nobody reads them (LongLive's global sink)
        locked = call.held[:self.options.sink] if replay and call.first > call.held[0] else ()
        write = tuple(f for f in call.span if f in read and f not in locked)
        positions, query = self._place(read, call.span, self.options)
        return Plan(evict, write, read, positions, query)

    def bases(self, heads: int) -> tuple[float, ...]:
        """Bases of the angles in time, one for each of so many heads; none where all have the trained one. The same in
        every run."""
        if not self.options.jitter:
            return ()
        drawn = torch.rand(heads, generator=torch.Generator().manual_seed(JITTER_SEED), dtype=torch.float64)
        return tuple((THETA * (1 + self.options.jitter * (2 * drawn - 1))).tolist())

    def flushed(self, held: tuple[int, ...], last: int) -> tuple[int, ...]:
        """What a flush leaves of the held frames: the sink and the newest `last`."""
        return tuple(sorted({*held[:self.options.sink], *held[max(0, len(held) - last):]}))

    def _evicted(self, held: tuple[int, ...], incoming: int) -> tuple[int, ...]:
        over = max(0, len(held) + incoming - self.capacity)
        return held[self.options.sink:self.options.sink + over]
