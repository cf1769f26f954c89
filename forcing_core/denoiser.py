"""What a rollout needs of a network, and the standalone implementation of it.

A denoiser owns its conditions (text, store, policy) and answers with x0, not velocity: ComfyUI's guiders do
the same, guidance is linear in either, and every solver of the family wants x0.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, Sequence

import torch
from torch import Tensor

from .graphs import Graphs
from .joined import Frames, can_join, join
from .memory import Memory
from .passes import Exchange
from .plan import Phase
from .saved import Saved, Tree
from .schedule import Level, x0_from_velocity
from .wan import Ops, TextState, blended, forward


class Denoiser(Protocol):
    """x: [B, C, F, H, W], levels: one per frame, first: number of the first frame. Returns x0 like x, or None
    for a silent ("clean", "recache") phase. `replace_text` switches to prompt number `segment`, `blend_text` to
    (1 - weight) * a + weight * b of two prompts. `push_prompt` makes prompt number 0 of the one that rules now and number 1
    of a new one, of the first condition; the others keep theirs. `forget` empties the store; `flush` drops all but its sink
    and the newest `last` frames; `jump` puts the block at frame `first` that many temporal positions further away. `state`
    is what all memories hold between two blocks, `load` brings that back in a fresh denoiser. One with memories that choose
    by prompt has `turned`, which tells them that the text was replaced for good. One with `joins` and `joined(clean, noisy)`
    can make a clean pass and the noisy one behind it in one forward; x0 is that of the noisy one."""

    def __call__(self, x: Tensor, levels: Sequence[Level], first: int, phase: Phase) -> Tensor | None: ...

    def replace_text(self, segment: int) -> None: ...

    def blend_text(self, a: int, b: int, weight: float) -> None: ...

    def push_prompt(self, prompt: Any) -> None: ...

    def forget(self) -> None: ...

    def flush(self, last: int) -> None: ...

    def jump(self, first: int, distance: int) -> None: ...

    def state(self) -> Tree: ...

    def load(self, saved: Saved) -> None: ...


@dataclass
class Condition:
    """One branch of guidance: its prompts, one per segment of the track, and its own memory.

    prompts: each [B, 512, text_dim] in the compute dtype.
    """

    prompts: Sequence[Tensor]
    memory: Memory
    text: TextState = field(init=False)

    def __post_init__(self):
        self.text = TextState(self.prompts[0])

    def prompt(self, segment: int) -> Tensor:
        """The prompt of a segment; the last one goes on where there are fewer prompts than segments."""
        return self.prompts[min(segment, len(self.prompts) - 1)]


@dataclass
class NetworkDenoiser:
    """Runs a Wan module tree for one condition, or for two with classifier-free guidance.

    conditions: (positive,) or (positive, negative); guidance: v = v_neg + guidance * (v_pos - v_neg).
    forwards counts network calls.
    """

    net: Any
    conditions: Sequence[Condition]
    guidance: float = 1.0
    ops: Ops = Ops()
    dtype: torch.dtype = torch.float32
    forwards: int = 0
    segment: int = 0  # number of the prompt that rules, or takes over
    graphs: Graphs | None = None  # what stands for `forward`

    def __call__(self, x: Tensor, levels: Sequence[Level], first: int, phase: Phase) -> Tensor | None:
        velocities = [self._velocity(c, x, levels, first, phase) for c in self.conditions]
        return None if velocities[0] is None else self._guided(x, velocities, levels)

    def _guided(self, x: Tensor, velocities: Sequence[Tensor], levels: Sequence[Level]) -> Tensor:
        velocity = velocities[0]
        if len(velocities) == 2:
            velocity = velocities[1] + self.guidance * (velocities[0] - velocities[1])
        return x0_from_velocity(x, velocity.to(x.dtype), [level.sigma for level in levels])

    @property
    def heads(self) -> int:
        """Of every store."""
        return self.net.config.heads

    @property
    def joins(self) -> bool:
        """Whether a clean pass and the noisy one behind it can share a forward now."""
        return all(can_join(condition.memory) for condition in self.conditions)

    def joined(self, clean: Frames, noisy: Frames) -> Tensor:
        """x0 of the noisy frames, and the clean ones written, in one forward of each condition."""
        x = torch.cat([clean.x.to(noisy.x), noisy.x], dim=2)
        levels = (*clean.levels, *noisy.levels)
        velocities = [self._forward(c, x, levels, join(c.memory, clean, noisy)) for c in self.conditions]
        return self._guided(noisy.x, velocities, noisy.levels)

    def replace_text(self, segment: int) -> None:
        self.segment = segment
        for condition in self.conditions:
            condition.text = TextState(condition.prompt(segment))

    def push_prompt(self, prompt: Tensor) -> None:
        for index, condition in enumerate(self.conditions):
            ruling = condition.prompt(self.segment)
            condition.prompts = [ruling, ruling if index else prompt]
        self.segment = 0

    def blend_text(self, a: int, b: int, weight: float) -> None:
        self.segment = b
        for condition in self.conditions:
            condition.text = TextState(blended(condition.prompt(a), condition.prompt(b), weight))

    def forget(self) -> None:
        for condition in self.conditions:
            condition.memory.forget()

    def flush(self, last: int) -> None:
        for condition in self.conditions:
            condition.memory.flush(last)

    def jump(self, first: int, distance: int) -> None:
        for condition in self.conditions:
            condition.memory.jump(first, distance)

    def turned(self) -> None:
        for condition in self.conditions:
            condition.memory.turned()

    def state(self) -> Tree:
        """The memories of all conditions; not the prompt, which the rollout knows."""
        return {str(index): condition.memory.state() for index, condition in enumerate(self.conditions)}

    def load(self, saved: Saved) -> None:
        """Go on with saved memories. Raises ForcingError for those of another network, batch or set of conditions."""
        saved.only(map(str, range(len(self.conditions))))
        for index, condition in enumerate(self.conditions):
            prompt, config = condition.prompts[0], self.net.config
            like = prompt.new_empty(prompt.shape[0], 0, self.heads, config.dim // config.heads, dtype=self.dtype)
            condition.memory.load(saved.part(str(index)), like)

    @torch.no_grad()
    def _velocity(self, condition: Condition, x: Tensor, levels: Sequence[Level], first: int, phase: Phase):
        memory = condition.memory.begin(first, x.shape[2], phase, max(level.sigma for level in levels))
        return self._forward(condition, x, levels, memory)

    @torch.no_grad()
    def _forward(self, condition: Condition, x: Tensor, levels: Sequence[Level], memory: Exchange) -> Tensor | None:
        self.forwards += 1
        timesteps = condition.text.times.steps(levels, x)
        run = self.graphs or forward
        return run(self.net, x.to(self.dtype), timesteps, condition.text, memory, self.ops)
