"""Two rollouts of one long video, one of them much further on, taken a few blocks each in turn: what a block costs, early
and late.

Time is that of the processor spent in this process, so what other programs take does not count; taking turns, both rollouts
see the same caches and the same clock rate, which other programs do change.
"""
from __future__ import annotations

import time
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import memory_bytes, memory_host_bytes
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import KINDS, build
from forcing_pack.forcing_core.policies.base import storage_of
from forcing_pack.forcing_core.rollout import ROLLOUTS
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.standalone import make_denoiser
from forcing_pack.forcing_core.wan import WanModel
from torch import Tensor

MINUTE = 240  # latent frames, at 16 pictures a second
LONG = 20 * MINUTE
WINDOW, SINK = 12, 3  # where a policy's own default is everything, or none


@dataclass(frozen=True)
class Cost:
    """Of the early rollout and of the late one: median processor seconds of a block, those of every group of blocks in
    a row, and bytes of the store on device and host. announced: those bytes as they are told before a run."""

    early: float
    late: float
    early_groups: tuple[float, ...]
    late_groups: tuple[float, ...]
    early_bytes: tuple[int, int]
    late_bytes: tuple[int, int]
    announced: tuple[int, int]

    @property
    def ratio(self) -> float:
        return self.late / self.early

    @property
    def constant_bytes(self) -> bool:
        return self.early_bytes == self.late_bytes == self.announced


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

    def __init__(self, net: WanModel, prompt: Tensor, options, frames: int, size: tuple[int, int], steps: int):
        denoiser = make_denoiser(net, options, frames, size, [prompt])
        self._memory, self._storage = denoiser.conditions[0].memory, storage_of(options)
        self._sizes = {"layers": net.config.layers, "frame_tokens": size[0] * size[1] // 4, "dim": net.config.dim, "batch": 1,
                       "element_size": 4}
        few = levels((1000, 750, 500, 250)[:steps], 5.0)
        noise = BlockNoise(0, (1, net.config.in_channels), size)
        self._blocks = ROLLOUTS[options.rollout](denoiser, layout(frames, options.block), few, noise, block=options.block,
                                                 window=self._memory.policy.capacity)

    def advance(self, frame: int) -> None:
        """Make all blocks up to latent frame `frame`."""
        while next(self._blocks)[0].end < frame:
            pass

    def group(self, blocks: int) -> float:
        """Make so many blocks; processor seconds that one of them took."""
        start = time.process_time()
        for _ in range(blocks):
            next(self._blocks)
        return (time.process_time() - start) / blocks

    @property
    def bytes(self) -> tuple[int, int]:
        return self._memory.store.nbytes, getattr(self._memory.store, "host_nbytes", 0)

    @property
    def announced(self) -> tuple[int, int]:
        return tuple(count(self._memory.policy, self._storage, **self._sizes) for count in (memory_bytes, memory_host_bytes))


def cost(options, net: WanModel, prompt: Tensor, *, frames: int, early: int, late: int, size: tuple[int, int], steps: int,
         groups: int, together: int = 1) -> Cost:
    """Blocks from latent frame `late` on against those from `early` on, of a video of `frames`.

    size: (H, W) of the latent; prompt: [1, n, text_dim]. groups: how many are measured, of `together` blocks each: a policy
    that works harder at every second block is measured over both kinds.
    """
    near, far = (Stage(net, prompt, options, frames, size, steps) for _ in range(2))
    near.advance(early)
    far.advance(late)
    times: dict[Stage, list[float]] = {near: [], far: []}
    for number in range(groups):
        for stage in (near, far) if number % 2 else (far, near):
            times[stage].append(stage.group(together))
    return Cost(median(times[near]), median(times[far]), tuple(times[near]), tuple(times[far]), near.bytes, far.bytes,
                far.announced)
