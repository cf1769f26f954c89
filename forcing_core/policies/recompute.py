"""The memory of a rollout that recomputes its context before every block: never older than that block.

A frame's temporal position is its place in the window. The rollout empties the memory and writes the context anew, so
nothing ever moves, and frame numbers are those that the rollout gives: it puts the first frame of the video in front
of the newest ones. Past keys may count less than the first frame's and the block's own ones: `weight` multiplies their
share before the softmax is normalised.

Sources: public repo krea-ai/realtime-video (Krea Realtime 14B); the weight is that of its port in daydreamlive/scope
("KV cache attention bias", 0.01 to 1; the usual value there is 0.3), which applies it in denoising steps only.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import ClassVar

from ..bias import BiasedPass
from ..errors import ForcingError
from ..plan import Call, Plan
from ..rope import Rope
from ..store import Keys, Store
from .base import CacheOptions


@dataclass(frozen=True)
class RecomputeOptions(CacheOptions):
    """window: latent frames one pass may attend to, current block included; what the block leaves of it is recomputed
    before every block. block: latent frames a block. weight: share of past keys but those of the first frame, above 0;
    1 leaves them as they are. store, offload, dense: as in `CacheOptions`.
    """

    window: int = 6
    block: int = 3
    weight: float = 1.0
    positions: ClassVar[str] = "relative"
    sink: ClassVar[int] = 0
    rollout: ClassVar[str] = "recompute"

    def __post_init__(self):
        super().__post_init__()
        if self.block < 1 or self.window is None or self.window <= self.block:
            raise ForcingError(f"A recomputed window of {self.window} frames has no room for any context beside a block of "
                               f"{self.block}. Use a window of at least {max(1, self.block) + 1} frames.")
        if not 0 < self.weight < inf:
            raise ForcingError(f"weight = {self.weight} makes no sense: past keys are multiplied by it. Use a number above 0, "
                               "1 for no change.")


class Recompute:
    """Plans of the recomputed window: everything that is held, at its place."""

    keys = Keys.ROPED

    def __init__(self, options: RecomputeOptions, frames: int):
        self.options = options
        self.capacity = min(options.window, frames)

    def plan(self, call: Call) -> Plan:
        known = tuple(sorted({*call.held, *call.span}))
        read = known[-self.capacity:]
        place = {frame: frame - read[0] for frame in read}
        evict = tuple(f for f in call.held if f not in place)
        return Plan(evict, call.span, read, tuple(place.values()), tuple(place[f] for f in call.span))

    def make_pass(self, plan: Plan, call: Call, store: Store, rope: Rope) -> BiasedPass:
        past = [f for f in plan.read if f < call.first][1:] if call.phase == "noisy" and self.options.weight != 1 else []
        return BiasedPass(plan, call, store, rope, dict.fromkeys(past, log(self.options.weight)))
