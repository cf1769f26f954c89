"""ComfyUI's own autoregressive sampler beside ours: same weights, same process, same attention, alternating runs.

Used by `python -m forcing_core bench --compare`, which loads this file with ComfyUI on the path.
"""
from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Callable, Sequence

import torch

if not torch.cuda.is_available():  # ComfyUI decides by its arguments, and decides at import
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True

import comfy.samplers
import comfy.sd
from comfy.ldm.modules.attention import optimized_attention

from ..forcing_core.bench.clock import HOST
from ..forcing_core.micro import bundle
from ..forcing_core.options import RolloutOptions
from ..forcing_core.policies import WindowOptions
from ..forcing_core.schedule import levels
from ..forcing_core.wan import WanConfig, WanModel
from ..forcing_core.wan.random import random_network, random_prompt
from .sampler import CausalSampler

BLOCK, SEED = 3, 0
CAUSAL = {"config": '{"transformer": {"causal_ar": true}}'}
TINY = WanConfig(dim=256, ffn_dim=512, heads=2, layers=2)
STEPS = (1000, 750, 500, 250)
CAPTION = "a red circle moving left on a dark background"


@dataclass(frozen=True)
class Model:
    """A network to compare on, a prompt for it, and the (H, W) of its latents."""

    net: Callable[[], WanModel]
    prompt: Callable[[], torch.Tensor]
    size: tuple[int, int]


MODELS = {
    "tiny": Model(lambda: random_network(TINY, SEED), lambda: random_prompt(TINY, SEED + 1), (16, 16)),
    "micro": Model(lambda: bundle.network("student"), lambda: bundle.prompt([CAPTION]), (8, 8)),
}


def _guider(state: dict, metadata: dict | None, prompt: torch.Tensor) -> comfy.samplers.CFGGuider:
    model = comfy.sd.load_diffusion_model_state_dict(dict(state), metadata=metadata)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[prompt, {}]]})
    guider.set_cfg(1.0)
    return guider


def _seconds(guider, sampler, frames: int, size: tuple[int, int], now: Callable[[], float]) -> float:
    latent = torch.zeros(1, TINY.in_channels, frames, *size)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(SEED))
    sigmas = torch.tensor([level.sigma for level in levels(STEPS, 5.0)] + [0.0])
    started = now()
    guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=SEED)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - started


@torch.inference_mode()
def compare(cases: Sequence[tuple[int, int | None]], runs: int, progress: Callable[[str], None], clock: str = "wall",
            model: str = "tiny") -> list[dict]:
    """One row a case (latent frames, window): medians of `runs` alternating runs after a warm-up.

    Core has no window, so its runs see everything. ratio = core_seconds / our_seconds, joined_ratio the same where clean
    passes share a forward with the noisy ones behind them; block times are those of a block of 3 latent frames, 4 steps and a
    clean pass. clock: key of `bench.clock.HOST`. model: key of MODELS.
    """
    chosen = MODELS[model]
    net, prompt = chosen.net(), chosen.prompt()
    core, ours = _guider(net.state_dict(), CAUSAL, prompt), _guider(net.state_dict(), None, prompt)
    rows = []
    for frames, window in cases:
        own = {"block": BLOCK, "allow_tail": True, "cache": WindowOptions(window=window)}
        tried = {"core": (core, comfy.samplers.ksampler("ar_video", {"num_frame_per_block": BLOCK})),
                 "ours": (ours, CausalSampler(RolloutOptions(**own))),
                 "joined": (ours, CausalSampler(RolloutOptions(**own, joined=True)))}
        times: dict[str, list[float]] = {name: [] for name in tried}
        for run in range(runs + 1):
            progress(f"{model}, {frames} frames, window {window or 'everything'}: run {run} of {runs}")
            for name, (guider, sampler) in tried.items():
                times[name].append(_seconds(guider, sampler, frames, chosen.size, HOST[clock]))
        # the first round is the warm-up
        rows.append({"model": model, "latent": list(chosen.size), "dim": net.config.dim, "layers": net.config.layers,
                     "clock": clock, **_row(frames, window, {name: found[1:] for name, found in times.items()})})
    return rows


def _row(frames: int, window: int | None, times: dict[str, list[float]]) -> dict:
    core, ours, joined = (statistics.median(times[name]) for name in ("core", "ours", "joined"))
    blocks = math.ceil(frames / BLOCK)
    pairs = [a / b for a, b in zip(times["core"], times["ours"])]
    return {"frames": frames, "window": window, "ratio": core / ours, "ratio_pairs": statistics.median(pairs),
            "joined_ratio": core / joined, "core_seconds": core, "our_seconds": ours, "joined_seconds": joined,
            "core_block_seconds": core / blocks, "our_block_seconds": ours / blocks, "runs": len(pairs),
            "attention": optimized_attention.__name__}
