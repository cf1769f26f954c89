"""Restyling a video: every block starts from the source's own block, mixed with noise, and is denoised under a new prompt.

SDEdit (arXiv 2108.01073) a block: `strength` is the share of noise in the mixture, 1 is generation from nothing and 0
the source. The memory holds the restyled blocks, so that a style once found stays. Where much moves, old shapes in the
mixture blur what is new; with `motion` such blocks start from less noise and stay closer to the source. The rule is that
of StreamDiffusionV2 (arXiv 2511.07399; public repo chenfengxu714/StreamDiffusionV2), which measures pixels; here latents
are measured, of which there is a frame for every four of video.

Axis legend of latents: [B, C, F, H, W].
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Iterable, Sequence

from torch import Tensor

from ..denoiser import Denoiser
from ..errors import ForcingError
from ..noise import Noise
from ..plan import Block, Call
from ..schedule import Level, renoise
from .block import Solver, denoise
from .state import RolloutState

ROLLOUTS = ("block", "recompute")  # those whose blocks may each start from a noise level of their own
# why others cannot
NEVER = {"rolling": "A rolling rollout denoises several blocks together, so a block has no start of its own",
         "knot": "A block with a knot begins with the end of the one before, so it has no start of its own",
         "per_step": "A per_step rollout looks back at earlier blocks at its own noise levels, so no block can start elsewhere"}
LEAST = 0.01  # strength that motion leaves, of a positive one
NEAR = 0.02  # a level closer than this below the start is left out: its step would change next to nothing
FOLLOWS = 0.9  # how fast the strength follows the motion, as published
FULL_MOTION = 1.0  # RMS difference of latent frames that counts as 1; unrelated frames differ by 1.4


@dataclass(frozen=True)
class Restyle:
    """strength: 0..1, noise that a block starts from. motion: what a block with full motion starts with less (0.1 as
    published, 0 for none). Raises ForcingError for others."""

    strength: float = 0.8
    motion: float = 0.0

    def __post_init__(self):
        if not 0 <= self.strength <= 1 or not 0 <= self.motion <= 1:
            raise ForcingError(f"strength {self.strength:g} and motion {self.motion:g} make no sense. Use values from 0 to 1.")

    def check(self, rollout: str) -> None:
        """Raise ForcingError for a rollout (key of `rollout.ROLLOUTS`) that cannot restyle."""
        if rollout not in ROLLOUTS:
            raise ForcingError(f"{NEVER[rollout]}. Restyle with the preset self-forcing, or another one that makes block after "
                               "block.")


@dataclass
class Shifted:
    """Noise for a start in the middle: every block begins as its own `latent` mixed with noise at `sigma`."""

    inner: Noise
    latent: Tensor
    sigma: float

    def initial(self, block: Block) -> Tensor:
        noise = self.inner.initial(block)
        return renoise(self.latent[:, :, block.first:block.end].to(noise.device), noise, self.sigma)

    def renoise(self, block: Block, step: int) -> Tensor:
        return self.inner.renoise(block, step)


def exact(sigma: float) -> Level:
    return Level(1000.0 * sigma, sigma)


@dataclass
class Restyling:
    """One run. source: latents of the video in the network's scale, on any device; blocks behind its end are generated as
    usual. blocks: of the video, in order. level_of: sigma -> level, where the network is not told 1000 * sigma.

    strengths: of every block with a source, by its first frame.
    """

    options: Restyle
    source: Tensor
    blocks: Iterable[Block]
    level_of: Callable[[float], Level] = exact
    strengths: dict[int, float] = field(init=False)

    def __post_init__(self):
        self.strengths = strengths(self.options, self.source, self.blocks)

    def levels(self, first: int, levels: Sequence[Level]) -> tuple[Level, ...]:
        """What is left of `levels` for the block that starts at frame `first`."""
        strength = self.strengths.get(first, 1.0)
        if strength >= levels[0].sigma:
            return tuple(levels)
        start = (self.level_of(strength),) if strength > 0 else ()
        return start + tuple(level for level in levels if level.sigma < strength - NEAR)

    def make(self, denoiser: Denoiser, block: Block, levels: Sequence[Level], noise: Noise, solver: Solver,
             state: RolloutState) -> Tensor:
        """x0 [B, C, n, H, W] of a block: the `make` of a rollout."""
        left = self.levels(block.first, levels)
        if not left:
            return self.source[:, :, block.first:block.end].to(noise.initial(block))
        if left[0].sigma < levels[0].sigma:
            noise = Shifted(noise, self.source, left[0].sigma)
        return denoise(denoiser, block, left, noise, solver, state)

    def calls(self, calls: Iterable[Call], levels: Sequence[Level], first_levels: Sequence[Level] | None) -> list[Call]:
        """Those of a rollout's forwards (`rollout.calls`) that are made here."""
        kept, seen = [], {}
        for call in calls:
            if call.phase == "noisy" and call.first in self.strengths:
                every = first_levels if first_levels and call.first == min(self.strengths) else levels
                seen[call.first] = seen.get(call.first, 0) + 1
                if seen[call.first] > len(self.levels(call.first, every)):
                    continue
            kept.append(call)
        return kept


def strengths(options: Restyle, source: Tensor, blocks: Iterable[Block]) -> dict[int, float]:
    """First frame of a block -> strength that it starts with, for the blocks that lie in the source."""
    found, now = {}, options.strength
    for block in blocks:
        if block.end > source.shape[2]:
            break
        if options.motion:
            wanted = options.strength - options.motion * motion(source, block)
            now = max(min(LEAST, options.strength), FOLLOWS * wanted + (1 - FOLLOWS) * now)
        found[block.first] = now
    return found


def motion(source: Tensor, block: Block) -> float:
    """0..1: the largest difference between a latent frame of the block and the one before it."""
    frames = source[:, :, max(0, block.first - 1):block.end].float()
    if frames.shape[2] < 2:
        return 0.0
    differences = (frames[:, :, 1:] - frames[:, :, :-1]).pow(2).mean(dim=(0, 1, 3, 4)).sqrt()
    return min(1.0, float(differences.max()) / FULL_MOTION)
