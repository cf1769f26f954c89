"""Everything about a rollout that is not a tensor, and the checks that can be made before the long work starts."""
from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Sequence

from .accelerate import way
from .errors import ForcingError
from .plan import Block, layout
from .policies import KINDS, ReferenceOptions, WindowOptions
from .presets import POLICIES, Preset
from .rollout.knot import Knot
from .schedule import Level, levels, unipc_levels
from .solvers import euler_levels
from .sparse import Sparse

# How a sigma of the graph becomes the timestep that the network is told.
TIMESTEPS = {
    "exact": lambda sigma: 1000.0 * sigma,
    "round": lambda sigma: float(round(1000.0 * sigma)),  # unwarped integer lists (CausVid)
    "floor": lambda sigma: float(int(1000.0 * sigma)),  # the many-step teacher
}
SAME_SIGMA = 2e-3
COUNTED = {"unipc": unipc_levels, "euler": euler_levels}  # solver -> levels of so many steps, under a shift


@dataclass(frozen=True)
class RolloutOptions:
    """block: latent frames a block. cache: options of the cache policy. first_sigmas: sigmas of the first
    generated block, falling, without the final 0. context_timestep: timestep of clean passes. timesteps: key
    of TIMESTEPS. solver: "renoise" or "unipc". noise: "block" (keyed by seed, block and step), "comfy"
    (core's numbers) or "reference" (the official order). allow_tail: a shorter last block. expected: sigmas
    that the chosen system was trained on; others are refused. guided: made for classifier-free guidance.
    keep_on_interrupt: return finished blocks when the user interrupts. knot: latent frames that neighbouring blocks share.
    joined: make the clean pass of a block and the first noisy one of the next in one forward, where the memory allows it.
    sparse: attention to a part of what is remembered. accelerate: key of `accelerate.WAYS`.

    Raises ForcingError for a knot that does not go with the rest, and for a way to accelerate that there is not.
    """

    system: str = ""
    block: int = 3
    cache: Any = field(default_factory=WindowOptions)
    independent_first: bool = False
    first_sigmas: tuple[float, ...] | None = None
    context_timestep: float = 0.0
    timesteps: str = "exact"
    solver: str = "renoise"
    noise: str = "block"
    allow_tail: bool = False
    expected: tuple[float, ...] | None = None
    guided: bool = False
    keep_on_interrupt: bool = False
    knot: Knot = Knot()
    joined: bool = False
    sparse: Sparse = Sparse()
    accelerate: str = "off"

    def __post_init__(self):
        way(self.accelerate)
        # the policy plans in blocks of the sampler, whatever the cache node was built for
        object.__setattr__(self, "cache", replace(self.cache, block=self.block))
        self.knot.check(self.cache, self.noise)

    @property
    def rollout(self) -> str:
        """Key of `rollout.ROLLOUTS`."""
        return "knot" if self.knot.frames or isinstance(self.cache, ReferenceOptions) else self.cache.rollout

    @property
    def order(self) -> dict[str, Any]:
        """What `rollout.calls` asks about a knot rollout beside the rest."""
        return {"ahead": self.knot.frames, "over": self.cache.rollout}


def levels_of(preset: Preset) -> tuple[Level, ...]:
    """Levels of every block of a preset, noisiest first."""
    if preset.solver in COUNTED:
        return COUNTED[preset.solver](preset.step_count, preset.shift)
    return levels(preset.steps, preset.shift, preset.warp)


def first_levels_of(preset: Preset) -> tuple[Level, ...] | None:
    """Levels of the first generated block where a preset has its own (Causal Forcing++)."""
    return levels(preset.first_steps, preset.shift, preset.warp) if preset.first_steps else None


def sigmas_of(preset: Preset) -> tuple[float, ...]:
    """Sigmas of a preset, noisiest first, with the final 0."""
    return tuple(level.sigma for level in levels_of(preset)) + (0.0,)


def first_sigmas_of(preset: Preset) -> tuple[float, ...] | None:
    """Sigmas of `first_levels_of`, without the final 0."""
    first = first_levels_of(preset)
    return None if first is None else tuple(level.sigma for level in first)


def _timestep_rule(preset: Preset) -> str:
    return "floor" if preset.solver == "unipc" else "exact" if preset.warp else "round"


def settings_of(preset: Preset) -> tuple[str, ...]:
    """Names of the settings that the cache policy of a preset has.

    Raises ForcingError for a preset whose policy this version does not have.
    """
    if preset.policy not in KINDS:
        raise ForcingError(f"{preset.name} cannot be run here: {POLICIES[preset.policy]}. Use self-forcing or longlive.")
    return tuple(f.name for f in fields(KINDS[preset.policy][0]))


def cache_of(preset: Preset, **changes) -> Any:
    """Options of the cache policy of a preset; `changes` (window, sink, positions ...) go before its own values.

    Raises ForcingError for a preset whose policy this version does not have, and for changes of what it has not got.
    """
    known = settings_of(preset)
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise ForcingError(f"{preset.name} runs the cache policy {preset.policy!r}, which has no setting "
                           f"{', '.join(unknown)}. Leave it out, or use one of {', '.join(known)}.")
    own = {"window": preset.window, "sink": preset.sink, "block": preset.block, "positions": preset.positions,
           **dict(preset.options)}
    return KINDS[preset.policy][0](**{**{name: value for name, value in own.items() if name in known}, **changes})


def from_preset(preset: Preset, cache: Any = None) -> RolloutOptions:
    """The options of a published system; `cache` (options of any cache policy) replaces its own."""
    return RolloutOptions(
        system=preset.title, block=preset.block, independent_first=preset.independent_first,
        cache=cache or cache_of(preset),
        first_sigmas=first_sigmas_of(preset), context_timestep=preset.context_timestep,
        timesteps=_timestep_rule(preset), solver=preset.solver, expected=sigmas_of(preset), guided=preset.cfg != 1.0)


def check_sigmas(sigmas: Sequence[float], options: RolloutOptions) -> None:
    """Refuse sigmas that do not fall from at most 1 to 0, or that another system was trained on."""
    text = ", ".join(f"{s:.4g}" for s in sigmas)
    falling = all(a > b for a, b in zip(sigmas, sigmas[1:]))
    if len(sigmas) < 2 or sigmas[-1] != 0 or not falling or sigmas[0] > 1.0 + 1e-6:
        raise ForcingError(f"The sigmas [{text}] cannot be used: they have to fall from at most 1 to exactly 0. "
                           "Connect the SIGMAS output of Forcing Preset or Forcing Sigmas.")
    wanted = options.expected
    if wanted is None:
        return
    if len(wanted) != len(sigmas) or any(abs(a - b) > SAME_SIGMA for a, b in zip(sigmas, wanted)):
        raise ForcingError(f"The sigmas [{text}] are not those of {options.system} "
                           f"[{', '.join(f'{s:.4g}' for s in wanted)}]. Connect the SIGMAS output of the same Forcing "
                           "Preset, or use Forcing Sampler to run a schedule of your own.")


def levels_from(sigmas: Sequence[float], rule: str) -> tuple[Level, ...]:
    """Levels of a graph's sigmas (final 0 allowed and dropped) under one timestep rule."""
    return tuple(Level(TIMESTEPS[rule](s), s) for s in sigmas if s > 0)


def pixel_frames(latent_frames: int) -> int:
    """Frames of video that so many latent frames decode to: 1 + 4*(latent_frames - 1)."""
    return 1 + 4 * (latent_frames - 1)


def blocks_of(frames: int, given: int, options: RolloutOptions) -> tuple[Block, ...]:
    """Blocks of a video of `frames` latent frames with `given` ones in front.

    Raises ForcingError naming the two nearest legal lengths when the block grid does not fit.
    """
    try:
        return layout(frames - given, options.block, given=given, independent_first=options.independent_first,
                      allow_tail=options.allow_tail)
    except ForcingError:
        if frames <= given:
            raise
    head = 1 if options.independent_first and given == 0 else 0
    tail = (frames - given - head) % options.block
    near = [n for n in (frames - tail, frames - tail + options.block) if n > given]
    names = " or ".join(f"{n} latent frames ({pixel_frames(n)} frames of video)" for n in near)
    raise ForcingError(f"{frames} latent frames ({given} of them given) do not divide into blocks of {options.block}. "
                       f"Use {names}, or allow a shorter last block in Forcing Sampler.")
