"""Running one golden case and judging it. Settings come from the file's metadata, never from its name."""
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor

from ..denoiser import Condition, NetworkDenoiser
from ..errors import ForcingError
from ..memory import make_memory
from ..plan import Block, layout
from ..policies import DeepCompressOptions, DeepSinkOptions, EmaSinkOptions, RollingOptions, WindowOptions
from ..rollout import ROLLOUTS as ORDERS
from ..rollout import Switch
from ..schedule import Level
from ..solvers import consistency, unipc
from ..wan import WanModel
from .case import Case, RecordedNoise


@dataclass(frozen=True)
class Report:
    """max_abs and rel_l2 are of the final latents; forwards counts ours, expected is the reference's less the
    passes that are provably without effect."""

    name: str
    max_abs: float
    rel_l2: float
    limit_abs: float
    limit_rel: float
    forwards: int
    expected: int
    reference: int
    seconds: float

    @property
    def passed(self) -> bool:
        """NaN fails: every comparison is written so that it must be true."""
        return self.max_abs <= self.limit_abs and self.rel_l2 <= self.limit_rel and self.forwards == self.expected


def _window(settings: dict[str, Any]) -> WindowOptions:
    window = settings["window"]
    return WindowOptions(window=None if window < 0 else window, sink=settings["sink"],
                         block=settings["frames_per_block"], positions=settings["rope_positions"])


def _rolling(settings: dict[str, Any]) -> RollingOptions:
    return RollingOptions(window=settings["window"], sink=settings["sink"], block=settings["frames_per_block"],
                          positions=settings["rope_positions"])


def _sinks(settings: dict[str, Any]) -> dict[str, int]:
    return {"window": settings["window"], "sink": settings["sink"], "block": settings["frames_per_block"]}


def _ema_sink(settings: dict[str, Any]) -> EmaSinkOptions:
    return EmaSinkOptions(**_sinks(settings), alpha=settings["ema_alpha"])


def _deep_sink(settings: dict[str, Any]) -> DeepSinkOptions:
    return DeepSinkOptions(**_sinks(settings), positions=settings["rope_positions"])


def _deep_compress(settings: dict[str, Any]) -> DeepCompressOptions:
    return DeepCompressOptions(**_sinks(settings), positions=settings["rope_positions"], budget=settings["budget"],
                               recent=settings["recent"], reuse_cap=settings["reuse_cap"])


POLICIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "window": _window, "rolling": _rolling, "ema_sink": _ema_sink, "deep_sink": _deep_sink, "deep_compress": _deep_compress}


def _look_up(table: dict[str, Any], settings: dict[str, Any], key: str):
    if settings.get(key) not in table:
        raise ForcingError(f"{key} {settings.get(key)!r} is not known to this version. Known: {', '.join(table)}.")
    return table[settings[key]]


def _prompts(case: Case) -> tuple[list[list[Tensor]], list[Switch]]:
    """(prompts of each condition, one per segment; switches)."""
    settings, count = case.settings, len(case.settings["prompt_rows"])

    def batch():
        return [[case.prompts(list(range(count)))]], []

    def segments():
        order = settings["prompt_index_per_segment"]
        switches = [Switch(at, number + 1, renew_sink=not settings["global_sink"])
                    for number, at in enumerate(settings["prompt_switch_frames_requested"])]
        return [[case.prompts([index] * settings["batch"]) for index in order]], switches

    def guided():
        sides = settings["prompt_index_positive"], settings["prompt_index_negative"]
        return [[case.prompts([index] * settings["batch"])] for index in sides], []

    axes = {"batch": batch, "segments": segments, "positive_negative": guided}
    return _look_up(axes, settings, "prompt_axis")()


def _blocks(settings: dict[str, Any]) -> tuple[Block, ...]:
    return layout(settings["frames_generated"], settings["frames_per_block"], given=settings["initial_frames"],
                  independent_first=settings["independent_first_frame"])


def _levels(timesteps: list[float] | None, sigmas: list[float] | None) -> tuple[Level, ...] | None:
    # the UniPC grid lists a final sigma 0 that has no timestep
    return None if timesteps is None else tuple(Level(float(t), s) for t, s in zip(timesteps, sigmas))


def _denoiser(case: Case, net: WanModel, prompts: list[list[Tensor]]) -> NetworkDenoiser:
    settings = case.settings
    frames = settings["initial_frames"] + settings["frames_generated"]
    grid = tuple(side // 2 for side in settings["latent_hw"])
    options = _look_up(POLICIES, settings, "policy")(settings)

    def condition(texts: list[Tensor]) -> Condition:
        return Condition(texts, make_memory(options, frames, layers=net.config.layers, grid=grid,
                                            head_dim=net.config.dim // net.config.heads,
                                            device=net.head.modulation.device))

    return NetworkDenoiser(net, [condition(texts) for texts in prompts], settings.get("guidance", 1.0))


def _run(case: Case, net: WanModel, order: str, solver: Callable) -> tuple[Tensor, int]:
    settings = case.settings
    prompts, switches = _prompts(case)
    denoiser = _denoiser(case, net, prompts)
    window = None if settings["window"] < 0 else settings["window"]
    parts = [] if case.given is None else [case.given]
    rollout = ORDERS[order](
        denoiser, _blocks(settings), _levels(settings["timesteps"], settings["sigmas"]), RecordedNoise(case),
        first_levels=_levels(settings["first_block_timesteps"], settings["first_block_sigmas"]),
        context=case.given, block=settings["frames_per_block"],
        independent_first=settings["independent_first_frame"], context_timestep=settings["context_noise"],
        window=window, switches=switches, solver=solver)
    parts += [latents for _, latents in rollout]
    return torch.cat(parts, dim=2), denoiser.forwards


ROLLOUTS: dict[str, Callable[[Case, WanModel], tuple[Tensor, int]]] = {
    "block": lambda case, net: _run(case, net, "block", consistency),
    "many_step": lambda case, net: _run(case, net, "block", unipc),
    "rolling": lambda case, net: _run(case, net, "rolling", consistency),
}


def _expected_forwards(case: Case) -> int:
    """The reference's count without the clean passes that nothing reads: those of the last block, and in a rolling
    rollout those of the first one while it is still noisy, which later ones overwrite."""
    last = _blocks(case.settings)[-1].first
    written = [first for first, _, _, kind, _ in case.forwards if kind == "context" and first != last]
    read = set(written) if case.settings["rollout"] == "rolling" else written  # a guided case writes blocks twice
    return sum(1 for _, _, _, kind, _ in case.forwards if kind != "context") + len(read)


def run_case(case: Case, net: WanModel) -> Report:
    """Run a case and compare its final latents. Raises ForcingError for a case of an unknown kind."""
    started = time.perf_counter()
    case = case.to(net.head.modulation.device)
    latents, forwards = _look_up(ROLLOUTS, case.settings, "rollout")(case, net)
    wanted = case.tensors["latents"].transpose(1, 2)
    difference = latents.double() - wanted.double()
    tolerance = case.settings["tolerance"]
    return Report(case.name, float(difference.abs().max()), float(difference.norm() / wanted.double().norm()),
                  tolerance["max_abs"], tolerance["rel_l2"], forwards, _expected_forwards(case),
                  case.settings["forwards_count"], time.perf_counter() - started)
