"""Self-rollout: the student makes the clip it is trained on, with the rollout and the store of inference.

Axis legend of latents: [B, C, F, h, w]; of keys and values: B batch, n token, H heads, D head_dim.

All blocks stop at the same random step of the list. That one forward of a block keeps its graph; the steps before
it and the clean passes leave none, and what the store holds is data. So a block's gradient ends at the noise of
its own last step, and the graphs of two blocks share nothing but the weights.

Source: arXiv 2506.08009 (Self Forcing), algorithm 1. One difference to the published training, which adds noise of
sigma 0.005 to the context: here the context is as clean as in inference.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from ..denoiser import Condition, NetworkDenoiser
from ..errors import ForcingError
from ..memory import Pass, make_memory
from ..noise import Noise
from ..plan import Block, Call, Phase
from ..policies import KINDS, Policy, WindowOptions
from ..rollout import block_rollout
from ..rope import rotate
from ..schedule import Level, renoise
from ..solvers import consistency
from ..wan import TextState, forward
from .flow import own_text

BLOCK = "block"  # key of `rollout.ROLLOUTS`
GRADIENT_FRAMES = 21  # the published start_gradient_frame_index is the length of the video less this


class LivePass(Pass):
    """A noisy pass whose own keys and values stay in the autograd graph; older ones come from the store, as data.

    The store is written as by any pass, with detached tensors. What is returned is a copy, so that nothing written
    later reaches the graph.
    """

    def exchange(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            super().exchange(layer, None, k.detach(), v.detach())
            older = self._older(layer)
        roped, v = self._clip(rotate(k, self._turn), self._kept), self._clip(v, self._kept)
        if older is not None:
            roped, v = torch.cat([older[0], roped], 1), torch.cat([older[1], v], 1)
        return rotate(q, self._turn), roped, v

    def _older(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """(rotated keys, values) of the frames that the plan reads and the call did not bring."""
        past = {frame: at for frame, at in zip(self.plan.read, self.plan.positions) if frame not in self.plan.write}
        if not past:
            return None
        return self.store.read(layer, replace(self.plan, read=(*past,), positions=(*past.values(),)), self.rope)


@dataclass
class LiveDenoiser(NetworkDenoiser):
    """As its base, but noisy passes over blocks from frame `grad_from` on keep their graph, where gradients are on.

    A live pass computes the prompt's keys and values anew: those that a pass without gradients cached carry none. Raises
    ForcingError for a policy that a live pass would not follow (`can_train`).
    """

    grad_from: int = 0

    def __post_init__(self):
        for condition in self.conditions:
            can_train(condition.memory.policy)

    def _velocity(self, condition: Condition, x: Tensor, levels: Sequence[Level], first: int, phase: Phase):
        if phase != "noisy" or first < self.grad_from or not torch.is_grad_enabled():
            return super()._velocity(condition, x, levels, first, phase)
        self.forwards += 1
        timesteps = x.new_tensor([level.timestep for level in levels], dtype=torch.float32).expand(x.shape[0], -1)
        memory = condition.memory
        call = Call(first, x.shape[2], phase, memory.store.frames)
        live = LivePass(memory.policy.plan(call), call, memory.store, memory.rope)
        return forward(self.net, x.to(self.dtype), timesteps, TextState(condition.text.context), live, self.ops)


def can_train(policy: Policy, rollout: str = BLOCK) -> None:
    """Raise ForcingError for a policy that trains as something else than it runs as: one with a pass of its own, whose
    attention and storing a `LivePass` does not know, or made for another rollout than that of blocks."""
    if hasattr(policy, "make_pass") or rollout != BLOCK:
        able = [name for name, (options, make) in KINDS.items()
                if options.rollout == BLOCK and not hasattr(make, "make_pass")]
        raise ForcingError(f"{type(policy).__name__} cannot be trained by self-rollout: it has passes or a rollout of its own, "
                           f"which carry no gradients. Train with the cache policy {' or '.join(able)}, and use this one for "
                           "inference.")


def exit_only(x: Tensor, levels: Sequence[Level], predict: Callable[[Tensor, Level], Tensor],
              fresh: Callable[[int], Tensor]) -> Tensor:
    """The solver `consistency` with gradients at the last level alone."""
    if len(levels) > 1:
        with torch.no_grad():
            x0 = consistency(x, levels[:-1], predict, fresh)
        x = renoise(x0, fresh(len(levels) - 2), levels[-1].sigma)
    return predict(x, levels[-1])


def random_exit(steps: int, generator: torch.Generator) -> int:
    """The step of a list of `steps` at which every block of this iteration stops, uniform."""
    return int(torch.randint(steps, (), generator=generator, device=generator.device))


def first_gradient_frame(frames: int, window: int = GRADIENT_FRAMES) -> int:
    """Frame from which a video of `frames` gets gradients: its last `window` frames do."""
    return max(0, frames - window)


def live_rollout(denoiser: LiveDenoiser, blocks: Sequence[Block], levels: Sequence[Level], noise: Noise,
                 exit_step: int, **settings: Any) -> Tensor:
    """Latents [B, C, F, h, w] of `blocks`, each the x0 of step `exit_step`, on the memories of a denoiser.

    settings: of `block_rollout` (context, context_timestep ...). The memories keep what was written, without the
    last block, whose clean pass is not run. Raises ForcingError for a step that the list does not have.
    """
    if not 0 <= exit_step < len(levels):
        raise ForcingError(f"There is no step {exit_step} in a list of {len(levels)}. Use 0 to {len(levels) - 1}.")
    for condition in denoiser.conditions:  # the weights have changed since it was cached
        condition.text = TextState(condition.text.context)
    made = block_rollout(denoiser, blocks, levels[:exit_step + 1], noise, solver=exit_only, **settings)
    return torch.cat([latents for _, latents in made], dim=2)


def self_rollout(net: Any, blocks: Sequence[Block], levels: Sequence[Level], noise: Noise, condition: TextState,
                 exit_step: int, grad_from_frame: int = 0, *, cache: WindowOptions, **settings: Any) -> Tensor:
    """Latents [B, C, F, h, w] of one self-rollout with an empty store at its start.

    levels: of the step list; exit_step: index of the step at which every block stops (`random_exit`).
    grad_from_frame: blocks that start before it leave no graph (`first_gradient_frame`). cache: window, sink and
    positions, as for inference. settings: of `block_rollout`, such as context. The compute dtype is the prompt's.
    Raises ForcingError for a cache policy that cannot be trained with (`can_train`).
    """
    start = noise.initial(blocks[0])
    grid = start.shape[3] // net.patch_size[1], start.shape[4] // net.patch_size[2]
    prompt = own_text(condition, start).context
    memory = make_memory(cache, blocks[-1].end, layers=len(net.blocks), grid=grid,
                         head_dim=net.config.dim // net.num_heads, device=prompt.device, heads=net.num_heads)
    can_train(memory.policy, cache.rollout)
    denoiser = LiveDenoiser(net, [Condition([prompt], memory)], dtype=prompt.dtype, grad_from=grad_from_frame)
    return live_rollout(denoiser, blocks, levels, noise, exit_step, **settings)
