"""The rolling rollout: as many blocks as there are steps are denoised jointly, each one step behind the one before it.

Axis legend of latents: [B, C, F, H, W]. Each window is one joint forward with a level for every frame; then its
oldest block is final, is yielded, and is written into the store by one clean pass. Published code differs where it
makes no difference to the result - it also makes clean passes of the first block while that is still noisy, and
draws noise for whole windows of which it uses one block - and where it is wrong: with fewer blocks than steps.

Source: arXiv 2509.25161 (Rolling Forcing), public repo TencentARC/RollingForcing; with four steps 2602.02214.
"""
from __future__ import annotations

from collections import deque
from typing import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import ForcingError
from ..noise import Noise
from ..plan import Block, context_chunks
from ..schedule import CLEAN, Level, clean, renoise
from ..solvers import consistency
from .block import Solver, Steer
from .state import RolloutState
from .transitions import Switch, check_switches, passed, take_up
from .windows import Window, each_window


def rolling_rollout(denoiser: Denoiser, blocks: Iterable[Block], levels: Sequence[Level], noise: Noise, *,
                    first_levels: Sequence[Level] | None = None, context: Tensor | None = None, block: int = 3,
                    independent_first: bool = False, context_timestep: float = 0.0, window: int | None = None,
                    switches: Sequence[Switch] = (), solver: Solver = consistency,
                    resume: RolloutState | None = None, steer: Steer | None = None) -> Iterator[tuple[Block, Tensor]]:
    """Yield (block, x0 [B, C, n, H, W]) as each block becomes final, after its pass through all `levels`.

    context, context_timestep, switches: as in `block_rollout`. `noise` is asked for nothing that is not used. A
    switch replaces the text when the first block that it rules enters the window; nothing is recached, so the
    blocks in work then, one less than there are steps, are finished under the new prompt. `window` is not used.
    A block's clean pass runs when the next one is asked for, so the last one never runs. Raises ForcingError for
    levels of the first block only, other solvers, and transitions other than "keep" (which also renew no sink).
    resume: as in `block_rollout`; so is steer, which is called when a block enters the window.
    """
    _check(first_levels, switches, solver)
    blocks = blocks if isinstance(blocks, Sequence) else tuple(blocks)  # of an endless video they are never laid out
    state = resume or RolloutState()
    if context is not None and state.done is None:
        for first, frames in context_chunks(context.shape[2], block, independent_first):
            denoiser(context[:, :, first:first + frames], (CLEAN,) * frames, first, "clean")
    pending = deque(sorted(switches, key=lambda s: s.at))
    in_work, ahead = state.in_work, each_window(len(blocks), len(levels))
    if state.done is not None:
        ahead = _left(state, blocks, len(levels))
        take_up(denoiser, pending, max(block.first for block in (state.done[0], *in_work)))
    for step in ahead:
        inside = blocks[step.start:step.end]
        if steer is not None and inside[-1] not in in_work and not steer(inside[-1], pending):
            return
        if state.done is not None:
            done, latents = state.done
            denoiser(latents, (clean(context_timestep),) * done.frames, done.first, "clean")
        if inside[-1] not in in_work:
            in_work[inside[-1]] = noise.initial(inside[-1])
            _replace_text(denoiser, pending, inside[-1].first)
        parts = _joint(denoiser, [in_work[b] for b in inside], [levels[i] for i in step.levels], inside[0].first)
        for current, at, x0 in zip(inside, step.levels, parts):
            if at + 1 < len(levels):
                in_work[current] = renoise(x0, noise.renoise(current, at), levels[at + 1].sigma)
        if step.final:
            state.done = inside[0], parts[0].clone()  # a view would keep the whole window alive
            del in_work[inside[0]]
            yield state.done


def _left(state: RolloutState, blocks: Sequence[Block], steps: int) -> Iterable[Window]:
    """The windows behind the done block."""
    if next(state.left(blocks), None) is None:
        return ()
    state.check_in_work(blocks, steps)
    return each_window(len(blocks), steps, state.done[0].index + steps)


def _joint(denoiser: Denoiser, latents: list[Tensor], levels: list[Level], first: int) -> tuple[Tensor, ...]:
    """x0 of each block of a window, in one forward."""
    sizes = [x.shape[2] for x in latents]
    each = tuple(level for level, size in zip(levels, sizes) for _ in range(size))
    return denoiser(torch.cat(latents, dim=2), each, first, "noisy").split(sizes, dim=2)


def _replace_text(denoiser: Denoiser, pending: deque[Switch], frame: int) -> None:
    due = passed(pending, frame)
    if due:
        denoiser.replace_text(due[-1].segment)


def _check(first_levels, switches: Sequence[Switch], solver: Solver) -> None:
    if first_levels:
        raise ForcingError("Steps of their own for the first block do not fit a rolling rollout, in which all blocks of a "
                           "window share one schedule. Leave them out.")
    if solver is not consistency:
        raise ForcingError("A rolling rollout mixes in fresh noise after every step. Use the few-step solver ('renoise').")
    check_switches(switches, None, "rolling")
