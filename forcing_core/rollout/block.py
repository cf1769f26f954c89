"""The block rollout: denoise a block, yield it, then write it into the store with one clean pass.

Axis legend of latents: [B, C, F, H, W]. Sources: arXiv 2506.08009 (Self Forcing), 2412.07772 (CausVid),
2602.02214 and 2605.15141 (Causal Forcing and ++), 2509.22622 (LongLive: prompt switch with recache).
"""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..noise import Noise
from ..plan import Block, context_chunks
from ..schedule import CLEAN, Level, clean
from ..solvers import consistency

Solver = Callable[..., Tensor]


@dataclass(frozen=True)
class Switch:
    """From latent frame `at` on (rounded up to a block), prompt number `segment` rules.

    renew_sink: the recache also replaces the sink frames (LongLive's global_sink = false).
    """

    at: int
    segment: int
    renew_sink: bool = False


def block_rollout(denoiser: Denoiser, blocks: Iterable[Block], levels: Sequence[Level], noise: Noise, *,
                  first_levels: Sequence[Level] | None = None, context: Tensor | None = None, block: int = 3,
                  independent_first: bool = False, context_timestep: float = 0.0, window: int | None = None,
                  switches: Sequence[Switch] = (), solver: Solver = consistency) -> Iterator[tuple[Block, Tensor]]:
    """Yield (block, x0 [B, C, n, H, W]) as each block becomes final.

    levels: of every block; first_levels: of the first generated block (Causal Forcing++). context: given
    latents [B, C, M, H, W], written by clean passes at timestep 0 in chunks of `block` before the first
    block. context_timestep: timestep of the clean passes (no noise is added). window: latents kept for a
    recache; None keeps all of them where there are switches. A block's clean pass runs when the next block
    is asked for, so the last one never runs.
    """
    history = _History(window) if switches else None
    if context is not None:
        for first, frames in context_chunks(context.shape[2], block, independent_first):
            chunk = context[:, :, first:first + frames]
            denoiser(chunk, (CLEAN,) * frames, first, "clean")
            _remember(history, first, chunk)
    pending = deque(sorted(switches, key=lambda s: s.at))
    done: tuple[Block, Tensor] | None = None
    for current in blocks:
        if done is not None:
            _clean_pass(denoiser, *done, context_timestep)
            _remember(history, done[0].first, done[1])
        due = [pending.popleft() for _ in list(pending) if pending[0].at <= current.first]
        if due:
            recache(denoiser, due[-1], current.first, history, context_timestep)
        chosen = first_levels if first_levels and current.index == 0 else levels
        done = current, _denoise(denoiser, current, chosen, noise, solver)
        yield done


def _denoise(denoiser: Denoiser, block: Block, levels: Sequence[Level], noise: Noise, solver: Solver) -> Tensor:
    def predict(x: Tensor, level: Level) -> Tensor:
        return denoiser(x, (level,) * block.frames, block.first, "noisy")

    return solver(noise.initial(block), levels, predict, lambda step: noise.renoise(block, step))


def _clean_pass(denoiser: Denoiser, block: Block, x0: Tensor, context_timestep: float) -> None:
    denoiser(x0, (clean(context_timestep),) * block.frames, block.first, "clean")


class _History:
    """Clean latents of the last `window` frames (all with None): what a recache replays."""

    def __init__(self, window: int | None):
        self.window, self.frames, self.latents = window, 0, None

    def add(self, first: int, latents: Tensor) -> None:
        joined = latents if self.latents is None else torch.cat([self.latents, latents], dim=2)
        self.latents = joined if self.window is None else joined[:, :, -self.window:]
        self.frames = first + latents.shape[2]


def _remember(history: _History | None, first: int, latents: Tensor) -> None:
    if history is not None:
        history.add(first, latents)


def recache(denoiser: Denoiser, switch: Switch, frame: int, history: _History, context_timestep: float) -> None:
    """Change the prompt at `frame` and rewrite the store under it: one forward over the clean latents of the
    window, unmasked, as LongLive 1 does it. Before the first frame there is nothing to rewrite."""
    if switch.renew_sink:
        denoiser.forget()
    denoiser.replace_text(switch.segment)
    if frame and history.latents is not None:
        latents = history.latents
        levels = (clean(context_timestep),) * latents.shape[2]
        denoiser(latents, levels, frame - latents.shape[2], "recache")
