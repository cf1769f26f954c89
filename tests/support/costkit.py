"""Two rollouts of one long video, one of them much further on, taken a block each in turn: what a block costs, early and late.

Taking turns, both see the same machine: whatever else it does slows both down alike.
"""
from __future__ import annotations

import time
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, Callable

from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import memory_bytes
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import KINDS, build
from forcing_pack.forcing_core.policies.base import storage_of
from forcing_pack.forcing_core.rollout import ROLLOUTS
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.standalone import make_denoiser
from forcing_pack.forcing_core.wan import WanConfig, WanModel
from forcing_pack.forcing_core.wan.random import random_network, random_prompt

MINUTE = 240  # latent frames, at 16 pictures a second
LONG = 20 * MINUTE
WINDOW, SINK = 12, 3  # where a policy's own default is everything, or none


@dataclass(frozen=True)
class Cost:
    """Median seconds of a block, and bytes of the store on device and host, of the early rollout and of the late one."""

    early: float
    late: float
    early_bytes: tuple[int, int]
    late_bytes: tuple[int, int]

    @property
    def ratio(self) -> float:
        return self.late / self.early


def bounded_options() -> dict[str, Any]:
    """kind -> options of its published sizes, whose memory is the same for a video of any length."""
    return {name: _bounded(name, kind) for name, (kind, _) in KINDS.items()}


def _bounded(name: str, kind: type):
    defaults = {f.name: f.default for f in fields(kind)}
    usual = {"window": WINDOW, "sink": SINK}
    changes = {field: value for field, value in usual.items() if field in defaults and not defaults[field]}
    for positions in ({"positions": p} for p in ("relative", "rebased")) if "positions" in defaults else ({},):
        try:
            made = kind(**changes, **positions)
        except ForcingError:
            continue
        assert _bytes(made, LONG) == _bytes(made, 2 * LONG), (
            f"The memory of {name} grows with the video as {made} has it. Give its bounds in tests/support/costkit.py.")
        return made
    raise AssertionError(f"No positions without an end are known for {name}. Give them in tests/support/costkit.py.")


def _bytes(options, frames: int) -> int:
    return memory_bytes(build(options, frames), storage_of(options), layers=1, frame_tokens=1, dim=128, batch=1, element_size=4)


class Stage:
    """A rollout of a video of `frames` latent frames that can be stopped at any block."""

    def __init__(self, net: WanModel, config: WanConfig, options, frames: int, size: tuple[int, int], steps: int,
                 clock: Callable[[], float]):
        denoiser = make_denoiser(net, options, frames, size, [random_prompt(config, 1)])
        self._memory, self._clock = denoiser.conditions[0].memory, clock
        few = levels((1000, 750, 500, 250)[:steps], 5.0)
        noise = BlockNoise(0, (1, config.in_channels), size)
        self._blocks = ROLLOUTS[options.rollout](denoiser, layout(frames, options.block), few, noise, block=options.block,
                                                 window=self._memory.policy.capacity)

    def advance(self, frame: int) -> None:
        """Make all blocks up to latent frame `frame`."""
        while next(self._blocks)[0].end < frame:
            pass

    def block(self) -> float:
        """Make one block; how long it took."""
        start = self._clock()
        next(self._blocks)
        return self._clock() - start

    @property
    def bytes(self) -> tuple[int, int]:
        return self._memory.store.nbytes, getattr(self._memory.store, "host_nbytes", 0)


def cost(options, config: WanConfig, *, frames: int, early: int, late: int, size: tuple[int, int], steps: int, blocks: int,
         clock: Callable[[], float] = time.perf_counter) -> Cost:
    """Blocks before and at latent frame `late` against those at `early`, of a video of `frames`.

    blocks: how many, the last of which end at about these frames. size: (H, W) of the latent. Random weights.
    """
    net = random_network(config, 0)
    near, far = (Stage(net, config, options, frames, size, steps, clock) for _ in range(2))
    near.advance(early - blocks * options.block)
    far.advance(late - blocks * options.block)
    pairs = [(near.block(), far.block()) for _ in range(blocks)]
    return Cost(*(median(times) for times in zip(*pairs)), near.bytes, far.bytes)
