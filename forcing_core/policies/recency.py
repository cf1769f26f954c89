"""Recency Forcing: what is long ago counts less, at the noisy steps already after one block, at the clean ones gradually.

    sink | history | recent | current block          as published 3 + 12 + 3 + 3 latent frames
    bias of a history frame = -beta * d^g            d = (distance - recent) / history, g = gamma * 2^t

The distance is that of whole blocks, t = 1 .. 4 counts the published denoising steps from the noisiest on. Sink, recent
frames and the call's own ones have no bias. Positions are counted inside the window, so the length is unlimited.

Source: arXiv 2609.19729 (Recency Forcing), which names neither the bias of the clean pass (here that of the last step)
nor that of other step lists (here t goes on evenly between the published steps). Runs on Self Forcing weights.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from ..bias import BiasedPass
from ..errors import ForcingError
from ..plan import Call, Plan
from ..rope import Rope
from ..store import Store
from .base import CacheOptions
from .deep_sink import bounded
from .window import Window

SHIFT, STEPS = 5.0, 4  # of the published list 1000, 750, 500, 250


@dataclass(frozen=True)
class RecencyOptions(CacheOptions):
    """window: latent frames one pass may attend to, sink and current block included. sink: leading frames that are never
    evicted, recent: newest past ones; neither gets a bias. block: latent frames a block; what is left is history.
    beta: strength of the bias at the far end of the history. gamma: how soon it gets there, doubled at every step.
    compact: as in `WindowOptions`. store, offload, dense: as in `CacheOptions`.
    """

    window: int = 21
    sink: int = 3
    recent: int = 3
    block: int = 3
    beta: float = 12.0
    gamma: float = 0.1
    compact: bool = False
    positions: ClassVar[str] = "relative"

    def __post_init__(self):
        super().__post_init__()
        bounded(self)
        if self.recent < 0 or self.history < 1:
            raise ForcingError(f"A window of {self.window} frames with {self.sink} sink, {self.recent} recent and {self.block} "
                               "own ones leaves no history to put a bias on. Use a window of at least "
                               f"{self.sink + max(0, self.recent) + self.block + 1} frames and recent of at least 0.")
        if not (0 <= self.beta < inf and 0 <= self.gamma <= 10):
            raise ForcingError(f"beta {self.beta} and gamma {self.gamma} make no sense. Use a beta of at least 0 "
                               "and a gamma from 0 to 10.")

    @property
    def history(self) -> int:
        """Latent frames between the sink and the recent ones, once the window is full."""
        return self.window - self.sink - self.recent - self.block


def step_of(sigma: float) -> float:
    """1 .. 4: which of the published steps a noise level (0..1) is, or lies between; 4 for cleaner ones."""
    unshifted = sigma / (SHIFT - (SHIFT - 1) * sigma)
    return min(1 + STEPS * (1 - unshifted), STEPS)


class Recency:
    """Plans of a window with relative positions; the biases are added by its pass."""

    def __init__(self, options: RecencyOptions, frames: int):
        self.options = options
        self._window = Window(bounded(options), frames)
        self.capacity, self.keys = self._window.capacity, self._window.keys

    def plan(self, call: Call) -> Plan:
        return self._window.plan(call)

    def flushed(self, held: tuple[int, ...], last: int) -> tuple[int, ...]:
        """What a flush leaves of the held frames: the sink and the newest `last`."""
        return self._window.flushed(held, last)

    def make_pass(self, plan: Plan, call: Call, store: Store, rope: Rope) -> BiasedPass:
        return BiasedPass(plan, call, store, rope, self.biases(plan, call))

    def biases(self, plan: Plan, call: Call) -> dict[int, float]:
        """Source frame -> what is added to the logits of its keys, for those that get a bias."""
        options = self.options
        power = options.gamma * 2 ** step_of(call.sigma)
        far = {f: -(-(call.first - f) // options.block) * options.block - options.recent
               for f in plan.read[options.sink:] if f < call.first}
        return {f: -options.beta * (distance / options.history) ** power for f, distance in far.items() if distance > 0}
