"""Clocks: the time on the wall, the processor's own time, and events in the stream of a CUDA device."""
from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, Callable, Protocol

import torch

from ..errors import ForcingError

# On a machine that others use too, the time that the processor spent on this program is the steadier one. It is that of
# all threads together, so it is meant for one thread.
HOST: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}


class Clock(Protocol):
    """stamp: a moment, cheaply. seconds: between two of them, which may wait for the device."""

    peak: int | None

    def stamp(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """Moments of the CPU. kind: key of HOST."""

    peak: int | None = None

    def __init__(self, kind: str = "wall"):
        self.stamp = HOST[kind]

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Events in the stream of the device, so that taking a time does not hold the rollout up."""

    def __init__(self, device: str):
        self.device, self.peak = device, None
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)

    def stamp(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        torch.cuda.synchronize(self.device)
        self.peak = torch.cuda.max_memory_allocated(self.device)
        return start.elapsed_time(end) / 1000


def clock(device: str, kind: str = "wall") -> Clock:
    """The clock of a device. kind: key of HOST, for the CPU."""
    if kind not in HOST:
        raise ForcingError(f"The clock {kind!r} is not known. Use one of {', '.join(HOST)}.")
    return HostClock(kind) if device == "cpu" else CudaClock(device)


def laps(of: Clock, stamps: list[Any]) -> list[float]:
    """Seconds between neighbouring stamps."""
    return [of.seconds(a, b) for a, b in pairwise(stamps)]


def check_device(device: str) -> None:
    """Raises ForcingError for a device that this machine or this PyTorch does not have."""
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ForcingError(f"The device {device!r} is not known. Use cpu, cuda or cuda:1.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ForcingError("This PyTorch sees no CUDA device. Use --device cpu, or install a CUDA build of PyTorch.")
