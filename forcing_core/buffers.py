"""Where the numbers of a store lie: buffers of every layer, made at their first use, on the device or in host memory.

Axis legend: B batch, T slots or tokens, H heads, D head_dim.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from .codecs import CODECS, Buffer, Codec, Empty, tensors
from .errors import ForcingError
from .offload import Stages, pinned


class Keys(Enum):
    ROPED = "roped"
    BOTH = "both"
    RAW = "raw"

    @property
    def tensors(self) -> int:
        """Buffers a layer, values included."""
        return 3 if self is Keys.BOTH else 2


@dataclass(frozen=True)
class Storage:
    """How a store keeps its frames. codec: key of `codecs.CODECS`. dense: newest latent frames that are also kept in
    the compute dtype and read from there. offload: the buffers live in host memory, two layers on the device.

    Raises ForcingError for what does not exist or makes no sense.
    """

    codec: str = "model"
    dense: int = 0
    offload: bool = False

    def __post_init__(self):
        if self.codec not in CODECS:
            raise ForcingError(f"store = {self.codec!r} is not known. Use one of {', '.join(CODECS)}.")
        if self.dense < 0 or (self.dense and self.coder.exact):
            raise ForcingError(f"dense = {self.dense} with store {self.codec!r} makes no sense. Use dense 0, or a positive "
                               "number of frames with store int8 or fp8.")

    @property
    def coder(self) -> Codec:
        return CODECS[self.codec]

    def keys(self, wanted: Keys) -> Keys:
        """The arrangement in use where a policy needs `wanted`."""
        return Keys.RAW if wanted is Keys.BOTH and not self.coder.exact else wanted


PLAIN = Storage()


@dataclass
class Layer:
    """Buffers of one layer, each [B, T, ...]. `raw` or `roped` is None by arrangement."""

    v: Buffer
    raw: Buffer | None
    roped: Buffer | None

    def tensors(self) -> tuple[Tensor, ...]:
        return tensors(self.v) + tensors(self.raw) + tensors(self.roped)


class Buffered(ABC):
    """What stores have in common. layers: how many; keys, storage: their arrangement; _data: their buffers where they
    live; _used: leading slots that are worth copying; _stages: the device's share of them, with offload."""

    layers: int
    keys: Keys
    storage: Storage
    _data: list[Layer | None]
    _used: int
    _stages: Stages | None

    @abstractmethod
    def _shape(self, like: Tensor) -> tuple[int, ...]:
        """Of a buffer for keys or values like [B, n, H, D]."""

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory allocated now, by an offloaded store."""
        return self._data_bytes() if self.storage.offload else 0

    def _resident_bytes(self) -> int:
        """Bytes of the device that the buffers take now."""
        return self._stages.nbytes if self._stages else 0 if self.storage.offload else self._data_bytes()

    def _data_bytes(self) -> int:
        return sum(t.nbytes for data in self._data if data for t in data.tensors())

    def _reserve(self, layer: int, like: Tensor) -> None:
        """Allocate the buffers of a layer, if there are none."""
        if self._data[layer] is None:
            make = partial(self._make, self._shape(like), like.dtype)
            here = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=like.device)  # noqa: E731
            self._data[layer] = make(pinned(like.device) if self.storage.offload else here)
            if self.storage.offload and self._stages is None:
                self._stages = Stages(like.device, partial(make, here))

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype, empty: Empty) -> Layer:
        buffer = lambda: self.storage.coder.make(shape, dtype, empty)  # noqa: E731
        return Layer(v=buffer(), raw=None if self.keys is Keys.ROPED else buffer(),
                     roped=None if self.keys is Keys.RAW else buffer())

    def _at(self, layer: int) -> Layer:
        """The buffers of a layer where they can be worked on."""
        return self._data[layer] if self._stages is None else self._stages.enter(layer, self._data, slice(self._used))

    def _written(self, layer: int, slots: slice) -> None:
        """What was written into these slots of the layer entered last has to go home."""
        if self._stages is not None:
            self._stages.keep(self._data[layer], slots)
