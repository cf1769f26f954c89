"""The memory of a run before it starts: exact bytes of what stays, and about how much comes and goes.

Weights, store and the prompt's keys and values are counted from shapes, to the byte. The work inside one layer is estimated
from what is alive at once there; allocators and kernels of attention take more of their own.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch

from ..plan_view import StoreShape, announce
from ..policies import WindowOptions
from ..rollout import most_frames
from ..standalone import conditions, latent_size
from ..wan import WanConfig, WanModel
from .timing import Case, Setup

GB = 1e9
BESIDE = 1.5 * GB  # left to the driver, the desktop and the VAE, which works when the network may go
CARDS = (8, 12, 16, 24)  # GB
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)


@dataclass(frozen=True)
class Budget:
    """Bytes of the device. weights, store, text: exact; work: an estimate. host: of host memory, for an offloaded store."""

    weights: int
    store: int
    text: int
    work: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.store + self.text + self.work


def budget(setup: Setup, case: Case) -> Budget:
    """Of one case. Raises ForcingError for sizes and windows that cannot be."""
    return _budget(setup.config, setup.dtype, setup.size, setup.options(case), case.frames, conditions(setup.preset),
                   len(setup.preset.steps) or 1, setup.joined)


def _budget(config: WanConfig, dtype: torch.dtype, size: tuple[int, int], options: Any, frames: int, conditions: int = 1,
            steps: int = 4, joined: bool = False, weights: torch.dtype | None = None) -> Budget:
    height, width = latent_size(*size)
    shape = StoreShape(config.layers, config.dim, height, width, element_size=dtype.itemsize, conditions=conditions)
    store = announce(options, frames, shape)
    most = min(frames, most_frames(options.rollout, options.block, steps) + options.block * joined)
    return Budget(weight_bytes(config, weights or dtype), store.bytes, conditions * text_bytes(config, dtype),
                  work_bytes(config, dtype, most * shape.frame_tokens), store.host_bytes)


@lru_cache(maxsize=None)
def weight_bytes(config: WanConfig, dtype: torch.dtype) -> int:
    """All parameters in `dtype`; the patch embedding, and in fp8 whatever is not a matrix, stay wider."""
    with torch.device("meta"):
        net = WanModel(config)
    narrow = dtype.itemsize == 1
    size = lambda name, p: (4 if name.startswith("patch_embedding") else 2 if narrow and p.dim() < 2 else dtype.itemsize)  # noqa: E731
    return sum(size(name, p) * p.numel() for name, p in net.named_parameters())


def text_bytes(config: WanConfig, dtype: torch.dtype) -> int:
    """The prompt as it came, embedded, and its keys and values in every layer."""
    return config.text_len * (config.text_dim + config.dim * (1 + 2 * config.layers)) * dtype.itemsize


def work_bytes(config: WanConfig, dtype: torch.dtype, tokens: int) -> int:
    """About what one forward over so many tokens has alive at once: five tensors of the width of the network and the
    two sides of the activation, or the rotation of one more in float32."""
    wide = 5 * config.dim * dtype.itemsize
    return tokens * (wide + max(2 * config.ffn_dim * dtype.itemsize, 3 * config.dim * 4)) + 4 * prod(config.patch) * tokens


@dataclass(frozen=True)
class Choice:
    """One way to run on a card: how weights and the store are kept, and how far the memory reaches."""

    weights: str
    window: int
    store: str
    offload: bool = False

    @property
    def label(self) -> str:
        return f"{self.weights} weights, window {self.window}, store {self.store}{', offloaded' if self.offload else ''}"


# From the best to the one that takes least; sink 3 and relative positions in all of them
CHOICES = (Choice("bf16", 21, "model"), Choice("bf16", 12, "model"), Choice("fp8", 21, "int8"), Choice("fp8", 12, "model"),
           Choice("fp8", 12, "int8"), Choice("fp8", 9, "int8"), Choice("fp8", 9, "model", True))
KINDS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def cards(config: WanConfig, size: tuple[int, int], frames: int = 161) -> list[tuple[int, Choice | None, Budget]]:
    """For each of CARDS the first of CHOICES that fits beside what is left free, and its budget; None, with the smallest
    budget, where none does: there the weights have to be streamed."""
    found = []
    for card in CARDS:
        each = [(choice, _chosen(config, size, frames, choice)) for choice in CHOICES]
        fitting = next(((c, b) for c, b in each if b.total + BESIDE <= card * GB), None)
        found.append((card, *(fitting or (None, min((b for _, b in each), key=lambda b: b.total)))))
    return found


def _chosen(config: WanConfig, size: tuple[int, int], frames: int, choice: Choice) -> Budget:
    options = replace(WindowOptions(choice.window, 3, positions="relative"), store=choice.store, offload=choice.offload)
    return _budget(config, torch.bfloat16, size, options, frames, weights=KINDS[choice.weights])
