"""A window for every denoising step: a step of a block sees what the same step of earlier blocks left, as noisy as it was.

So there is no clean pass: every forward leaves its keys and values for the next block's forward at the same noise level, and
the steps of neighbouring blocks can run on several devices at once ("timestep-forcing pipeline"). The store holds as many
windows as there are steps; frames of different steps are told apart by their number in it. Given frames are clean and lie with
the first step, where all steps see them.

nearest, farthest: how many frames behind the newest one a reference stands, drawn anew for every forward, for networks that
keep one in view (`wan.s2v`).

Source: arXiv 2512.04677 (Live Avatar), public repo Alibaba-Quark/LiveAvatar: 4 steps, blocks of 3, 12 frames, and a reference 4
to 30 frames behind the first frame of a block.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import ForcingError
from ..passes import Pass
from ..plan import Call, Plan
from ..rope import Rope
from ..saved import Saved, Tree
from ..store import Store
from .window import Window, WindowOptions

SHELF = 1 << 32  # frame f of step number s is number f + s * SHELF in the store
MOST = 32  # steps


@dataclass(frozen=True)
class PerStepOptions(WindowOptions):
    """window, sink, block, positions, ...: as in `WindowOptions`, of every step. steps: noise levels that blocks are denoised
    at, MOST at most. nearest, farthest: as above."""

    window: int | None = 12
    positions: str = "relative"
    steps: int = 4
    nearest: int = 1
    farthest: int = 27
    rollout: ClassVar[str] = "per_step"
    overlaps: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.steps <= MOST or not 1 <= self.nearest <= self.farthest:
            raise ForcingError(f"steps {self.steps}, nearest {self.nearest}, farthest {self.farthest} make no sense. Use 1 to "
                               f"{MOST} steps, and a reference at least 1 frame away; 4, 1 and 27 are those of Live Avatar.")


@dataclass(frozen=True)
class StepCall(Call):
    """A call whose frames have the numbers of their step in the store."""

    shelf: int = 0

    @property
    def span(self) -> tuple[int, ...]:
        return tuple(f + self.shelf for f in range(self.first, self.first + self.frames))


class PerStep:
    """Plans of one window a step. `frames` is the length of the whole video in latent frames.

    Raises ForcingError, when it plans, for more noise levels than `steps`.
    """

    def __init__(self, options: PerStepOptions, frames: int):
        self.options, self._window = options, Window(options, frames)
        self.replays = self._window.capacity
        self.capacity = options.steps * self.replays
        self.keys = self._window.keys
        self._sigmas: list[float] = []
        self._given = 0  # leading frames that are clean

    def plan(self, call: Call) -> Plan:
        if call.phase != "noisy":
            self._given = max(self._given, call.first + call.frames)
        shelf = self._shelf(call)
        number = {f % SHELF: f for f in call.held if shelf <= f < shelf + SHELF or f < self._given}
        plan = self._window.plan(replace(call, held=tuple(sorted(number))))
        number |= {f: f + shelf for f in range(call.first, call.first + call.frames)}
        evict, write, read = (tuple(number[f] for f in frames) for frames in (plan.evict, plan.write, plan.read))
        return replace(plan, evict=evict, write=write, read=read)

    def make_pass(self, plan: Plan, call: Call, store: Store, rope: Rope) -> Pass:
        return Pass(plan, StepCall(**vars(call), shelf=self._shelf(call)), store, rope)

    def bases(self, heads: int) -> tuple[float, ...]:
        return self._window.bases(heads)

    def state(self) -> Tree:
        return {"sigmas": list(self._sigmas), "given": self._given}

    def load(self, saved: Saved) -> None:
        sigmas = saved.anything("sigmas")
        if not isinstance(sigmas, list) or len(sigmas) > self.options.steps or not all(isinstance(s, float) for s in sigmas):
            saved.fail("sigmas", "is no list of noise levels")
        self._sigmas, self._given = list(sigmas), saved.integer("given", 0, SHELF)

    def _shelf(self, call: Call) -> int:
        if call.phase != "noisy":
            return 0
        sigma = float(call.sigma)
        if sigma not in self._sigmas:
            if len(self._sigmas) == self.options.steps:
                raise ForcingError(f"The memory has room for {self.options.steps} noise levels and there are more. Set steps "
                                   "to their number, and use no other levels for the first block.")
            self._sigmas.append(sigma)
        return self._sigmas.index(sigma) * SHELF
