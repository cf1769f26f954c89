"""How keys and values lie in a buffer of the store, and how they come back.

Axis legend: B batch, T slots (latent frames), s tokens of a frame, H heads, D head_dim.

    model   the compute dtype as it is: what is read are views, nothing is computed.
    int8    symmetric, one scale for the D numbers of a (token, head): half the bytes and 1/128 for the scales.
    fp8     float8_e4m3fn, one scale for a (frame, head): half the bytes. A float's error is relative, so finer
            scales would not lower it; three bits of mantissa make it three times that of int8.

Every pass writes and reads through the codec, noisy ones too, so that a block sees its own frames as later blocks
will. Idea: KIVI (arXiv 2402.02750) for language models, its use on this family in 2602.02958 and 2603.27469.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Callable, NamedTuple, Protocol, Sequence

import torch
from torch import Tensor

from .errors import ForcingError

Shape = tuple[int, ...]
Empty = Callable[[Shape, torch.dtype], Tensor]  # where a buffer's memory comes from


class Packed(NamedTuple):
    """A buffer of codes [B, T, s, H, D] with the scales that turn them into numbers of the compute dtype."""

    codes: Tensor
    scale: Tensor


Buffer = Tensor | Packed


class Codec(Protocol):
    """exact: what is read is what was written, bit for bit.

    make: a buffer of shape [B, T, s, H, D] for numbers of `dtype`. write: frames x [B, n, s, H, D] into
    neighbouring slots. read: the frames of these slots as [B, n*s, H, D]. pack, unpack: the same for a buffer that is
    made of these numbers alone, and back, in any order of axes. bytes: of a buffer of this shape. check: ForcingError
    where a device cannot do it.

    Single tokens instead of frames are a buffer with s = 1, so that each has scales of its own and can be moved alone.
    """

    exact: bool

    def make(self, shape: Shape, dtype: torch.dtype, empty: Empty) -> Buffer: ...

    def write(self, buffer: Buffer, slots: slice, x: Tensor) -> None: ...

    def read(self, buffer: Buffer, runs: Sequence[slice]) -> Tensor: ...

    def pack(self, x: Tensor) -> Buffer: ...

    def unpack(self, buffer: Buffer) -> Tensor: ...

    def bytes(self, shape: Shape, element_size: int) -> int: ...

    def check(self, device: torch.device | str) -> None: ...


class Plain:
    """The compute dtype as it is."""

    exact = True

    def make(self, shape: Shape, dtype: torch.dtype, empty: Empty) -> Tensor:
        return empty(shape, dtype)

    def write(self, buffer: Tensor, slots: slice, x: Tensor) -> None:
        buffer[:, slots] = x

    def read(self, buffer: Tensor, runs: Sequence[slice]) -> Tensor:
        parts = [buffer[:, run] for run in runs]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        return x

    def unpack(self, buffer: Tensor) -> Tensor:
        return buffer

    def bytes(self, shape: Shape, element_size: int) -> int:
        return prod(shape) * element_size

    def check(self, device: torch.device | str) -> None:
        pass


@dataclass(frozen=True)
class Scaled:
    """One byte a number and a scale, in the compute dtype, for a group of them.

    dtype: of the codes; largest: the code that the largest number of a group becomes; shared: axes of
    [B, T, s, H, D] along which a group lies; encode: float32 numbers in -largest..largest -> codes;
    decode(codes, scale, out): the numbers again.
    """

    name: str
    dtype: torch.dtype
    largest: float
    shared: tuple[int, ...]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Tensor, Tensor], Tensor]
    exact = False

    def make(self, shape: Shape, dtype: torch.dtype, empty: Empty) -> Packed:
        return Packed(empty(shape, self.dtype), empty(self._scales(shape), dtype))

    def write(self, buffer: Packed, slots: slice, x: Tensor) -> None:
        for kept, new in zip(buffer, self.pack(x)):
            kept[:, slots] = new

    def read(self, buffer: Packed, runs: Sequence[slice]) -> Tensor:
        codes, scale = buffer
        frames = sum(run.stop - run.start for run in runs)
        out, done = scale.new_empty(codes.shape[0], frames, *codes.shape[2:]), 0
        for run in runs:
            end = done + run.stop - run.start
            self.decode(codes[:, run], scale[:, run], out[:, done:end])
            done = end
        return out.flatten(1, 2)

    def pack(self, x: Tensor) -> Packed:
        scale = (x.abs().amax(self.shared, keepdim=True) / self.largest).clamp_min(torch.finfo(x.dtype).tiny)
        # divided by the scale as it is stored, in float32: a rounded quotient would be rounded twice
        codes = (x.float() / scale.float()).clamp_(-self.largest, self.largest)
        return Packed(self.encode(codes), scale)

    def unpack(self, buffer: Packed) -> Tensor:
        out = torch.empty_like(buffer.codes, dtype=buffer.scale.dtype)
        self.decode(*buffer, out)
        return out

    def bytes(self, shape: Shape, element_size: int) -> int:
        return prod(shape) * self.dtype.itemsize + prod(self._scales(shape)) * element_size

    def check(self, device: torch.device | str) -> None:
        """By doing it: which devices can convert depends on the version of torch and of the driver."""
        try:
            buffer = self.make((1, 1, 1, 1, 2), torch.float32, lambda s, dtype: torch.empty(s, dtype=dtype, device=device))
            self.write(buffer, slice(0, 1), torch.ones(1, 1, 1, 1, 2, device=device))
            ok = bool((self.read(buffer, [slice(0, 1)]) == 1).all())
        except (RuntimeError, TypeError, NotImplementedError):
            ok = False
        if not ok:
            raise ForcingError(f"{device} cannot keep keys and values as {self.name}. Use store 'model', or 'int8', "
                               "which works everywhere.")

    def _scales(self, shape: Shape) -> Shape:
        return tuple(1 if axis in self.shared else size for axis, size in enumerate(shape))


CODECS: dict[str, Codec] = {
    "model": Plain(),
    "int8": Scaled("int8", torch.int8, 127, (4,), lambda x: x.round_().to(torch.int8),
                   lambda codes, scale, out: torch.mul(codes, scale, out=out)),
    "fp8": Scaled("fp8", torch.float8_e4m3fn, 448, (2, 4), lambda x: x.to(torch.float8_e4m3fn),
                  lambda codes, scale, out: out.copy_(codes).mul_(scale)),
}


def tensors(buffer: Buffer | None) -> tuple[Tensor, ...]:
    """What a buffer is made of; all have [B, T, ...]."""
    return () if buffer is None else (buffer,) if isinstance(buffer, Tensor) else tuple(buffer)


def picked(buffer: Buffer, pick: Callable[[Tensor], Tensor]) -> Buffer:
    """The buffer that is left when `pick` chose from each of its tensors, codes and scales alike: nothing is rounded.

    pick only moves numbers, so it may be shown others of the same size.
    """
    return Packed(*(picked(t, pick) for t in buffer)) if isinstance(buffer, Packed) else pick(bits(buffer)).view(buffer.dtype)


def sample(buffer: Buffer, index: int) -> Buffer:
    """A view of one sample of a batch, [1, T, ...]."""
    here = slice(index, index + 1)
    return Packed(*(t[here] for t in buffer)) if isinstance(buffer, Packed) else buffer[here]


def bits(t: Tensor) -> Tensor:
    """The same memory as numbers that every device can index: float8 cannot be."""
    return t.view(torch.uint8) if t.is_floating_point() and t.element_size() == 1 else t
