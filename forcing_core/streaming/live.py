"""A running stream as others see it: its state as plain data, and small pictures of its newest frames.

Nothing here waits: sampling hands over a few numbers a block and views of frames, whoever looks does the work.
"""
from __future__ import annotations

import io
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable

from ..media import pillow
from ..steering import Steering

if TYPE_CHECKING:
    from numpy import ndarray

    from .ear import Ear

STATUSES = ("starting", "running", "paused", "stopping", "done", "failed")
OVER = ("done", "failed")
NEWEST = 200  # commands of the log that a state shows
RECENT = 8  # blocks over which the speed is measured
HELD, SIDE, QUALITY = 96, 320, 80  # preview frames that wait, their longest side in pixels, and their JPEG quality
IDLE = 20.0  # seconds after which nobody is taken to look at previews any more


class Previews:
    """The newest frames, reduced, numbered as in the file. They are kept only while somebody asks for them, and made JPEGs
    when they are asked for, in the thread that asks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._asked = clock, -IDLE
        self._frames: deque[tuple[int, ndarray]] = deque(maxlen=HELD)
        self._lock = threading.Lock()

    def push(self, first: int, frames: ndarray) -> None:
        """The next frames, uint8 or uint16 [T, H, W, 3], of which the first has this number."""
        with self._lock:
            if self._clock() - self._asked > IDLE:
                self._frames.clear()
                first, frames = first + len(frames) - 1, frames[-1:]  # whoever comes sees at least one
            step = max(1, -(-max(frames.shape[1:3]) // SIDE))
            deep = frames.dtype == "uint16"
            self._frames.extend((first + i, (frame[::step, ::step] >> 8 * deep).astype("uint8"))
                                for i, frame in enumerate(frames))

    def after(self, number: int, most: int = HELD) -> tuple[int, list[bytes], int]:
        """(number of the first one, JPEGs, number of the newest frame) of the held frames behind `number`, the newest `most`
        of them."""
        with self._lock:
            self._asked = self._clock()
            found = [(n, frame) for n, frame in self._frames if n > number][-most:]
            newest = self._frames[-1][0] if self._frames else -1
        return (found[0][0] if found else newest + 1), [_jpeg(frame) for _, frame in found], newest


def _jpeg(frame: ndarray) -> bytes:
    data = io.BytesIO()
    pillow()[0].fromarray(frame).save(data, "JPEG", quality=QUALITY)
    return data.getvalue()


@dataclass
class Live:
    """One stream. id, node, prompt_id: who it is. fps: of its video. steering: its mailbox. file, policy: for the state.
    tell: called with the state after every change; from any thread, and must not wait."""

    id: str
    node: str
    prompt_id: str
    fps: float
    steering: Steering
    file: dict[str, Any] = field(default_factory=dict)
    policy: str = ""
    tell: Callable[[dict[str, Any]], None] = lambda state: None
    ear: Ear | None = None  # for a voice that comes while it runs
    status: str = "starting"
    error: str | None = None
    previews: Previews = field(default_factory=Previews)
    numbers: dict[str, Any] = field(default_factory=dict)  # of the last block, as in `state`
    clock: Callable[[], float] = time.monotonic
    _began: tuple[float, int] | None = field(init=False, default=None)
    _times: deque = field(init=False, default_factory=lambda: deque(maxlen=RECENT + 1))

    def wrote(self, block: int, frames: int, **numbers: Any) -> None:
        """After a block, whose frames are in the file now: `frames` in all. numbers: others of the state, by name."""
        now = self.clock()
        self._began = self._began or (now, frames)
        self._times.append((now, frames))
        self.status = "running" if self.status == "starting" else self.status
        self.numbers = {**self.numbers, "block": block, "frames": frames, **numbers}
        self.changed()

    def changed(self) -> None:
        """Something of the steering changed."""
        if self.status in ("running", "paused"):
            self.status = "paused" if self.steering.paused else "running"
        elif self.status == "starting" and self.steering.paused:
            self.status = "paused"
        if self.steering.log and self.steering.log[-1].command.kind == "stop" and self.status not in OVER:
            self.status = "stopping"
        self.tell(self.state())

    def over(self, error: str | None = None) -> None:
        self.status, self.error = ("done" if error is None else "failed"), error
        self.tell(self.state())

    def script(self) -> dict[str, Any]:
        """All that was carried out, for a replay."""
        return {"version": 1, "log": [entry.plain() for entry in self.steering.log]}

    def state(self) -> dict[str, Any]:
        """As the routes hand it out; JSON can hold all of it."""
        frames = self.numbers.get("frames", 0)
        return {"id": self.id, "node": self.node, "prompt_id": self.prompt_id, "status": self.status, "block": 0, "frames": 0,
                "seconds": round(frames / self.fps, 3), "fps": self.fps, "speed": round(self._speed(), 3),
                "buffered_seconds": round(self._ahead(frames), 3), "memory_bytes": 0, "store_bytes": 0, "prompt": "", "seed": 0,
                "lora": [], "window": {"kept": [], "policy": self.policy}, **self.numbers,
                "error": self.error or self.steering.trouble, "file": self.file,
                "log": [entry.plain() for entry in self.steering.log[-NEWEST:]]}

    def _speed(self) -> float:
        """Frames a second, over the last blocks."""
        if len(self._times) < 2:
            return 0.0
        (since, before), (now, frames) = self._times[0], self._times[-1]
        return (frames - before) / max(now - since, 1e-6)

    def _ahead(self, frames: int) -> float:
        """Seconds of video made since the first frames that somebody who began to watch then has not seen yet."""
        return frames / self.fps - (self.clock() - self._began[0]) if self._began else 0.0


def kept_ranges(frames: tuple[int, ...]) -> list[list[int]]:
    """[[first, behind the last], ...] of rising frame numbers."""
    ranges: list[list[int]] = []
    for frame in frames:
        if ranges and ranges[-1][1] == frame:
            ranges[-1][1] = frame + 1
        else:
            ranges.append([frame, frame + 1])
    return ranges
