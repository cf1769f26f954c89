"""What every training run needs around its steps: phases with a budget, averaged weights, files written whole."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Sequence

import torch
from torch import nn

from ..errors import ForcingError
from ..files import whole


@dataclass(frozen=True)
class Phase:
    """A part of a run. steps: its length where the run has no time limit; share: of the minutes where it has;
    start, end: factors of the learning rate, joined by a straight line."""

    name: str
    steps: int
    share: float
    start: float
    end: float


@dataclass(frozen=True)
class Clock:
    """Where a run stands: phase number, steps and seconds spent in that phase, and steps in all."""

    phase: int = 0
    step: int = 0
    seconds: float = 0.0
    total: int = 0

    def after_step(self, seconds: float) -> Clock:
        return replace(self, step=self.step + 1, total=self.total + 1, seconds=self.seconds + seconds)

    def next_phase(self) -> Clock:
        return replace(self, phase=self.phase + 1, step=0, seconds=0.0)

    def progress(self, phases: Sequence[Phase], minutes: float | None) -> float:
        """Share of the current phase that is done, 0 to 1 (and past 1): by steps, or by time under a limit."""
        phase = phases[self.phase]
        return self.step / phase.steps if minutes is None else self.seconds / (60 * minutes * phase.share)

    def seconds_left(self, phases: Sequence[Phase], minutes: float | None) -> float | None:
        """Estimated seconds to the end of the run, None before the first step."""
        if minutes is not None:
            later = sum(60 * minutes * phase.share for phase in phases[self.phase + 1:])
            return max(0.0, 60 * minutes * phases[self.phase].share - self.seconds) + later
        if not self.step:
            return None
        steps = phases[self.phase].steps - self.step + sum(phase.steps for phase in phases[self.phase + 1:])
        return steps * self.seconds / self.step


def learning_rate(phase: Phase, progress: float, step: int, warm_up: int = 50) -> float:
    """Factor of the peak learning rate; the first phase's steps (`step` counts the whole run) warm up."""
    factor = phase.start + (phase.end - phase.start) * min(1.0, progress)
    return factor * min(1.0, (step + 1) / warm_up)


class Average:
    """Exponential moving average of a model's floating weights; young averages forget faster."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """step: steps before this one, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.weights, list(model.parameters()), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        torch._foreach_copy_(list(model.parameters()), self.weights)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file completely or not at all. Raises ForcingError where the folder cannot be written to."""
    with whole(path) as temporary:
        temporary.write_bytes(data)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, strings, lists and dicts, atomically."""
    try:
        with whole(path) as temporary:
            torch.save(state, temporary)
    except RuntimeError as error:  # a full disk, in PyTorch's writer
        raise ForcingError(f"{path} was not written: {error}. Check the folder and the free space.") from error


def load_checkpoint(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Raises ForcingError where there is none or it cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise ForcingError(f"There is no {path} to go on from. Leave out --resume to begin.") from error
    except Exception as error:  # whatever the unpickler stumbles over
        raise ForcingError(f"{path} is no checkpoint of this program. Remove it to begin anew.") from error
