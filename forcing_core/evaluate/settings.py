"""What is compared: names for a network, a way to run it and a memory. A new comparison is one row.

Rows without training of their own stand on the student's weights. Every cache policy of this version that a published
system has appears by itself, with the numbers of that system: the micro networks were trained on as many latent frames
(21) in the same blocks (3) as theirs. Only the step list is always the one that the micro students were trained on.
"""
from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any, Iterator, Sequence

from ..errors import ForcingError
from ..options import cache_of
from ..policies import KINDS
from ..presets import FEW_STEP, PRESETS, Preset, get
from ..rollout import ROLLOUTS
from ..rollout.transitions import LIMITED
from ..solvers import SOLVERS

BLOCK = 3  # latent frames that the micro networks make at once
ALL = "all"


@dataclass(frozen=True)
class Setting:
    """One way to make a video.

    network: key of `bundle.NETWORKS`. preset: blocks, steps, solver, guidance and memory. changes: cache options that go
    before those of the preset. slow: left out unless it is asked for by name.
    """

    name: str
    title: str
    network: str
    preset: Preset
    changes: tuple[tuple[str, Any], ...] = ()
    slow: bool = False

    def cache(self) -> Any:
        """Options of the cache policy."""
        return cache_of(self.preset, **dict(self.changes))

    @property
    def transition(self) -> str:
        """How a prompt takes over: by a recache, where the rollout can make one."""
        allowed, _ = LIMITED.get(self.cache().rollout, (("recache",), ""))
        return "recache" if "recache" in allowed else allowed[0]

    @property
    def steps(self) -> int:
        """Denoising steps of a block."""
        return self.preset.step_count if self.preset.solver == "unipc" else len(self.preset.steps)


_FEW = get("micro")
_PUBLISHED = get("self-forcing")
_TEACHER = replace(get("causal-forcing-ar-teacher-chunkwise"), step_count=12, cfg=1.3)


def _window(name: str, title: str, network: str = "student", preset: Preset = _FEW, slow: bool = False,
            **changes: Any) -> Setting:
    return Setting(name, title, network, preset, tuple({"window": 21, **changes}.items()), slow)


def _as(preset: Preset) -> Setting:
    """The student in the steps it was trained on, with the memory of a published system."""
    first = _FEW.first_steps if cache_of(preset).rollout == "block" else None
    few = replace(preset, steps=FEW_STEP, first_steps=first, warp=True, shift=_FEW.shift, solver=_FEW.solver, step_count=0)
    return Setting(preset.name, f"run as {preset.title}", "student", few)


def _published() -> Iterator[Setting]:
    """One row for each further cache policy, after the last published system that has it and makes blocks of 3."""
    known = (preset for preset in PRESETS.values() if preset.policy in KINDS and preset.solver in SOLVERS)
    chosen = {preset.policy: preset for preset in known if preset.block == BLOCK and preset.policy != "window"}
    for policy, preset in chosen.items():
        if KINDS[policy][0].rollout in ROLLOUTS:
            yield _as(preset)


_ROWS = (
    _window("teacher", "many-step teacher, guided", "teacher", _TEACHER, slow=True),
    _window("teacher-4-steps", "the same network in 4 steps, unguided", "teacher"),
    _window("teacher-forcing", "consistency on true histories only", "consistency"),
    _window("self-forcing", "Self Forcing, window 21"),
    # what goes wrong in the first block stays, so all rows of blocks but this one take the bundled model's steps there
    _window("self-forcing-first4", "Self Forcing, 4 steps in the first block too", preset=_PUBLISHED),
    _window("self-forcing-window9", "Self Forcing, window 9", window=9),
    _window("self-forcing-sink3", "Self Forcing, window 21 with sink 3", sink=3, positions="relative"),
    # without a sink the same numbers as absolute positions up to rounding, and no end at 1024 frames
    _window("self-forcing-relative", "Self Forcing, relative positions", positions="relative"),
    _window("long", "Self-Forcing++, window 21", "long"),
    *_published(),
    _as(get("lol")),
    _window("self-forcing-int8", "Self Forcing, window 21 in int8", store="int8"),
    _window("self-forcing-fp8", "Self Forcing, window 21 in fp8", store="fp8"),
)

SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _ROWS}
QUICK = ("teacher-forcing", "self-forcing", "self-forcing-window9")
USUAL = tuple(name for name, setting in SETTINGS.items() if not setting.slow)


def choose(names: Sequence[str]) -> tuple[Setting, ...]:
    """The settings of these names, each once; "all" is every one. ForcingError with near names for an unknown one."""
    wanted = SETTINGS if ALL in names else dict.fromkeys(names)
    return tuple(_get(name) for name in wanted)


def _get(name: str) -> Setting:
    if name in SETTINGS:
        return SETTINGS[name]
    near = difflib.get_close_matches(name.lower(), SETTINGS, n=3, cutoff=0.5)
    raise ForcingError(f"There is no setting called {name!r}. " + (f"Did you mean {', '.join(near)}?" if near else
                       f"Choose from {', '.join(SETTINGS)}, or write {ALL}."))
