"""Keys that drive LIVE while the video is made: a track whose frames are decided one by one, and who decides them.

A frame is driven by what is held when it begins. So a track knows nothing of frames to come, and remembers only those that
a window still shows. Source of the conditions: arXiv 2602.03747 (LIVE).
"""
from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
from torch import Tensor

from ..errors import ForcingError
from ..plan import Block
from ..steering import Command, SteeredNoise, Steering
from .conditions import ACTIONS, ActionTrack, action_row, check_actions, check_kind
from .config import LiveConfig

KINDS = ("drive", "seed", "pause", "resume", "stop")  # commands that a driven rollout carries out
PATIENCE = 0.05  # seconds between two looks at whether a waiting run is to be interrupted


class ActionDrive:
    """A `Track` of actions, float32 [F, 25], decided while it is played.

    length: frames of the video, start pictures included. prepared: drives the frames until something is held for the first
    time; behind its end nothing is held. Raises ForcingError for a network that no actions drive, and for actions that it
    was not trained on.
    """

    kind = "action"

    def __init__(self, config: LiveConfig, length: int, prepared: ActionTrack | None = None):
        if config.condition != self.kind:
            raise ForcingError("Keys drive a LIVE that was trained on actions, but this checkpoint takes a track of the kind "
                               f"{config.condition}. Choose the micro LIVE, or use Forcing LIVE Sampler.")
        if prepared is not None:
            check_kind(prepared, config)
            check_actions(prepared.actions, config)
        self.config, self.length, self.prepared, self.held = config, length, prepared, ""
        self._row: Tensor | None = None
        self._newest: deque[Tensor] = deque(maxlen=config.window)
        self._end = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What can be held."""
        return self.config.actions or ACTIONS

    def read(self, held: str) -> Tensor:
        """The row [25] of actions as a line of an action track has them, nothing for an empty one. Raises ForcingError for
        those that the network was not trained on."""
        row = action_row(held.split())
        check_actions(row[None], self.config)
        return row

    def hold(self, held: str) -> None:
        """From the next frame that is decided on; takes over from what was prepared."""
        self.held, self._row = held, self.read(held)

    def decide(self, end: int) -> None:
        """Let the frames before `end` be driven by what is held now."""
        for frame in range(self._end, end):
            self._newest.append(self._next(frame))
        self._end = max(self._end, end)

    def window(self, first: int, frames: int) -> Tensor:
        """As every track; only the newest frames that were decided."""
        rows = list(self._newest)[first - self._end:]
        return torch.stack(rows[:frames]).float()

    def _next(self, frame: int) -> Tensor:
        if self._row is not None:
            return self._row
        if self.prepared is not None and frame < self.prepared.length:
            return self.prepared.actions[frame]
        return torch.zeros(len(ACTIONS))


@dataclass
class Pace:
    """Makes a rollout wait for its own video: `wait` returns when the frame is due, and at once where it is late.

    fps: frames a second, or 0 for no waiting. alive: called meanwhile, and may raise.
    """

    fps: float
    alive: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _next: float | None = field(default=None, init=False)

    def wait(self, frames: int) -> None:
        """frames: so many are made next; those before them have been made."""
        if not self.fps:
            return
        while self._next is not None and (left := self._next - self.clock()) > 0:
            self.alive()
            self.sleep(min(left, PATIENCE))
        now = self.clock()
        behind = self._next is None or now - self._next > 1 / self.fps  # what was lost is not made up for
        self._next = (now if behind else self._next) + frames / self.fps


@dataclass
class LiveHelm:
    """Carries commands out before a block: what `live_rollout` is given as `steer`. False ends the rollout.

    alive: raises where a paused run is to end.
    """

    steering: Steering
    drive: ActionDrive
    noise: SteeredNoise
    pace: Pace
    alive: Callable[[], None] = lambda: None
    stopping: bool = field(default=False, init=False)

    def __call__(self, block: Block, pending: Any = None) -> bool:
        self.pace.wait(block.frames)  # before the commands are taken, so that the newest ones count
        for entry, _ in self.steering.boundary(block, self.alive):
            self._carry_out(entry.command, block)
        if not self.stopping:
            self.drive.decide(block.end)
        return not self.stopping

    def _carry_out(self, command: Command, block: Block) -> None:
        if command.kind == "drive":
            self.drive.hold(command.held)
        elif command.kind == "seed":
            self.noise.change(block.index, command.seed)
        self.stopping = self.stopping or command.kind == "stop"
