"""The recomputing rollout: before every block the memory is emptied and rebuilt from clean latents, in their new places.

Nothing is ever carried over as keys and values, so none of them has seen frames that have left the window, and none
stands at another position than it was computed for. The context is the first frame of the video and the newest ones;
it counts as the frames right before the block. That costs a forward over the context for a block, in place of the
clean pass.

Source: public repo krea-ai/realtime-video (Krea Realtime 14B), whose server recomputes three frames. From the third
block on it replaces the first of them by an image encoding of the oldest decoded picture, unless `keep_first_frame` is
set; here latents are all there is, so the first frame is kept.
"""
from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import ForcingError
from ..noise import Noise
from ..plan import Block, context_chunks
from ..schedule import Level, clean
from ..solvers import consistency
from .block import Make, Solver, Steer, denoise
from .state import RolloutState
from .transitions import Switch, check_switches, passed, switch_prompt, take_up


def recompute_rollout(denoiser: Denoiser, blocks: Iterable[Block], levels: Sequence[Level], noise: Noise, *,
                      first_levels: Sequence[Level] | None = None, context: Tensor | None = None, block: int = 3,
                      independent_first: bool = False, context_timestep: float = 0.0, window: int | None = None,
                      switches: Sequence[Switch] = (), solver: Solver = consistency,
                      resume: RolloutState | None = None, make: Make = denoise,
                      steer: Steer | None = None) -> Iterator[tuple[Block, Tensor]]:
    """Yield (block, x0 [B, C, n, H, W]) as each block becomes final.

    levels, first_levels, context, context_timestep, resume, make, steer: as in `block_rollout`. window: latent frames that
    the memory holds, the block included. The context goes through the network in chunks of `block`, each of which sees
    those before it. A switch replaces the text before the context is recomputed, so "recache" and "keep" are the same
    here. Raises ForcingError without a window, and for transitions that forget or jump.
    """
    check_switches(switches, None, "recompute")
    if window is None:
        raise ForcingError("A recomputing rollout needs a window: without one all of the past would be recomputed for every "
                           "block. Set window to a number of latent frames, 6 as published.")
    state = resume or RolloutState()
    history = state.remember(window)
    if context is not None and state.done is None:
        _remember(state, context)
    pending = deque(sorted(switches, key=lambda s: s.at))
    if state.done is not None:
        take_up(denoiser, pending, state.done[0].first)
    for current in state.left(blocks):
        if steer is not None and not steer(current, pending):
            return
        if state.done is not None:
            _remember(state, state.done[1])
        due = passed(pending, current.first)
        if due:
            kind = "keep" if due[-1].transition == "recache" else due[-1].transition
            switch_prompt(denoiser, replace(due[-1], transition=kind), current.first, history, context_timestep)
        denoiser.forget()
        chunks = replayed(current, window, block)
        latents = _context(state, sum(frames for _, frames in chunks))
        for first, frames in chunks:
            start = first - chunks[0][0]
            denoiser(latents[:, :, start:start + frames], (clean(context_timestep),) * frames, first, "clean")
        chosen = first_levels if first_levels and current.index == 0 else levels
        state.done = current, make(denoiser, current, chosen, noise, solver, state)
        yield state.done


def replayed(block: Block, window: int | None, size: int) -> tuple[tuple[int, int], ...]:
    """(first, frames) of the forwards that rebuild the memory before a block, in chunks of `size`: of as many frames as
    the window holds beside it, or of all with None. They count as the frames right before the block."""
    count = block.first if window is None else min(block.first, window - block.frames)
    return tuple((block.first - count + first, frames) for first, frames in context_chunks(count, size))


def _remember(state: RolloutState, latents: Tensor) -> None:
    state.first = latents[:, :, :1].clone() if state.first is None else state.first
    state.history.add(latents)


def _context(state: RolloutState, frames: int) -> Tensor | None:
    """The first frame of the video and the newest ones, [B, C, frames, H, W]; None for no frames."""
    return torch.cat([state.first, state.history.latents[:, :, -frames:][:, :, 1:]], dim=2) if frames else None
