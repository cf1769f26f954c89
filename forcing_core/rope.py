"""Three-axis rotary embedding of Wan 2.1 at any temporal position.

Axis legend: n token, p complex pair (head_dim / 2), s tokens of one latent frame.

Angles are computed in float64 from exact positions; only their cosines and sines are rounded to float32.
Positions in the compute dtype would be wrong above 256 frames in bfloat16.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor

THETA = 10000.0
KEPT_TABLES = 4  # of one pass: the query's and those of up to three moved stretches
TABLE_ROWS = 1024  # rows of the published table: the largest usable absolute position is 1023


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Real dimensions of (time, height, width): 44, 42, 42 for a head of 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def angles(positions: Sequence[float], dim: int, base: float = THETA) -> Tensor:
    """float64 [len(positions), dim // 2]: pair i of an axis turns by position * base^(-2i / dim)."""
    scale = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return torch.outer(torch.tensor(list(positions), dtype=torch.float64), 1.0 / base ** scale)


def _matrices(angle: Tensor) -> Tensor:
    """[..., p] float64 angles -> [..., p, 2, 2] float32 rotation matrices."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)).float()


class HeadTable(NamedTuple):
    """Rotations of whole frames that differ from head to head in time, and are the same in space; kept apart, since
    together they would be as large as the keys. time: float32 [frames, 1, H, p_time, 2, 2]; space: [s, 1, p_space, 2, 2]."""

    time: Tensor
    space: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        sizes = [2 * part.shape[-3] for part in self]
        parts = x.unflatten(1, (len(self.time), -1)).split(sizes, dim=-1)
        return torch.cat([_turned(part, by) for part, by in zip(parts, self)], dim=-1).flatten(1, 2)


@dataclass
class Rope:
    """Rotation tables for one grid of tokens.

    grid: (rows, columns) of tokens in a latent frame; head_dim: real dimensions of a head. bases: of the angles in time,
    one for every head; none: 10000 for all of them.
    """

    grid: tuple[int, int]
    head_dim: int
    device: torch.device | str = "cpu"
    bases: tuple[float, ...] = ()
    _space: Tensor = field(init=False, repr=False)
    _recent: dict[tuple, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        _, dim_h, dim_w = axis_dims(self.head_dim)
        rows, columns = self.grid
        h = _matrices(angles(range(rows), dim_h))[:, None].expand(-1, columns, -1, -1, -1)
        w = _matrices(angles(range(columns), dim_w))[None].expand(rows, -1, -1, -1, -1)
        self._space = torch.cat([h, w], dim=2).flatten(0, 1).to(self.device)

    def table(self, positions: Sequence[float]) -> Tensor | HeadTable:
        """float32 [1, frames*s, 1, p, 2, 2] for whole frames at these temporal positions, or a `HeadTable`.

        The last few are kept: every layer of a pass asks for the same ones, and so do the passes of a block.
        """
        return self._keep(tuple(positions), self._build)

    def tokens(self, positions: Tensor, cells: Tensor, low: int, high: int) -> Tensor:
        """float32 [B, n, 1, p, 2, 2] for single tokens: their temporal positions, all in low..high-1, and their places
        in the frame, int64 [B, n] each."""
        time = self._keep(("time", low, high), lambda key: self._time(range(low, high)))
        return torch.cat([time[positions - low], self._space[cells]], dim=2)[:, :, None]

    def _keep(self, key: tuple, build: Callable[[tuple], Tensor]) -> Tensor:
        if key not in self._recent:
            if len(self._recent) >= KEPT_TABLES:
                self._recent.pop(next(iter(self._recent)))
            self._recent[key] = build(key)
        return self._recent[key]

    def _time(self, positions: Sequence[float]) -> Tensor:
        return _matrices(angles(positions, axis_dims(self.head_dim)[0])).to(self.device)

    def _build(self, positions: Sequence[float]) -> Tensor | HeadTable:
        if self.bases:
            dim = axis_dims(self.head_dim)[0]
            each = torch.stack([angles(positions, dim, base) for base in self.bases], dim=1)
            return HeadTable(_matrices(each)[:, None].to(self.device), self._space[:, None])
        time = self._time(positions)
        frames, tokens = time.shape[0], self._space.shape[0]
        time = time[:, None].expand(-1, tokens, -1, -1, -1)
        space = self._space[None].expand(frames, -1, -1, -1, -1)
        return torch.cat([time, space], dim=2).flatten(0, 1)[None, :, None]


def rotate(x: Tensor, table: Tensor | HeadTable) -> Tensor:
    """Turn adjacent pairs of x [B, n, heads, head_dim] by `table` [1, n, 1, p, 2, 2] or a `HeadTable` of the same frames;
    math in float32."""
    return table.rotate(x) if isinstance(table, HeadTable) else _turned(x, table)


def _turned(x: Tensor, table: Tensor) -> Tensor:
    pairs = x.to(table.dtype).reshape(*x.shape[:-1], -1, 1, 2)
    out = table[..., 0] * pairs[..., 0]
    out.addcmul_(table[..., 1], pairs[..., 1])
    return out.reshape(x.shape).type_as(x)
