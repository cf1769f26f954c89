"""Stores that live in host memory: the device holds the buffers of two layers, the one at work and the next.

Layers are visited in order, pass after pass. Entering a layer starts the copy of the next one to the device, so that
it travels while this one computes; what a layer writes goes back to the host at once. On CUDA all copies run in one
side stream over pinned memory. On other devices the same steps run in line, one after the other.

Why nothing is read too early or overwritten too soon: the copies of one stream keep their order, so a layer is never
fetched before what was written to it is home. They wait for a mark in the computing stream, set when a layer is
entered: all that reads the other stage has been queued before it. And the computing stream waits for a stage's own
copy before it touches it.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Iterable, Protocol, Sequence

import torch
from torch import Tensor

STAGES = 2


class Layer(Protocol):
    """The buffers of one layer; tensors [B, T, ...] in a fixed order."""

    def tensors(self) -> tuple[Tensor, ...]: ...


class InLine:
    """Copies that are done when they are asked for."""

    def __init__(self, device: torch.device):
        pass

    def mark(self) -> Any:
        """Point behind all that the computing stream has been given so far."""
        return None

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], mark: Any) -> Any:
        """Copy (source, target) pairs, not before the mark is reached; returns what `wait` waits for."""
        for source, target in pairs:
            target.copy_(source)

    def wait(self, arrived: Any) -> None:
        """Let the computing stream go no further before a copy has arrived."""

    def use(self, t: Tensor) -> None:
        """Say that this tensor of the device takes part in copies."""

    def finish(self) -> None:
        """Wait until all copies have arrived."""


class SideStream(InLine):
    """Copies in a CUDA stream of their own, beside the current one."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], mark: torch.cuda.Event) -> torch.cuda.Event:
        self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, arrived: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(arrived)

    def use(self, t: Tensor) -> None:
        t.record_stream(self._stream)  # so that its memory, once freed, is not handed on while a copy is under way

    def finish(self) -> None:
        self._stream.synchronize()


STREAMS: dict[str, Callable[[torch.device], InLine]] = {"cuda": SideStream}


@dataclass
class _Stage:
    """Buffers on the device and the layer they show. arrived: of the last copy to them."""

    data: Layer
    layer: int = -1
    arrived: Any = None


class Stages:
    """The device's share of an offloaded store.

    make: allocates a layer's buffers on the device. Call `enter` before a layer's buffers are read or written, and
    `keep` after slots of the layer entered last were written.
    """

    def __init__(self, device: torch.device, make: Callable[[], Layer]):
        self._make, self._stream = make, STREAMS.get(device.type, InLine)(device)
        self._stages: list[_Stage] = []
        self._now: _Stage | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for stage in self._stages for t in stage.data.tensors())

    def enter(self, layer: int, home: Sequence[Layer | None], used: slice) -> Layer:
        """The buffers of a layer, on the device. home: those of all layers on the host, None before their first
        write; used: slots worth copying."""
        if self._now is not None and self._now.layer == layer:
            return self._now.data
        mark = self._stream.mark()
        self._now = self._showing(layer) or self._fetch(layer, home[layer], used, mark)
        self._stream.wait(self._now.arrived)
        after = (layer + 1) % len(home)
        if home[after] is not None and self._showing(after) is None:
            self._fetch(after, home[after], used, mark)
        return self._now.data

    def keep(self, home: Layer, slots: slice) -> None:
        """Bring what was written into these slots of the layer entered last home. Slots written twice are brought
        twice, in order: what is home in the end is right even if the first copy met the second write."""
        self._stream.copy(_pairs(self._now.data, home, slots), self._stream.mark())

    def finish(self) -> None:
        """Wait until all that was written is home."""
        self._stream.finish()

    def _showing(self, layer: int) -> _Stage | None:
        return next((stage for stage in self._stages if stage.layer == layer), None)

    def _fetch(self, layer: int, home: Layer, used: slice, mark: Any) -> _Stage:
        """Start to copy a layer into the stage that is not in use."""
        if len(self._stages) < STAGES:
            self._stages.append(_Stage(self._make()))
            for t in self._stages[-1].data.tensors():
                self._stream.use(t)
        stage = next(s for s in reversed(self._stages) if s is not self._now)
        stage.layer, stage.arrived = layer, self._stream.copy(_pairs(home, stage.data, used), mark)
        return stage


def _pairs(source: Layer, target: Layer, slots: slice) -> list[tuple[Tensor, Tensor]]:
    """Slots of one layer's buffers and of another's. Sample by sample: such slices are contiguous, and only contiguous
    memory is copied without a stop."""
    return [pair for a, b in zip(source.tensors(), target.tensors(), strict=True)
            for pair in zip(a[:, slots].unbind(0), b[:, slots].unbind(0))]


def pinned(device: torch.device) -> Callable[[tuple[int, ...], torch.dtype], Tensor]:
    """An allocator of host memory that this device can copy from and to on its own."""
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
