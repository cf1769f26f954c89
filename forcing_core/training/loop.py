"""The loop of every training stage: steps until the budget is used up, checkpoints on the way, progress for whoever asks."""
from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Callable, Sequence

from ..errors import ForcingError
from .state import Clock, Phase, save_checkpoint

CHECKPOINT_SECONDS, REPORT_SECONDS = 60.0, 5.0


class Stage:
    """What the loop needs of a trainer. `step` does one optimiser step and returns what `progress` is made from;
    `settings.minutes` is the time limit or None. `prepare` is called before the first step of a process."""

    settings: Any
    clock: Clock
    phases: Sequence[Phase]

    def prepare(self) -> None: ...

    def step(self) -> Any: ...

    def progress(self, result: Any) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    @property
    def done(self) -> bool:
        return self.clock.phase >= len(self.phases)

    @property
    def seconds_left(self) -> float | None:
        return self.clock.seconds_left(self.phases, self.settings.minutes)

    def advance(self, seconds: float) -> None:
        """Count a step that took so long, and begin the next phase where this one's budget is used up."""
        self.clock = self.clock.after_step(seconds)
        if self.clock.progress(self.phases, self.settings.minutes) >= 1:
            self.clock = self.clock.next_phase()


def finite(loss: float, step: int) -> float:
    """The loss, or ForcingError where it is no longer a number."""
    if not math.isfinite(loss):
        raise ForcingError(f"The loss is no longer a number at step {step}. Lower the learning rates, or go on from the "
                           "last checkpoint in float32.")
    return loss


def train(trainer: Stage, checkpoint: Path, show: Callable[[Any], None] = lambda _: None,
          stop: Callable[[], bool] = lambda: False) -> bool:
    """Step until the run is done (True) or `stop` says so (False), saving a checkpoint every minute and at the end.

    show: called every few seconds with the trainer's progress. Raises ForcingError where the loss is no number.
    """
    saved = shown = -math.inf
    stopped = False
    while not (trainer.done or stopped):
        begin, clock = time.perf_counter(), trainer.clock
        result = trainer.step()
        if begin - shown >= REPORT_SECONDS:
            shown = begin
            show(trainer.progress(result))
        trainer.advance(time.perf_counter() - begin)
        stopped = stop()
        if begin - saved >= CHECKPOINT_SECONDS or trainer.clock.phase != clock.phase or stopped:
            saved = begin
            save_checkpoint(checkpoint, trainer.state_dict())
    return trainer.done
