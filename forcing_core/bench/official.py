"""The official Self Forcing code beside ours: same weights, same noise, one process, alternating runs.

That code is no part of this pack. A checkout of the public repo guandeh17/Self-Forcing (arXiv 2506.08009, Apache-2.0) is
loaded from where the user has it, without what its packages import on the way (text encoders, decoders, CUDA). Its network
runs over its own cache, through the passes of its `CausalInferencePipeline`: all steps of a block, then one with the clean
block, behind the last block too.

Axis legend: B batch, C latent channel, F latent frame of the call, H, W latent size, n text rows.
"""
from __future__ import annotations

import importlib
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn

from ..attention import backend
from ..errors import ForcingError
from ..noise import BlockNoise
from ..presets import get
from ..schedule import CLEAN, Level, x0_from_velocity
from ..standalone import latent_size, preset_rollout
from ..wan import WanConfig, WanModel
from ..wan.random import random_network, random_prompt
from .clock import clock, laps
from .compare import package
from .parts import Rates
from .timing import Case, Setup, begin, in_parts, label

SEES = 21  # latent frames that the official network attends to where it has no window
CHANGES = {"cpu": ("off",), "cuda": ("off", "kernels", "graphs", "all")}  # ways to accelerate, one after the other
ROWS = 512  # of a prompt in its caches


def load_official(folder: Path) -> ModuleType:
    """The module with the causal network. Raises ForcingError where there is none, or for what it needs and is missing."""
    modules = folder / "wan" / "modules"
    if not (modules / "causal_model.py").is_file():
        raise ForcingError(f"There is no Self Forcing code in {folder}. Clone github.com/guandeh17/Self-Forcing and name its "
                           "folder.")
    package("wan", folder / "wan")
    package("wan.modules", modules)
    try:
        return importlib.import_module("wan.modules.causal_model")
    except ImportError as error:
        raise ForcingError(f"The official code could not be loaded: {error}. Install what it imports (pip install "
                           "diffusers).") from error


def check_official(folder: Path, cases: Sequence[Case]) -> ModuleType:
    """`load_official`, and ForcingError for a rollout that it cannot do."""
    block = get("self-forcing").block
    for case in cases:
        if case.frames % block or (case.window is None and case.frames > SEES):
            raise ForcingError(f"The official code does not do {label(case)}. Use a multiple of {block}, and a --window for "
                               f"more than {SEES}.")
    return load_official(folder)


def _attention(official: ModuleType, dtype: torch.dtype) -> str:
    """What it attends with: flash-attn where that is installed and can, else torch's, as ours does. Returns the name."""
    found = importlib.import_module("wan.modules.attention")
    if dtype != torch.float32 and (found.FLASH_ATTN_2_AVAILABLE or found.FLASH_ATTN_3_AVAILABLE):
        return "flash-attn"
    sdpa = backend("sdpa")
    official.attention = importlib.import_module("wan.modules.model").flash_attention = lambda q, k, v, **_: sdpa(q, k, v)
    return "sdpa"


def network(official: ModuleType, net: WanModel, window: int | None, dtype: torch.dtype) -> Any:
    """The official network with the weights of ours, under a window of latent frames."""
    c: WanConfig = net.config
    made = official.CausalWanModel(
        patch_size=c.patch, text_len=c.text_len, in_dim=c.in_channels, dim=c.dim, ffn_dim=c.ffn_dim, freq_dim=c.freq_dim,
        text_dim=c.text_dim, out_dim=c.out_channels, num_heads=c.heads, num_layers=c.layers, eps=c.eps,
        local_attn_size=-1 if window is None else window)
    made.load_state_dict(net.state_dict())
    nn.Module.to(made, next(net.parameters()).device, dtype)
    return made.eval().requires_grad_(False)


class Official:
    """A `Denoiser` over it: x [B, C, F, H, W] -> x0, or None for clean passes. Memory is allocated here, for one rollout.

    prompt: [B, n, text_dim]; kept: latent frames in the cache; tokens: of one frame."""

    def __init__(self, net: Any, prompt: Tensor, kept: int, tokens: int):
        self._net, self._prompt, self._tokens = net, prompt, tokens

        def cache(rows: int, **more: Any) -> dict[str, Any]:
            k, v = (prompt.new_zeros(prompt.shape[0], rows, net.num_heads, net.dim // net.num_heads) for _ in range(2))
            return {"k": k, "v": v, **more}

        def end() -> Tensor:
            return torch.zeros(1, dtype=torch.long, device=prompt.device)

        self._frames = [cache(kept * tokens, global_end_index=end(), local_end_index=end()) for _ in net.blocks]
        self._text = [cache(ROWS, is_init=False) for _ in net.blocks]

    def __call__(self, x: Tensor, levels: Sequence[Level], first: int, phase: str) -> Tensor | None:
        timesteps = x.new_tensor([level.timestep for level in levels]).expand(x.shape[0], -1)
        velocity = self._net(x.to(self._prompt.dtype), t=timesteps, context=self._prompt, seq_len=x.shape[2] * self._tokens,
                             kv_cache=self._frames, crossattn_cache=self._text, current_start=first * self._tokens)
        return x0_from_velocity(x, velocity, [level.sigma for level in levels]) if phase == "noisy" else None


@torch.no_grad()
def beside_official(folder: Path, setup: Setup, cases: Sequence[Case], runs: int, rate: Rates,
                    progress: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """A row for the official code and one for each of ours (`CHANGES`) in every case, medians after a warm-up.

    setup: network, size, device and dtype; steps and blocks are those of Self Forcing. Rows have seconds, first_seconds (of
    the first block), ratio (official seconds / these), floor (share of the time that the operations alone would take at
    `rate`), peak_bytes (without the other network's weights; None on a CPU) and difference, of the latents from the official
    ones, relative. Raises ForcingError for a rollout that it cannot do.
    """
    official, preset = check_official(folder, cases), get("self-forcing")
    attention = _attention(official, setup.dtype)
    net = random_network(setup.config, 0, setup.device, setup.dtype)
    rows = []
    for case in cases:
        theirs = network(official, net, case.window, setup.dtype)
        ways = {"official": _Theirs(setup, theirs, case)} | {
            name: _Ours(Setup(preset, setup.config, setup.size, setup.device, setup.dtype, {"sink": 0}, setup.clock,
                              accelerate=name), net, case) for name in CHANGES[setup.device.split(":")[0]]}
        found: dict[str, list] = {name: [] for name in ways}
        for run in range(runs + 1):
            for name, way in ways.items():
                progress(f"{name}: {label(case)}, run {run} of {runs}")
                found[name].append(way.run(run))
        operations = in_parts(ways["off"].setup, net, case, 0).operations
        rows += _rows(case, found, operations / rate.operations, sum(p.nbytes for p in net.parameters()), attention)
    return rows


def _rows(case: Case, found: dict[str, list], floor: float, weights: int, attention: str) -> list[dict[str, Any]]:
    seconds = {name: median(sum(times) for times, _, _ in runs[1:]) for name, runs in found.items()}
    wanted = found["official"][-1][2]
    return [{"who": name, "frames": case.frames, "window": case.window, "runs": len(runs) - 1, "seconds": seconds[name],
             "first_seconds": median(times[0] for times, _, _ in runs[1:]), "ratio": seconds["official"] / seconds[name],
             "floor": floor / seconds[name], "attention": attention if name == "official" else "sdpa",
             "peak_bytes": None if runs[-1][1] is None else runs[-1][1] - weights,
             "difference": float((runs[-1][2] - wanted).norm() / wanted.norm())} for name, runs in found.items()]


class _Ours:
    """Our rollouts of one case. setup: with its way to accelerate."""

    def __init__(self, setup: Setup, net: WanModel, case: Case):
        self.setup, self.case, self._net = setup, case, net

    def begin(self, seed: int) -> tuple[Any, Any]:
        return begin(self.setup, self._net, self.case, seed)

    def end(self, denoiser: Any, first: int, x0: Tensor) -> None:
        """What a rollout does behind its last block: nothing."""

    def run(self, seed: int) -> tuple[list[float], int | None, Tensor]:
        """(seconds of each block, peak bytes, latents)."""
        denoiser, noise = self.begin(seed)
        watch, parts, preset = clock(self.setup.device, self.setup.clock), [], get("self-forcing")
        stamps = [watch.stamp()]
        for _, x0 in preset_rollout(preset, denoiser, self.case.frames, noise):
            parts.append(x0)
            stamps.append(watch.stamp())
        self.end(denoiser, self.case.frames - x0.shape[2], x0)
        stamps[-1] = watch.stamp()
        return laps(watch, stamps), watch.peak, torch.cat(parts, dim=2).float().cpu()


class _Theirs(_Ours):
    def __init__(self, setup: Setup, net: Any, case: Case):
        super().__init__(setup, net, case)
        self._prompt = random_prompt(setup.config, 0, setup.device, setup.dtype)

    def begin(self, seed: int) -> tuple[Official, Any]:
        height, width = latent_size(*self.setup.size)
        noise = BlockNoise(seed, (1, self.setup.config.in_channels), (height, width), self.setup.device)
        return Official(self._net, self._prompt, self.case.window or self.case.frames, height * width // 4), noise

    def end(self, denoiser: Official, first: int, x0: Tensor) -> None:
        denoiser(x0, (CLEAN,) * x0.shape[2], first, "clean")
