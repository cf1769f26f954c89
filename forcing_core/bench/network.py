"""Random networks of Wan's shape and the rollout of a preset over them, for the demo and the benchmarks.

Axis legend of latents: [B, C, F, H, W]. Weights are drawn so that every layer has unit gain, the head
included: activations stay near 1 at any depth, and every part of the network has an effect.
"""
from __future__ import annotations

import math
from typing import Iterator, Sequence

import torch
from torch import Tensor

from ..denoiser import Condition, Denoiser, NetworkDenoiser
from ..errors import ForcingError
from ..memory import Memory
from ..noise import Noise
from ..plan import Block, layout
from ..policies import WindowOptions, build
from ..presets import POLICIES, Preset
from ..rollout import block_rollout
from ..rope import Rope
from ..schedule import Level, levels, unipc_levels
from ..solvers import consistency, unipc
from ..store import Store
from ..wan import WanConfig, WanModel

# solver of a preset -> (its levels, the function)
SOLVERS = {
    "renoise": (lambda preset: levels(preset.steps, preset.shift, preset.warp), consistency),
    "unipc": (lambda preset: unipc_levels(preset.step_count, preset.shift), unipc),
}


@torch.no_grad()
def random_network(config: WanConfig, seed: int, device: torch.device | str = "cpu",
                   dtype: torch.dtype = torch.float32) -> WanModel:
    """A network with weights from `seed`, built on its device. The global generators are not touched."""
    with torch.device("meta"):
        net = WanModel(config)
    net.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in net.named_parameters():
        _fill(name, parameter, generator)
    return net.eval().requires_grad_(False).to_compute(dtype)


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if name.endswith(("modulation", "bias")):
        parameter.normal_(std=0.1, generator=generator)
    elif parameter.dim() == 1:  # the scale of a norm
        parameter.fill_(1.0)
    else:
        parameter.normal_(std=math.prod(parameter.shape[1:]) ** -0.5, generator=generator)


def random_prompt(config: WanConfig, seed: int, device: torch.device | str = "cpu",
                  dtype: torch.dtype = torch.float32) -> Tensor:
    """[1, text_len, text_dim] in place of an encoded prompt."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(1, config.text_len, config.text_dim, generator=generator, device=device).to(dtype)


def window_options(preset: Preset, **changes) -> WindowOptions:
    """The cache policy of a preset; `changes` (window, sink, positions ...) go before its own values.

    Raises ForcingError for a preset with another policy than the window.
    """
    if preset.policy != "window" or preset.solver not in SOLVERS:
        why = POLICIES[preset.policy] or f"its solver {preset.solver!r} is not part of this version"
        raise ForcingError(f"{preset.name} cannot be run here: {why}. Use self-forcing or longlive.")
    own = {"window": preset.window, "sink": preset.sink, "block": preset.block, "positions": preset.positions}
    return WindowOptions(**{**own, **changes})


def make_denoiser(net: WanModel, options: WindowOptions, frames: int, size: tuple[int, int],
                  prompts: Sequence[Tensor], guidance: float = 1.0) -> NetworkDenoiser:
    """A denoiser with an empty store for each condition.

    frames: latent frames of the whole video; size: (H, W) of the latent, both even; prompts: one
    [B, text_len, text_dim] a condition, whose dtype is the compute dtype.
    """
    grid = size[0] // net.patch_size[1], size[1] // net.patch_size[2]

    def condition(prompt: Tensor) -> Condition:
        policy = build(options, frames)
        store = Store(net.config.layers, policy.capacity, grid[0] * grid[1], policy.keys)
        rope = Rope(grid, net.config.dim // net.config.heads, prompt.device)
        return Condition([prompt], Memory(policy, store, rope))

    return NetworkDenoiser(net, [condition(prompt) for prompt in prompts], guidance, dtype=prompts[0].dtype)


def conditions(preset: Preset) -> int:
    """Stores that the preset needs: two where it is guided."""
    return 1 if preset.cfg == 1.0 else 2


def blocks_of(preset: Preset, frames: int) -> tuple[Block, ...]:
    """The blocks of `frames` new latent frames. Raises ForcingError for less than one."""
    return layout(frames, preset.block, independent_first=preset.independent_first)


def levels_of(preset: Preset) -> tuple[Level, ...]:
    return SOLVERS[preset.solver][0](preset)


def preset_rollout(preset: Preset, denoiser: Denoiser, frames: int, noise: Noise) -> Iterator[tuple[Block, Tensor]]:
    """Yield (block, x0 [B, C, n, H, W]) of `frames` new latent frames, run as the preset's authors do it."""
    first = levels(preset.first_steps, preset.shift, preset.warp) if preset.first_steps else None
    return block_rollout(denoiser, blocks_of(preset, frames), levels_of(preset), noise, first_levels=first,
                         block=preset.block, independent_first=preset.independent_first,
                         context_timestep=preset.context_timestep, solver=SOLVERS[preset.solver][1])


def latent_size(width: int, height: int) -> tuple[int, int]:
    """(H, W) of the latent of a picture in pixels. Raises ForcingError where it does not divide."""
    if width < 16 or height < 16 or width % 16 or height % 16:
        near = "x".join(str(max(16, round(side / 16) * 16)) for side in (width, height))
        raise ForcingError(f"A picture of {width}x{height} pixels does not divide into patches of 16. Use {near}.")
    return height // 8, width // 8
