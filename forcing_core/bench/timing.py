"""How long blocks take, how that changes along a video, and what the store weighs.

A block's time runs from the moment it is asked for until its latents are final, so it holds the clean pass of the
block before it. Runs of different cases alternate, because a machine that gets warm or busy would otherwise
favour the first case; every number is a median over runs.
"""
from __future__ import annotations

import json
import os
import platform
import uuid
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from ..accelerate import faster, graphs_of, way
from ..denoiser import NetworkDenoiser
from ..errors import ForcingError
from ..noise import BlockNoise
from ..options import settings_of
from ..presets import Preset
from ..processor import processor
from ..rollout.joining import Joining
from ..standalone import blocks_of, conditions, latent_size, make_denoiser, preset_rollout, window_options
from ..wan import Ops, WanConfig, WanModel
from ..wan.random import random_network, random_prompt
from .clock import check_device, clock, laps
from .parts import Meter, Metered, Parts, Rates, merged, metering, read

SPAN = 10  # blocks whose median stands for "early" and for "late"
EARLY = 60  # latent frame up to which a block is early; every window in use is full by then
WARM_FRAMES = 24
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One rollout to time: latent frames, and the window in latent frames. None is everything, or what a policy without
    a setting of that name (bounded, merging) keeps by its other ones."""

    frames: int
    window: int | None


@dataclass(frozen=True)
class Setup:
    """What all cases share. size: (width, height) in pixels. changes: further settings of the cache policy. clock: key of
    `clock.HOST`, for the CPU. joined: clean passes share a forward with the noisy one behind them. compiled: the two pure
    halves of a layer go through torch.compile. decoder: makes what turns x0 of one block after the other into pictures.
    accelerate: key of `accelerate.WAYS`."""

    preset: Preset
    config: WanConfig
    size: tuple[int, int]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    changes: dict[str, Any] = field(default_factory=dict)
    clock: str = "wall"
    joined: bool = False
    compiled: bool = False
    decoder: Callable[[], Callable[[Tensor], Any]] | None = None
    accelerate: str = "off"

    def options(self, case: Case):
        changes = {**self.changes, "window": case.window}
        if case.window is None and "window" not in settings_of(self.preset):
            del changes["window"]
        return window_options(self.preset, **changes)


@dataclass(frozen=True)
class Timing:
    """Medians over runs. seconds: of the whole rollout; block_seconds: one a block; first_frames: where each block
    starts; store_bytes: allocated by all conditions; peak_bytes: most memory of the device, None on CPU. parts: of runs
    of their own."""

    frames: int
    window: int | None
    sink: int
    positions: str
    runs: int
    seconds: float
    block_seconds: tuple[float, ...]
    first_frames: tuple[int, ...]
    store_bytes: int
    peak_bytes: int | None
    parts: Parts | None = None


def measure(setup: Setup, cases: Sequence[Case], runs: int = 3, progress: Callable[[str], None] = lambda _: None,
            net: WanModel | None = None, parts: int = 0) -> list[Timing]:
    """Time every case `runs` times, alternating, after a short warm-up of each; then `parts` times in parts.

    net: a network to use instead of a random one of setup.config. Raises ForcingError for bad sizes or lengths.
    """
    if runs < 1 or not cases:
        raise ForcingError(f"{runs} runs of {len(cases)} cases measure nothing. Use at least 1 of each.")
    check_device(setup.device)
    if setup.compiled and setup.accelerate != "off":
        raise ForcingError("--compile and --accelerate do not go together: the compiler makes kernels of its own. Use one of "
                           "them.")
    way(setup.accelerate)
    for case in cases:  # complain about a bad case before the first minute is spent
        blocks_of(setup.preset, case.frames)
        setup.options(case)
    net = net or random_network(setup.config, 0, setup.device, setup.dtype)
    for case in cases:
        progress(f"warming up: {label(case)}")
        _once(setup, net, Case(min(case.frames, WARM_FRAMES), case.window), 0)
    results: dict[Case, list] = {case: [] for case in cases}
    for number in range(runs):
        for case in cases:
            progress(f"run {number + 1} of {runs}: {label(case)}")
            results[case].append(_once(setup, net, case, number))
    timings = [_timing(setup, case, results[case]) for case in cases]
    for place, case in enumerate(cases if parts else ()):
        progress(f"in parts: {label(case)}")
        timings[place] = replace(timings[place], parts=merged([in_parts(setup, net, case, n) for n in range(parts)]))
    return timings


def label(case: Case) -> str:
    return f"{case.frames} frames, window {case.window or 'everything'}"


@torch.no_grad()
def _once(setup: Setup, net: WanModel, case: Case, seed: int) -> tuple[list[float], int, int | None]:
    """(seconds of each block, bytes of the stores, peak bytes) of one rollout. Its latents are dropped."""
    denoiser, noise = begin(setup, net, case, seed)
    watch = clock(setup.device, setup.clock)
    stamps = [watch.stamp()]
    for _ in preset_rollout(setup.preset, Joining(denoiser) if setup.joined else denoiser, case.frames, noise):
        stamps.append(watch.stamp())
    seconds = laps(watch, stamps)
    return seconds, sum(condition.memory.store.nbytes for condition in denoiser.conditions), watch.peak


def begin(setup: Setup, net: WanModel, case: Case, seed: int) -> tuple[NetworkDenoiser, BlockNoise]:
    """(denoiser with an empty memory, noise) of one rollout."""
    size = latent_size(*setup.size)
    prompts = [random_prompt(setup.config, i, setup.device, setup.dtype) for i in range(conditions(setup.preset))]
    denoiser = make_denoiser(net, setup.options(case), case.frames, size, prompts, setup.preset.cfg)
    denoiser.ops = Ops(compile=_compiled) if setup.compiled else faster(denoiser.ops, setup.accelerate, setup.device)
    denoiser.graphs = graphs_of(setup.accelerate, setup.device)
    return denoiser, BlockNoise(seed, (1, setup.config.in_channels), size, setup.device)


@lru_cache(maxsize=None)
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


@torch.no_grad()
def in_parts(setup: Setup, net: WanModel, case: Case, seed: int) -> Parts:
    """One rollout under a meter, decoded block by block where there is a decoder."""
    denoiser, noise = begin(setup, net, case, seed)
    meter = Meter(clock(setup.device, setup.clock))
    metered = Metered(denoiser, meter)
    decode = meter.timed("decode", setup.decoder()) if setup.decoder else lambda x0: None
    with metering(net, meter, denoiser.ops.kernels):
        start = meter.watch.stamp()
        for _, x0 in preset_rollout(setup.preset, Joining(metered) if setup.joined else metered, case.frames, noise):
            decode(x0)
        end = meter.watch.stamp()
    return read(meter, start, end)


def _timing(setup: Setup, case: Case, runs: list[tuple[list[float], int, int | None]]) -> Timing:
    options = setup.options(case)
    blocks = tuple(median(times) for times in zip(*(seconds for seconds, _, _ in runs), strict=True))
    peaks = [peak for _, _, peak in runs if peak is not None]
    return Timing(case.frames, case.window, getattr(options, "sink", 0), options.positions, len(runs),
                  median(sum(seconds) for seconds, _, _ in runs), blocks,
                  tuple(block.first for block in blocks_of(setup.preset, case.frames)), runs[0][1],
                  max(peaks, default=None))


def early_late(timing: Timing) -> dict[str, float] | None:
    """Block times around frame 60 and at the end: {"early_frame", "late_frame", "early", "late", "ratio"}.

    Seconds are medians of 10 blocks; the last block, which may be a short one, is left out. None for videos that
    are too short to have two such groups.
    """
    whole = range(len(timing.first_frames) - 1)
    early = [i for i in whole if timing.first_frames[i + 1] <= EARLY][-SPAN:]
    late = [i for i in whole if i not in early][-SPAN:]
    if len(early) < SPAN or len(late) < SPAN or late[0] < early[-1]:  # the groups would overlap
        return None
    a, b = (median(timing.block_seconds[i] for i in group) for group in (early, late))
    return {"early_frame": timing.first_frames[early[-1] + 1], "late_frame": timing.first_frames[late[-1] + 1],
            "early": a, "late": b, "ratio": b / a}


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a number depends on: device, PyTorch, threads, system, and the load of the last minute (None on
    Windows): beside another busy program, timings mean nothing."""
    cuda = device != "cpu"
    return {"device": torch.cuda.get_device_name(device) if cuda else processor(), "kind": device.split(":")[0],
            "torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
            "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "python": platform.python_version(), "system": platform.system(),
            "architecture": platform.machine()}


def record(setup: Setup, timings: Sequence[Timing], rates: Rates | None = None) -> list[dict[str, Any]]:
    """JSON rows of rollouts: the timing, early against late, and the shape of the network. rates: adds the two floors."""
    shape = {"preset": setup.preset.name, "dim": setup.config.dim, "layers": setup.config.layers,
             "width": setup.size[0], "height": setup.size[1], "dtype": str(setup.dtype).removeprefix("torch."),
             "clock": setup.clock if setup.device == "cpu" else "events", "joined": setup.joined, "compiled": setup.compiled,
             "accelerate": setup.accelerate}
    return [{**shape, **asdict(timing), "early_late": early_late(timing),
             "floors": timing.parts.floors(rates) if timing.parts and rates else None} for timing in timings]


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result, complete or not at all. Raises ForcingError where the place cannot be written to."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ForcingError(f"{path} was not written: {error.strerror or error}. Choose a file in an existing folder "
                           "with free space.") from error
    finally:
        temporary.unlink(missing_ok=True)
