"""Three-axis rotary embedding of Wan 2.1 at any temporal position.

Axis legend: n token, p complex pair (head_dim / 2), s tokens of one latent frame.

Angles are computed in float64 from exact positions; only their cosines and sines are rounded to float32.
Positions in the compute dtype would be wrong above 256 frames in bfloat16.

A rotation is one complex product where the device has those (nine times as fast as 2x2 matrices on a CPU), and two
multiplications by the columns of a matrix elsewhere. Both round differently in the last bit; ComfyUI has matrices.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor

THETA = 10000.0
KEPT_TABLES = 4  # of one pass: the query's and those of up to three moved stretches
COMPLEX = ("cpu", "cuda")  # kinds of device whose complex products are known to work
TABLE_ROWS = 1024  # rows of the published table: the largest usable absolute position is 1023


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Real dimensions of (time, height, width): 44, 42, 42 for a head of 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def angles(positions: Sequence[float], dim: int, base: float = THETA) -> Tensor:
    """float64 [len(positions), dim // 2]: pair i of an axis turns by position * base^(-2i / dim)."""
    scale = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return torch.outer(torch.tensor(list(positions), dtype=torch.float64), 1.0 / base ** scale)


def _angles_at(positions: Tensor, dim: int) -> Tensor:
    """The same of a tensor of positions, [..., dim // 2], on its device where that has float64."""
    wide = positions.cpu() if positions.device.type == "mps" else positions
    scale = torch.arange(0, dim, 2, dtype=torch.float64, device=wide.device) / dim
    return wide[..., None].double() * (1.0 / THETA ** scale)


def _matrices(angle: Tensor) -> Tensor:
    """[..., p] float64 angles -> [..., p, 2, 2] float32 rotation matrices."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)).float()


def _phases(angle: Tensor) -> Tensor:
    """[..., p] float64 angles -> [..., p] complex64 of length 1."""
    return torch.complex(angle.cos().float(), angle.sin().float())


class HeadTable(NamedTuple):
    """Rotations of whole frames that differ from head to head in time, and are the same in space; kept apart, since
    together they would be as large as the keys. time: complex64 [frames, 1, H, p_time]; space: [s, 1, p_space]; as
    matrices float32 with [2, 2] behind."""

    time: Tensor
    space: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        sizes = [2 * part.shape[-1 if part.is_complex() else -3] for part in self]
        parts = x.unflatten(1, (len(self.time), -1)).split(sizes, dim=-1)
        return torch.cat([_turned(part, by) for part, by in zip(parts, self)], dim=-1).flatten(1, 2)


@dataclass
class Rope:
    """Rotation tables for one grid of tokens.

    grid: (rows, columns) of tokens in a latent frame; head_dim: real dimensions of a head. bases: of the angles in time,
    one for every head; none: 10000 for all of them. matrices: rotate as ComfyUI does, to the last bit.
    """

    grid: tuple[int, int]
    head_dim: int
    device: torch.device | str = "cpu"
    bases: tuple[float, ...] = ()
    matrices: bool = False
    _space: Tensor = field(init=False, repr=False)
    _recent: dict[tuple, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        _, dim_h, dim_w = axis_dims(self.head_dim)
        rows, columns = self.grid
        plain = self.matrices or torch.device(self.device).type not in COMPLEX
        self._turns = _matrices if plain else _phases
        h = self._turns(angles(range(rows), dim_h)).unsqueeze(1)
        w = self._turns(angles(range(columns), dim_w)).unsqueeze(0)
        h, w = h.expand(rows, columns, *h.shape[2:]), w.expand(rows, columns, *w.shape[2:])
        self._space = torch.cat([h, w], dim=2).flatten(0, 1).to(self.device)

    def table(self, positions: Sequence[float]) -> Tensor | HeadTable:
        """complex64 [1, frames*s, 1, p] for whole frames at these temporal positions, as matrices float32
        [1, frames*s, 1, p, 2, 2], or a `HeadTable`.

        The last few are kept: every layer of a pass asks for the same ones, and so do the passes of a block.
        """
        return self._keep(tuple(positions), self._build)

    def tokens(self, positions: Tensor, cells: Tensor, low: int, high: int) -> Tensor:
        """As `table`, with [B, n] in front, for single tokens: their temporal positions, all in low..high-1, and their
        places in the frame, int64 [B, n] each. The cost does not grow with the range."""
        if high - low > positions.shape[1]:  # as it does late in a long video
            time = self._turns(_angles_at(positions, axis_dims(self.head_dim)[0])).to(self.device)
        else:
            time = self._keep(("time", low, high), lambda key: self._time(range(low, high)))[positions - low]
        return torch.cat([time, self._space[cells]], dim=2)[:, :, None]

    def _keep(self, key: tuple, build: Callable[[tuple], Tensor]) -> Tensor:
        if key not in self._recent:
            if len(self._recent) >= KEPT_TABLES:
                self._recent.pop(next(iter(self._recent)))
            self._recent[key] = build(key)
        return self._recent[key]

    def _time(self, positions: Sequence[float]) -> Tensor:
        return self._turns(angles(positions, axis_dims(self.head_dim)[0])).to(self.device)

    def _build(self, positions: Sequence[float]) -> Tensor | HeadTable:
        if self.bases:
            dim = axis_dims(self.head_dim)[0]
            each = torch.stack([angles(positions, dim, base) for base in self.bases], dim=1)
            return HeadTable(self._turns(each)[:, None].to(self.device), self._space[:, None])
        time, space = self._time(positions).unsqueeze(1), self._space.unsqueeze(0)
        sizes = len(time), self._space.shape[0]
        time, space = time.expand(*sizes, *time.shape[2:]), space.expand(*sizes, *space.shape[2:])
        return torch.cat([time, space], dim=2).flatten(0, 1)[None, :, None]


def rotate(x: Tensor, table: Tensor | HeadTable) -> Tensor:
    """Turn adjacent pairs of x [B, n, heads, head_dim] by a table of the same tokens; math in float32."""
    return table.rotate(x) if isinstance(table, HeadTable) else _turned(x, table)


def _turned(x: Tensor, table: Tensor) -> Tensor:
    if table.is_complex():
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2).type_as(x)
    pairs = x.to(table.dtype).reshape(*x.shape[:-1], -1, 1, 2)
    out = table[..., 0] * pairs[..., 0]
    out.addcmul_(table[..., 1], pairs[..., 1])
    return out.reshape(x.shape).type_as(x)
