"""Memory of Rolling Forcing: joint passes over blocks that are not final yet, and clean passes that store them.

A joint pass ("noisy") stores nothing. It sees the sink, as many stored frames as its own ones leave room for, and
its own ones; the sink stands right before the stored frames, so that all positions follow each other. A clean pass
stores its block and sees the last `window` stored frames where they are in the video: the sink only while it is one
of them. Only the sink ever changes its distance to the rest, so only its keys are kept raw.

Source: arXiv 2509.25161 (Rolling Forcing), public repo TencentARC/RollingForcing.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ForcingError
from ..plan import Call, Plan
from ..rope import TABLE_ROWS, Rope, rotate
from ..store import Keys, Store
from .base import CacheOptions

POSITIONS = ("absolute", "rebased")


@dataclass(frozen=True)
class RollingOptions(CacheOptions):
    """window: latent frames one pass may attend to, sink and its own frames included. sink: leading frames that
    are never evicted, as published one block. block: latent frames a block; as many blocks as there are denoising
    steps are denoised jointly, and the window must hold them beside the sink.
    positions: "absolute" (as published; at most `limit` frames) or "rebased" (the same until frame `limit`, then
    all positions of a pass are counted from a later frame: nothing changes but the last digits, and the length is
    unlimited). limit: first temporal position that may not be used. store, offload, dense: as in `CacheOptions`.
    """

    window: int = 21
    sink: int = 3
    block: int = 3
    positions: str = "absolute"
    limit: int = TABLE_ROWS
    rollout: ClassVar[str] = "rolling"

    def __post_init__(self):
        super().__post_init__()
        if self.positions not in POSITIONS:
            raise ForcingError(f"positions = {self.positions!r} is not known to the rolling window. "
                               f"Use one of {', '.join(POSITIONS)}.")
        if self.sink < 0 or self.block < 1 or self.window is None or self.window - self.sink < self.block:
            raise ForcingError(f"A rolling window of {self.window} frames with a sink of {self.sink} has no room for a "
                               f"block of {self.block}. Use a window of at least {max(0, self.sink) + self.block} frames.")
        if self.limit < self.window:
            raise ForcingError(f"The position limit {self.limit} is smaller than the window of {self.window} frames. "
                               f"Use a limit of at least {self.window}.")


class Rolling:
    """Plans of the rolling window. `frames` is the length of the whole video in latent frames.

    A clean pass reads `window` frames while the sink waits outside of them: hence `window + sink` slots. Raises
    ForcingError when absolute positions would run past the limit.
    """

    def __init__(self, options: RollingOptions, frames: int):
        moving = frames > options.limit
        if moving and options.positions == "absolute":
            raise ForcingError(f"{frames} latent frames need temporal positions past {options.limit - 1}, where absolute "
                               f"positions end. Set positions to 'rebased', or make at most {options.limit} latent frames.")
        self.options = options
        self.capacity = min(options.window + options.sink, frames)
        self.keys = Keys.RAW if moving else Keys.ROPED
        self.make_store = Store if moving else partial(SinkStore, sink=options.sink)

    def plan(self, call: Call) -> Plan:
        evict, write, read, positions, own = (self._joint if call.phase == "noisy" else self._clean)(call)
        base = max(0, call.span[-1] - self.options.limit + 1)  # attention knows differences of positions only
        return Plan(evict, write, read, *(tuple(p - base for p in part) for part in (positions, call.span)), own)

    def _joint(self, call: Call):
        options = self.options
        room = options.window - options.sink - call.frames
        if room < 0:
            raise ForcingError(f"{call.frames} latent frames that are denoised jointly and a sink of {options.sink} do not "
                               f"fit into a window of {options.window}. Use fewer denoising steps (a block is in work "
                               f"for each), or a window of at least {call.frames + options.sink} frames.")
        past = tuple(f for f in call.held if f < call.first)
        sink, working = past[:options.sink], past[options.sink:]
        read = sink + working[max(0, len(working) - room):]
        return (), (), read, range(call.first - len(read), call.first), call.span

    def _clean(self, call: Call):
        over = max(0, len({*call.held, *call.span}) - self.capacity)
        evict = call.held[self.options.sink:self.options.sink + over]
        read = tuple(sorted({*call.held, *call.span} - {*evict}))[-self.options.window:]
        return evict, call.span, read, read, ()


class SinkStore(Store):
    """A store of rotated keys whose first `sink` frames are kept raw and rotated at every read. They are written
    first and never evicted, so they have the first slots."""

    def __init__(self, *args, sink: int, **settings):
        super().__init__(*args, **settings)
        self.sink = sink

    def write(self, layer: int, frames: tuple[int, ...], raw: Tensor, roped: Tensor, v: Tensor) -> None:
        edge = self._edge(frames)
        super().write(layer, frames, raw, torch.cat([raw[:, :edge], roped[:, edge:]], 1) if edge else roped, v)

    def read(self, layer: int, plan: Plan, rope: Rope) -> tuple[Tensor, Tensor]:
        keys, values = super().read(layer, plan, rope)
        edge = self._edge(plan.read)
        if edge:
            turn = rope.table(plan.positions[:edge // self.frame_tokens])
            keys = torch.cat([rotate(keys[:, :edge], turn), keys[:, edge:]], 1)
        return keys, values

    def _edge(self, frames: tuple[int, ...]) -> int:
        """Tokens of those of `frames` that belong to the sink; frames are in temporal order."""
        return sum(frame < self.sink for frame in frames) * self.frame_tokens
