"""Random combinations of a cache policy's settings and a rollout's, for any policy in KINDS, and the videos they describe.

Nothing here knows a policy by name: options are drawn field by field from the table `VALUES`, so a new policy is in every
test of compositions as soon as its row is in KINDS and its fields are in the table.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, Callable

import torch
from forcing_pack.forcing_core.codecs import CODECS
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import Memory, make_memory
from forcing_pack.forcing_core.plan import Block, layout
from forcing_pack.forcing_core.policies import build
from forcing_pack.forcing_core.policies.base import storage_of
from forcing_pack.forcing_core.rollout import ROLLOUTS, RolloutState, Switch, most_frames
from forcing_pack.forcing_core.rollout.transitions import TRANSITIONS, check_switches
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.wan import WanConfig
from forcing_testkit import forcing_corekit as core
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

SIZE, GRID, TOKENS = (4, 4), (2, 2), 4
CONFIG = WanConfig(dim=128, ffn_dim=64, heads=1, layers=2, in_channels=core.CHANNELS, out_channels=core.CHANNELS,
                   freq_dim=32, text_dim=core.TEXT_DIM)
STEPS = (1000, 750, 500)
LONGEST = 64  # latent frames of which there is noise
QUANTISED = 0.2
TRIES = 30  # draws of options until some make sense together

FLAG = (False, True)
# name of a field -> values it takes in a test: small, and all that there are of names
VALUES: dict[str, tuple] = {
    "active": (0, 1, 2), "aligned": FLAG, "alpha": (0.5, 0.0, 0.9, 1.0), "beta": (3.0, 0.0, 12.0), "block": (1, 2, 3, 4),
    "budget": (4, 1, 2, 3, 6, 8, 10), "candidates": (2, 1, 4), "compact": FLAG, "dense": (0, 1, 3, 99), "fast": (4, 1, 2, 3, 6),
    "gamma": (0.1, 0.5), "group": ("head", "block", "token"), "history": (1, 0, 2), "hole": FLAG, "interval": (1, 2, 3, 6),
    "farthest": (27, 2), "jitter": (0.0, 0.8), "limit": (1024, 7, 8, 10, 13, 16), "lookahead": (8, 1),
    "mode": ("surprise", "uniform"), "nearest": (1, 2), "novelty": (2.0, 0.0),
    "offload": FLAG, "positions": ("relative", "absolute", "rebased"), "promote": (1, 2, 3), "radius": (1, 0, 2),
    "recent": (3, 0, 1, 2, 4), "references": (1, 2), "released": FLAG, "reservoir": (9, 7, 12, 16),
    "reuse_cap": (None, 1, 2, 7), "sink": (1, 0, 2, 3),
    "sink_dtype": ("model", "float32"),
    "slow": (2, 1, 3, 5), "steps": (3, 4),
    "store": tuple(CODECS), "stride": (4, 1), "tau": (0.6, 0.2, 0.9, 1.5), "top_k": (1, 0, 2, 3),
    "weight": (0.3, 1.0), "window": (6, 4, 5, 7, 8, 9, 12, None),
}
STORAGE = ("store", "offload", "dense")  # only where a policy's store takes variants
# type of a value -> values that somebody may type in, sensible or not
ODD = {int: (-3, -1, 0, 1, 2, 3, 5, 8, 13, 50, 2000), float: (-1.0, 0.0, 1.0, 1.5, 1e9, float("nan"), float("inf")),
       str: ("", "nonsense"), bool: FLAG, type(None): (None,)}


@dataclass(frozen=True)
class Combination:
    """One rollout. frames: latent frames of the whole video, `given` leading ones included. steps: of a block."""

    options: Any
    frames: int
    given: int = 0
    steps: int = 1
    independent_first: bool = False
    switches: tuple[Switch, ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        return layout(self.frames - self.given, self.options.block, given=self.given,
                      independent_first=self.independent_first)

    @property
    def ahead(self) -> int:
        """Blocks that are denoised together with the oldest one in work: what is final may depend on so many more."""
        return most_frames(self.options.rollout, 1, self.steps) - 1

    @property
    def forgets(self) -> bool:
        """Whether something is thrown away that no policy evicts."""
        return any(s.renew_sink or s.transition in ("flush", "jump", "cut") for s in self.switches)

    def rounding(self, other: Combination) -> float:
        """How far videos of two lengths may lie apart: a codec that rounds keys before their rotation in one of them and
        after it in the other rounds other numbers."""
        storage = storage_of(self.options)
        kept = {storage.keys(build(made.options, made.frames).keys) for made in (self, other)}
        return 0.0 if storage.coder.exact or len(kept) == 1 else QUANTISED

    def until(self, frames: int) -> Combination:
        """The same rollout of a shorter video."""
        return replace(self, frames=frames, switches=tuple(s for s in self.switches if s.at < frames))


def values_of(kind: type) -> dict[str, tuple]:
    """Values of every field of an options dataclass."""
    names = [f.name for f in fields(kind)]
    missing = [name for name in names if name not in VALUES]
    assert not missing, (f"{kind.__name__} has fields that no test of compositions draws: {', '.join(missing)}. Add a row for "
                         "each, with a few small values, to VALUES in tests/support/composekit.py.")
    return {name: VALUES[name] for name in names if kind.variants or name not in STORAGE}


@st.composite
def options(draw, kind: type):
    """Options that make sense together."""
    table = {name: st.sampled_from(values) for name, values in values_of(kind).items()}
    for _ in range(TRIES):
        drawn = {name: draw(values) for name, values in table.items()}
        if drawn.get("store") == "model":
            drawn["dense"] = 0
        try:
            return kind(**drawn)
        except ForcingError:
            continue
    reject()


@st.composite
def odd_settings(draw, kind: type):
    """Settings by name: sensible ones, up to two of which were replaced by whatever has the right type."""
    sensible = draw(options(kind))
    settings = {f.name: getattr(sensible, f.name) for f in fields(kind)}
    for name in draw(st.lists(st.sampled_from(sorted(settings)), min_size=1, max_size=2)):
        odd = [v for kinds in sorted({type(known) for known in VALUES[name]}, key=str) for v in ODD[kinds]]
        settings[name] = draw(st.sampled_from([*odd, *VALUES[name]]))
    return settings


@st.composite
def combinations(draw, kind: type, longest: int = 16):
    """A rollout that can be carried out: options, lengths, given frames, a short first or last block, prompt switches."""
    chosen = draw(options(kind))
    long = draw(st.integers(0, 3)) < 3
    frames = draw(st.integers(longest // 2, longest) if long else st.integers(1, longest // 2))
    given = draw(st.integers(0, min(5, frames - 1)) | st.just(0))
    steps = draw(st.sampled_from([s for s in (1, 2, 3) if _fits(chosen, s)]))
    made = Combination(chosen, frames, given, steps, draw(st.booleans()))
    try:
        policy = build(chosen, frames)
    except ForcingError:  # absolute positions end before the video does
        reject()
    allowed = [s for s in _switches(made.blocks) if _can(s, policy, chosen.rollout)]
    switches = sorted(draw(st.lists(st.sampled_from(allowed), max_size=2, unique_by=lambda s: s.at)), key=lambda s: s.at)
    numbered = [replace(s, segment=n, previous=n - 1) for n, s in enumerate(switches, 1)]
    return replace(made, switches=tuple(numbered))


def _fits(chosen, steps: int) -> bool:
    """Whether what is denoised together has room beside the sink; a block always has."""
    room = (getattr(chosen, "window", None) or LONGEST) - getattr(chosen, "sink", 0)
    return steps == 1 or most_frames(chosen.rollout, chosen.block, steps) <= room


def _switches(blocks: tuple[Block, ...]) -> list[Switch]:
    made = [Switch(block.first, 1, transition=name, weight=0.5) for name in TRANSITIONS for block in blocks]
    return made + [replace(s, renew_sink=True) for s in made if s.transition == "recache"]


def _can(switch: Switch, policy, rollout: str) -> bool:
    try:
        check_switches([switch], policy, rollout)
    except ForcingError:
        return False
    return True


def can_run(made: Combination) -> bool:
    return all(_can(switch, build(made.options, made.frames), made.options.rollout) for switch in made.switches)


@functools.cache
def network():
    return core.network(config=CONFIG)


@functools.cache
def drawn(sample: int) -> Tensor:
    """[frames, steps + 1, C, H, W]: noise of a sample, and its given latents behind it."""
    return torch.randn(LONGEST, len(STEPS) + 1, core.CHANNELS, *SIZE, generator=torch.Generator().manual_seed(900 + sample))


@dataclass(frozen=True)
class SampleNoise:
    """Noise that belongs to samples and frames, not to batches and lengths. Other noise from frame `changed` on."""

    samples: tuple[int, ...]
    changed: int = LONGEST

    def latents(self, first: int, end: int, step: int) -> Tensor:
        """[B, C, end - first, H, W]"""
        x = torch.stack([drawn(s)[first:end, step].transpose(0, 1) for s in self.samples])
        later = torch.arange(first, end) >= self.changed
        return x + later[:, None, None].to(x)

    def initial(self, block: Block) -> Tensor:
        return self.latents(block.first, block.end, 0)

    def renoise(self, block: Block, step: int) -> Tensor:
        return self.latents(block.first, block.end, step + 1)


def empty(made: Combination) -> Memory:
    return make_memory(made.options, made.frames, layers=CONFIG.layers, grid=GRID, head_dim=core.HEAD_DIM, device="cpu",
                       heads=CONFIG.heads)


def taken(memory: Memory) -> tuple[int, int]:
    """Bytes of the device and of the host."""
    return memory.store.nbytes, getattr(memory.store, "host_nbytes", 0)


def video(made: Combination, *, samples=(0,), into: Memory | None = None, changed: int = LONGEST,
          after: Callable[[Memory, str], None] | None = None) -> Tensor:
    """Generated x0 [B, C, frames - given, H, W]. into: the memory to use. changed: first frame with other noise.
    after: called with the memory and the phase after every forward."""
    memory, noise = into or empty(made), SampleNoise(samples, changed)
    target = denoiser(memory, samples)
    return rollout(made, _Watched(target, memory, after) if after else target, noise)


def denoiser(memory: Memory, samples=(0,)) -> NetworkDenoiser:
    """The network of all videos here, with prompts that belong to samples."""
    prompts = [torch.cat([core.prompts(seed=10 * segment + s) for s in samples]) for segment in range(3)]
    return NetworkDenoiser(network(), [Condition(prompts, memory)])


def rollout(made: Combination, denoiser, noise, blocks: int | None = None, resume: RolloutState | None = None) -> Tensor:
    """The rollout of a combination with any denoiser. blocks: only so many. resume: where to go on, and what to keep up."""
    context = noise.latents(0, made.given, len(STEPS)) if made.given else None
    run = ROLLOUTS[made.options.rollout]
    return torch.cat([x0 for _, x0 in islice(run(
        denoiser, made.blocks, levels(STEPS[:made.steps], 5.0), noise, context=context, block=made.options.block,
        independent_first=made.independent_first, window=build(made.options, made.frames).capacity,
        switches=made.switches, resume=resume), blocks)], dim=2)


class _Watched:
    """A denoiser that shows its memory after every call."""

    def __init__(self, inner: NetworkDenoiser, memory: Memory, after: Callable[[Memory, str], None]):
        self._inner, self._memory, self._after = inner, memory, after

    def __call__(self, x, given_levels, first, phase):
        out = self._inner(x, given_levels, first, phase)
        self._after(self._memory, phase)
        return out

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


class Walker:
    """A denoiser without a network: every pass meets every layer once, with the same meaningless numbers. For long videos.

    note: called with every pass, which has made room in the store but has not written to it."""

    def __init__(self, memory: Memory, note: Callable[[Any], None]):
        self._memory, self._note = memory, note
        self._numbers = torch.randn(3, 1, LONGEST * TOKENS, 1, core.HEAD_DIM, generator=torch.Generator().manual_seed(5))

    def __call__(self, x, given_levels, first, phase):
        now = self._memory.begin(first, x.shape[2], phase)
        self._note(now)
        tokens = x.shape[2] * self._memory.store.frame_tokens
        for layer in range(self._memory.store.layers):
            now.exchange(layer, *self._numbers[:, :, :tokens])
        return 0.5 * x if phase == "noisy" else None

    def replace_text(self, segment):
        pass

    def blend_text(self, a, b, weight):
        pass

    def __getattr__(self, name: str):  # forget, flush, jump
        return getattr(self._memory, name)


def walk(made: Combination, note: Callable[[Any], None]) -> Memory:
    """Carry a combination out without a network, with one token a frame in one layer."""
    memory = make_memory(made.options, made.frames, layers=1, grid=(1, 1), head_dim=core.HEAD_DIM, device="cpu",
                         heads=1)
    rollout(made, Walker(memory, note), SampleNoise((0,)))
    return memory
