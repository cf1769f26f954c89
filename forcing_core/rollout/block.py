"""The block rollout: denoise a block, yield it, then write it into the store with one clean pass.

Axis legend of latents: [B, C, F, H, W]. Sources: arXiv 2506.08009 (Self Forcing), 2412.07772 (CausVid),
2602.02214 and 2605.15141 (Causal Forcing and ++), 2509.22622 (LongLive: prompt switch with recache).
"""
from __future__ import annotations

from collections import deque
from typing import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from ..denoiser import Denoiser
from ..noise import Noise
from ..plan import Block, context_chunks
from ..schedule import CLEAN, Level, clean
from ..solvers import consistency
from .state import RolloutState
from .transitions import FRESH, SCENES, History, Switch, passed, switch_prompt, take_up

Solver = Callable[..., Tensor]
Steer = Callable[[Block, deque[Switch]], bool]
Leave = Callable[[Denoiser, Block, Tensor, float], None]
Make = Callable[[Denoiser, Block, Sequence[Level], Noise, Solver, RolloutState], Tensor]


def denoise(denoiser: Denoiser, block: Block, levels: Sequence[Level], noise: Noise, solver: Solver,
            state: RolloutState) -> Tensor:
    """x0 [B, C, n, H, W] of a block, from its noise through all levels."""
    def predict(x: Tensor, level: Level) -> Tensor:
        return denoiser(x, (level,) * block.frames, block.first, "noisy")

    return solver(noise.initial(block), levels, predict, lambda step: noise.renoise(block, step))


def clean_pass(denoiser: Denoiser, block: Block, x0: Tensor, context_timestep: float) -> None:
    denoiser(x0, (clean(context_timestep),) * block.frames, block.first, "clean")


def block_rollout(denoiser: Denoiser, blocks: Iterable[Block], levels: Sequence[Level], noise: Noise, *,
                  first_levels: Sequence[Level] | None = None, context: Tensor | None = None, block: int = 3,
                  independent_first: bool = False, context_timestep: float = 0.0, window: int | None = None,
                  switches: Sequence[Switch] = (), solver: Solver = consistency,
                  resume: RolloutState | None = None, make: Make = denoise,
                  steer: Steer | None = None, leave: Leave = clean_pass) -> Iterator[tuple[Block, Tensor]]:
    """Yield (block, x0 [B, C, n, H, W]) as each block becomes final.

    levels: of every block; first_levels: of the first generated block, and of the first one after a cut
    (Causal Forcing++ needs more steps where there is no memory). switches: changes of prompt. context: given
    latents [B, C, M, H, W], written by clean passes at timestep 0 in chunks of `block` before the first
    block. context_timestep: timestep of the clean passes (no noise is added). window: latents kept for a
    recache; None keeps all of them where there are switches. A block's clean pass runs when the next block
    is asked for, so the last one never runs. resume: where to go on, kept up to date; an empty one begins. make: how a
    block is denoised. steer: called before every block with it and the switches ahead, which it may change; False ends
    the rollout. leave: how a block is written into the store.
    """
    state = resume or RolloutState()
    history = state.remember(window) if switches or resume is not None else None
    if context is not None and state.done is None:
        for first, frames in context_chunks(context.shape[2], block, independent_first):
            chunk = context[:, :, first:first + frames]
            denoiser(chunk, (CLEAN,) * frames, first, "clean")
            _remember(history, chunk)
    pending = deque(sorted(switches, key=lambda s: s.at))
    if state.done is not None:
        take_up(denoiser, pending, state.done[0].first)
    for current in state.left(blocks):
        if steer is not None and not steer(current, pending):
            return
        if state.done is not None:
            leave(denoiser, *state.done, context_timestep)
            _remember(history, state.done[1])
        due = passed(pending, current.first)
        if due:
            switch_prompt(denoiser, due[-1], current.first, history, context_timestep)
            if due[-1].transition in SCENES:
                state.knot = None
        fresh = current.index == 0 or bool(due) and due[-1].transition in FRESH
        chosen = first_levels if first_levels and fresh else levels
        state.done = current, make(denoiser, current, chosen, noise, solver, state)
        yield state.done


def _remember(history: History | None, latents: Tensor) -> None:
    if history is not None:
        history.add(latents)
