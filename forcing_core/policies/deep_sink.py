"""Deep Forcing's deep sink: a large sink that moves along in time, so that it never gets far from what is made.

The sink's keys keep their content and change their temporal position, at the first forward of every block that
overflows the window. Source: arXiv 2512.05081 (Deep Forcing), public repo cvlab-kaist/DeepForcing; runs on Self
Forcing weights without training.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import ForcingError
from ..plan import Call, Plan
from ..rope import TABLE_ROWS
from ..saved import LARGEST, Saved, Tree
from .base import CacheOptions
from .window import Window, WindowOptions

POSITIONS = ("absolute", "rebased")


@dataclass(frozen=True)
class DeepSinkOptions(CacheOptions):
    """window: latent frames one pass may attend to, sink and current block included. sink: leading frames that are
    never evicted and move along (10 to 14 recommended). block: latent frames a block.
    hole: True is the released code: the sink stays at the first overflow and from then on moves as far as the
    block starts do, which leaves one block of empty positions behind it. False is the paper: the sink touches the
    oldest of the other frames.
    positions: "absolute" (as published; at most `limit` frames) or "rebased" (the same until frame `limit`, then
    all positions are counted from a later frame: no distance changes, and the length is unlimited).
    limit: first temporal position that may not be used. compact: as in `WindowOptions`. store, offload, dense: as in
    `CacheOptions`.
    """

    window: int = 21
    sink: int = 14
    block: int = 3
    hole: bool = True
    positions: str = "absolute"
    limit: int = TABLE_ROWS
    compact: bool = False

    def __post_init__(self):
        super().__post_init__()
        bounded(self)
        check_limit(self)


def bounded(options) -> WindowOptions:
    """The sliding window under a policy of this family: what it keeps and evicts, positions counted inside it.

    Raises ForcingError without a window, or for sizes that make no sense.
    """
    if options.window is None:
        raise ForcingError(f"{type(options).__name__} needs a window: without one nothing is ever evicted. "
                           "Set window to a number of latent frames, 9 to 21 as published.")
    return WindowOptions(options.window, options.sink, options.block, "relative", compact=options.compact)


def check_limit(options) -> None:
    """Raise ForcingError for positions that this family does not have, or a limit that the window does not fit under."""
    if options.positions not in POSITIONS:
        raise ForcingError(f"positions = {options.positions!r} is not known to a moving sink. "
                           f"Use one of {', '.join(POSITIONS)}.")
    least = options.window + options.block
    if options.limit < least:
        raise ForcingError(f"The position limit {options.limit} is too small for a moving sink in a window of "
                           f"{options.window} frames. Use a limit of at least {least}.")


def check_length(options, frames: int) -> None:
    """Raise ForcingError for absolute positions that would run past the table."""
    if frames > options.limit and options.positions == "absolute":
        raise ForcingError(f"{frames} latent frames need temporal positions past {options.limit - 1}, where absolute "
                           f"positions end. Set positions to 'rebased', or make at most {options.limit} latent frames.")


def rebased(call: Call, limit: int) -> int:
    """What is subtracted from every position of a call, so that its last frame stays below the limit."""
    return max(0, call.first + call.frames - limit)


class DeepSink:
    """Plans of the deep sink. `frames` is the length of the whole video in latent frames.

    Remembers how far the sink has moved, since that depends on where the first overflow was; an empty store starts
    anew. Raises ForcingError when absolute positions would run past the table.
    """

    def __init__(self, options: DeepSinkOptions, frames: int):
        check_length(options, frames)
        self.options = options
        self._window = Window(bounded(options), frames)
        self.capacity, self.keys = self._window.capacity, self._window.keys
        self._base: int | None = None  # start of the first block that overflowed
        self._shift = 0

    def plan(self, call: Call) -> Plan:
        plan = self._window.plan(call)
        if not call.held:
            self._base, self._shift = None, 0
        if plan.evict:
            self._base = call.first if self._base is None else self._base
            self._shift = call.first - self._base
        over, shift = rebased(call, self.options.limit), self._shift
        sink, rest = plan.read[:self.options.sink], plan.read[self.options.sink:]
        if sink and rest:  # a short last block moves the rest by less than its start: never past that
            touching = rest[0] - sink[-1] - 1
            shift = min(shift, touching) if self.options.hole else touching
        positions = tuple(f + shift for f in sink) + rest
        return replace(plan, positions=tuple(p - over for p in positions), query=tuple(f - over for f in call.span))

    def state(self) -> Tree:
        return {"base": self._base, "shift": self._shift}

    def load(self, saved: Saved) -> None:
        self._base, self._shift = saved.optional("base", 0, LARGEST), saved.integer("shift", 0, LARGEST)

    def flushed(self, held: tuple[int, ...], last: int) -> tuple[int, ...]:
        """What a flush leaves of the held frames: the sink and the newest `last`."""
        return self._window.flushed(held, last)
