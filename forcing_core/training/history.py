"""The losses of a run, short enough to keep whole: what the loss plot is drawn from."""
from __future__ import annotations

from typing import Any

from torch import Tensor

POINTS = 256


class Curve:
    """Means of `stride` losses each, and of their steps. Where there would be more than POINTS of them, neighbours
    are joined and the stride doubles, so a curve of any length keeps its shape."""

    def __init__(self, stride: int = 1, means: list[list[float]] | None = None, steps: int = 0, total: float = 0.0,
                 count: int = 0):
        """means: [step, loss] pairs; steps, total, count: sums of the mean that is not complete."""
        self.stride, self.means, self.steps, self.total, self.count = stride, list(means or ()), steps, total, count

    def add(self, step: int, loss: Tensor) -> None:
        """A loss, a scalar, and the number of its step; it is read from the device only when a mean is complete."""
        self.steps, self.total, self.count = self.steps + step, self.total + loss.detach().double(), self.count + 1
        if self.count < self.stride:
            return
        self.means.append([self.steps / self.count, float(self.total) / self.count])
        self.steps, self.total, self.count = 0, 0.0, 0
        if len(self.means) == POINTS:
            self.means = [[(x + y) / 2 for x, y in zip(a, b)] for a, b in zip(self.means[::2], self.means[1::2])]
            self.stride *= 2

    def points(self) -> list[list[float]]:
        """[step, mean loss around it] pairs, with five digits."""
        return [[step, float(f"{loss:.5g}")] for step, loss in self.means]

    def state_dict(self) -> dict[str, Any]:
        return {"stride": self.stride, "means": self.means, "steps": self.steps, "total": float(self.total),
                "count": self.count}


def curves(names: tuple[str, ...], state: dict[str, Any] | None = None) -> dict[str, Curve]:
    """A curve for every name, going on from the state of a checkpoint where it has one."""
    return {name: Curve(**(state or {}).get(name, {})) for name in names}


def saved(history: dict[str, Curve]) -> dict[str, Any]:
    """For a checkpoint."""
    return {name: curve.state_dict() for name, curve in history.items()}


def told(history: dict[str, Curve]) -> dict[str, list[list[float]]]:
    """For a report."""
    return {name: curve.points() for name, curve in history.items()}
