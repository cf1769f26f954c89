"""ComfyUI's own autoregressive sampler beside ours: same weights, same process, same attention, alternating runs.

Used by `python -m forcing_core bench --compare`, which loads this file with ComfyUI on the path.
"""
from __future__ import annotations

import math
import statistics
import time
from typing import Callable, Sequence

import torch

if not torch.cuda.is_available():  # ComfyUI decides by its arguments, and decides at import
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True

import comfy.samplers
import comfy.sd
from comfy.ldm.modules.attention import optimized_attention

from ..forcing_core.options import RolloutOptions
from ..forcing_core.policies import WindowOptions
from ..forcing_core.schedule import levels
from ..forcing_core.wan import WanConfig
from ..forcing_core.wan.random import random_network, random_prompt
from .sampler import CausalSampler

BLOCK, SIZE, SEED = 3, (16, 24), 0
CAUSAL = {"config": '{"transformer": {"causal_ar": true}}'}
TINY = WanConfig(dim=256, ffn_dim=512, heads=2, layers=2)
STEPS = (1000, 750, 500, 250)


def _guider(state: dict, metadata: dict | None, prompt: torch.Tensor) -> comfy.samplers.CFGGuider:
    model = comfy.sd.load_diffusion_model_state_dict(dict(state), metadata=metadata)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[prompt, {}]]})
    guider.set_cfg(1.0)
    return guider


def _seconds(guider, sampler, frames: int) -> float:
    latent = torch.zeros(1, TINY.in_channels, frames, *SIZE)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(SEED))
    sigmas = torch.tensor([level.sigma for level in levels(STEPS, 5.0)] + [0.0])
    started = time.perf_counter()
    guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=SEED)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def compare(cases: Sequence[tuple[int, int | None]], runs: int, progress: Callable[[str], None]) -> list[dict]:
    """One row a case (latent frames, window): medians of `runs` alternating runs after a warm-up.

    Core has no window, so its runs see everything. ratio = core_seconds / our_seconds; block times are those
    of a block of 3 latent frames, 4 steps and a clean pass.
    """
    state = random_network(TINY, SEED).state_dict()
    prompt = random_prompt(TINY, SEED + 1)
    core, ours = _guider(state, CAUSAL, prompt), _guider(state, None, prompt)
    theirs = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": BLOCK})
    rows = []
    for frames, window in cases:
        sampler = CausalSampler(RolloutOptions(block=BLOCK, allow_tail=True, cache=WindowOptions(window=window)))
        times: dict[str, list[float]] = {"core": [], "ours": []}
        for run in range(runs + 1):
            progress(f"{frames} frames, window {window or 'everything'}: run {run} of {runs}")
            pair = _seconds(core, theirs, frames), _seconds(ours, sampler, frames)
            if run:  # the first pair is the warm-up
                times["core"].append(pair[0])
                times["ours"].append(pair[1])
        rows.append(_row(frames, window, times))
    return rows


def _row(frames: int, window: int | None, times: dict[str, list[float]]) -> dict:
    core, ours = statistics.median(times["core"]), statistics.median(times["ours"])
    blocks = math.ceil(frames / BLOCK)
    pairs = [a / b for a, b in zip(times["core"], times["ours"])]
    return {"frames": frames, "window": window, "ratio": core / ours, "ratio_pairs": statistics.median(pairs),
            "core_seconds": core, "our_seconds": ours, "core_block_seconds": core / blocks,
            "our_block_seconds": ours / blocks, "runs": len(pairs), "attention": optimized_attention.__name__,
            "latent": list(SIZE), "dim": TINY.dim, "layers": TINY.layers}
