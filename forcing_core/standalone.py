"""A published system over our own network, without ComfyUI: what the demo and the benchmarks run.

Axis legend of latents: [B, C, F, H, W].
"""
from __future__ import annotations

from typing import Any, Iterator, Sequence

from torch import Tensor

from .denoiser import Condition, Denoiser, NetworkDenoiser
from .errors import ForcingError
from .memory import make_memory
from .noise import Noise
from .options import cache_of, first_levels_of, levels_of
from .plan import Block, layout
from .policies import KINDS, build, replayed_frames
from .presets import Preset
from .rollout import ROLLOUTS
from .solvers import SOLVERS
from .sparse import Sparse
from .wan import WanModel


def window_options(preset: Preset, **changes) -> Any:
    """The cache policy of a preset; `changes` (window, sink, positions ...) go before its own values.

    Raises ForcingError for a preset with a policy or a solver that this version does not have.
    """
    if preset.policy in KINDS and preset.solver not in SOLVERS:
        raise ForcingError(f"{preset.name} cannot be run here: its solver {preset.solver!r} is not part of this version. "
                           "Use self-forcing or longlive.")
    return cache_of(preset, **changes)


def make_denoiser(net: WanModel, options: Any, frames: int, size: tuple[int, int],
                  prompts: Sequence[Tensor], guidance: float = 1.0, ahead: int = 0,
                  sparse: Sparse | None = None) -> NetworkDenoiser:
    """A denoiser with an empty store for each condition.

    frames: latent frames of the whole video; size: (H, W) of the latent, both even; prompts: one
    [B, text_len, text_dim] a condition, whose dtype is the compute dtype. ahead: latent frames of a knot. sparse: as in
    `RolloutOptions`.
    """
    grid = size[0] // net.patch_size[1], size[1] // net.patch_size[2]

    def condition(prompt: Tensor) -> Condition:
        return Condition([prompt], make_memory(options, frames, layers=net.config.layers, grid=grid,
                                               head_dim=net.config.dim // net.config.heads, heads=net.config.heads,
                                               device=prompt.device, ahead=ahead, sparse=sparse))

    return NetworkDenoiser(net, [condition(prompt) for prompt in prompts], guidance, dtype=prompts[0].dtype)


def conditions(preset: Preset) -> int:
    """Stores that the preset needs: two where it is guided."""
    return 1 if preset.cfg == 1.0 else 2


def blocks_of(preset: Preset, frames: int) -> tuple[Block, ...]:
    """The blocks of `frames` new latent frames. Raises ForcingError for less than one."""
    return layout(frames, preset.block, independent_first=preset.independent_first)


def preset_rollout(preset: Preset, denoiser: Denoiser, frames: int, noise: Noise,
                   **more: Any) -> Iterator[tuple[Block, Tensor]]:
    """Yield (block, x0 [B, C, n, H, W]) of `frames` new latent frames, run as the preset's authors do it.

    more: further settings of the rollout, such as switches, or the `window` that a recache replays, for a memory that is
    not the preset's own.
    """
    cache = cache_of(preset)
    if "window" not in more:
        more["window"] = replayed_frames(build(cache, frames))
    run = ROLLOUTS[cache.rollout]
    return run(denoiser, blocks_of(preset, frames), levels_of(preset), noise, first_levels=first_levels_of(preset),
               block=preset.block, independent_first=preset.independent_first, context_timestep=preset.context_timestep,
               solver=SOLVERS[preset.solver], **more)


def latent_size(width: int, height: int) -> tuple[int, int]:
    """(H, W) of the latent of a picture in pixels. Raises ForcingError where it does not divide."""
    if width < 16 or height < 16 or width % 16 or height % 16:
        near = "x".join(str(max(16, round(side / 16) * 16)) for side in (width, height))
        raise ForcingError(f"A picture of {width}x{height} pixels does not divide into patches of 16. Use {near}.")
    return height // 8, width // 8
