"""The knot: blocks of c latent frames are denoised with k more, which the next block begins with.

Those k frames, the knot, are a first idea of the next block: they are neither emitted nor written into the store. In the
next block they stand, clean, in the places of its first k frames before every forward, so that both sides of the seam were
made looking at each other; in the end its first k frames become the mean of the knot and what the network made of them.

The network learns that they are given in one of two ways (`PINS`), and a denoiser with a method `pin(first, latents)` is
told of them, for networks with channels for given frames. A reference is written before the first block.

Source: arXiv 2512.21734 (Knot Forcing), Eq. 5 and Alg. 1 as a third-party re-implementation gives them.
Axis legend of latents: [B, C, F, H, W].
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import ForcingError
from ..noise import Noise
from ..plan import REFERENCE, Block
from ..schedule import CLEAN, Level
from .block import Solver, block_rollout
from .recompute import recompute_rollout
from .state import RolloutState

# How the network is told that the knot is given: by timestep 0 of those frames, as causal models were trained with mixed
# timesteps; or not at all, by the timestep of the block, where channels for given frames say it.
PINS: dict[str, Callable[[Level], Level]] = {"timestep": lambda level: CLEAN, "level": lambda level: level}
# rollouts that make one block after the other
OVER = {"block": block_rollout, "recompute": recompute_rollout}
# why others cannot
NEVER = {"rolling": "A rolling rollout denoises neighbouring blocks together already, so it has no use for a knot",
         "per_step": "A per_step rollout keeps every denoising step's own noisy frames, and a knot is not noisy"}


@dataclass(frozen=True)
class Knot:
    """frames: latent frames of a knot, 0 for none. fuse: take the mean in the end; with the pin "timestep" the network
    gives the knot itself back, so that changes nothing. pin: key of PINS.

    Raises ForcingError for what makes no sense.
    """

    frames: int = 0
    fuse: bool = True
    pin: str = "timestep"

    def __post_init__(self):
        if self.frames < 0 or self.pin not in PINS:
            raise ForcingError(f"A knot of {self.frames} frames pinned by {self.pin!r} makes no sense. Use at least 0 frames, "
                               f"and one of {', '.join(PINS)}.")

    def check(self, cache: Any, noise: str = "block") -> None:
        """Raise ForcingError where the options of a cache policy, or the noise, do not go with a knot."""
        if not self.frames:
            return
        if cache.rollout not in OVER:
            raise ForcingError(f"{NEVER[cache.rollout]}. Set the knot to 0, or choose a preset that makes one block after the "
                               "other with clean passes, such as self-forcing.")
        if not cache.overlaps:
            raise ForcingError(f"The memory of {type(cache).__name__.removesuffix('Options')} cannot attend to frames that it "
                               "does not keep, which a knot needs. Choose the policy 'window' in Forcing Cache, or a knot of "
                               "0.")
        if self.frames > cache.block:
            raise ForcingError(f"A knot of {self.frames} latent frames is longer than a block of {cache.block}. Use at most "
                               f"{cache.block}.")
        if noise != "block":
            raise ForcingError("The frames of a knot have no place in the noise of a whole clip. Set noise to 'per block' in "
                               "Forcing Sampler, or the knot to 0.")


def knot_rollout(denoiser: Denoiser, blocks: Iterable[Block], levels: Sequence[Level], noise: Noise, *, knot: Knot = Knot(),
                 reference: Tensor | None = None, over: str = "block", resume: RolloutState | None = None,
                 **settings: Any) -> Iterator[tuple[Block, Tensor]]:
    """Yield (block, x0 [B, C, n, H, W]) as each block becomes final; knots are not part of it.

    denoiser: its memories hold `knot.frames` ahead (`make_memory`). noise: asked for blocks that are longer by the knot.
    reference: latents [B, C, r, H, W], written by a clean pass before anything else, for a memory with room for it
    (`policies.ReferenceOptions`). over: key of OVER. resume, settings: as in `block_rollout`. Without a knot and a
    reference this is the rollout `over`, bit for bit. A cut to another scene drops the knot.
    """
    if reference is not None and (resume is None or resume.done is None):
        _pin(denoiser, REFERENCE, reference)
        denoiser(reference, (CLEAN,) * reference.shape[2], REFERENCE, "clean")
    make = {"make": partial(tied, knot=knot)} if knot.frames else {}
    yield from OVER[over](denoiser, blocks, levels, noise, resume=resume, **make, **settings)


def tied(denoiser: Denoiser, block: Block, levels: Sequence[Level], noise: Noise, solver: Solver, state: RolloutState, *,
         knot: Knot) -> Tensor:
    """x0 [B, C, n, H, W] of a block that begins with the knot of `state` and leaves the next one there."""
    longer, given, k = replace(block, frames=block.frames + knot.frames), state.knot, knot.frames
    if given is not None:
        _pin(denoiser, block.first, given)

    def predict(x: Tensor, level: Level) -> Tensor:
        if given is None:
            return denoiser(x, (level,) * longer.frames, block.first, "noisy")
        told = (PINS[knot.pin](level),) * k + (level,) * block.frames
        return denoiser(torch.cat([given, x[:, :, k:]], dim=2), told, block.first, "noisy")

    x0 = solver(noise.initial(longer), levels, predict, lambda step: noise.renoise(longer, step))
    if given is not None and knot.fuse:
        x0 = torch.cat([(given + x0[:, :, :k]) / 2, x0[:, :, k:]], dim=2)
    state.knot = x0[:, :, block.frames:].clone()  # a view would keep the whole block alive
    return x0[:, :, :block.frames]


def _pin(denoiser: Denoiser, first: int, latents: Tensor) -> None:
    pin = getattr(denoiser, "pin", None)
    if pin is not None:
        pin(first, latents)
