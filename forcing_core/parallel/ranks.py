"""The processes that share one rollout, and what they send each other.

Everything travels as bytes: not every backend knows every type of number, and nothing here is added up.
"""
from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ForcingError

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class Ranks:
    """rank: number of this process; size: how many there are; device: of its tensors."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def swap(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """All-to-all. Of every tensor [size, ...], row r goes to process r; what comes back has in row r what process r sent
        here. All in one message."""
        flat = [t.reshape(self.size, -1).view(torch.uint8) for t in parts]
        sent = torch.cat(flat, dim=1)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent)
        rows = got.split([t.shape[1] for t in flat], dim=1)
        return [row.contiguous().view(t.dtype).view(t.shape) for row, t in zip(rows, parts)]

    def whole(self, t: Tensor, dim: int) -> Tensor:
        """The shares of all processes, behind each other along an axis."""
        mine = _bytes(t)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return torch.cat([_like(t, row) for row in rows], dim=dim)

    def collect(self, t: Tensor, dim: int) -> Tensor:
        """The same in host memory of process 0; the others keep their share."""
        if not t.numel():
            return t
        mine = _bytes(t.to(self.device))
        rows = [torch.empty_like(mine) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(mine, rows)
        return t if rows is None else torch.cat([_like(t, row.cpu()) for row in rows], dim=dim)


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def _like(t: Tensor, row: Tensor) -> Tensor:
    return row.view(t.dtype).view(t.shape)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """This process as one of those that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT speak of, as `launch` and
    torchrun set them; alone without them. Raises ForcingError for a device that is not there."""
    own = device_of(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks(device=own)
        return
    dist.init_process_group(BACKENDS[own.type], device_id=own if own.type == "cuda" else None)
    try:
        yield Ranks(dist.get_rank(), size, own)
    finally:
        dist.destroy_process_group()


def device_of(kind: str) -> torch.device:
    """The device of this process: with CUDA the one of its number on this host. Raises ForcingError where it is not there."""
    if kind not in BACKENDS:
        raise ForcingError(f"Processes cannot share the device {kind!r}. Use {' or '.join(BACKENDS)}.")
    if kind == "cpu":
        return torch.device("cpu")
    number, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= found:
        raise ForcingError(f"Process {number} of this host has no GPU: PyTorch sees {found}. Use --processes {max(1, found)} "
                           "or --device cpu.")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
