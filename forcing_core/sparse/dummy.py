"""Dummy Forcing: heads that hardly look back get a short memory.

Once in a video, in the first denoising step of the first block with a middle (an oldest block and at least one between it
and the current one), every head's attention mass on the oldest block, the middle and the current block is measured with a
few queries. Of all heads of the network those with the most mass on the current block become dummies, which see the block
before and the current one. The others are sink heads, with more mass on the oldest block than on the middle, which see the
oldest block and the current one; or local ones, which see the newest past frames and the current block.

Source: arXiv 2601.20499 (public repo csguoh/DummyForcing: half of the heads are dummies). How many frames local heads see
is a setting here. Needs no training.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ForcingError
from .selection import Blocks, Selection
from .view import View

DUMMY, SINK, LOCAL = range(3)
KINDS = ("dummy", "sink", "local")


@dataclass(frozen=True)
class DummyOptions:
    """share: part of all heads that are dummies. local: newest past latent frames that local heads see. samples: queries that
    are asked. Raises ForcingError."""

    share: float = 0.5
    local: int = 6
    samples: int = 64
    name: ClassVar[str] = "dummy"

    def __post_init__(self):
        if not 0 <= self.share <= 1 or self.local < 0 or self.samples < 1:
            raise ForcingError(f"share {self.share}, local {self.local} and {self.samples} samples make no sense. Use a share "
                               "of 0 to 1, local from 0 on, and at least 1 sample.")


def choose(options: DummyOptions, view: View, q: Tensor, k: Tensor) -> Selection | None:
    """Whole frames for every head; None, all of them, until the heads are known."""
    past, heads, block = view.past, view.heads, view.video.block
    if heads.kinds:
        return _by_kind(options, view, past, q, k)
    if view.step == 0 and len(past) >= 2 * block:
        heads.mass[view.layer] = _mass(options, view, past[:block], q, k)
        if len(heads.mass) == view.video.layers:  # the last layer: from the next pass on
            heads.kinds = compared(heads.mass, options.share)
    return None


def compared(mass: dict[int, Tensor], share: float) -> tuple[tuple[int, ...], ...]:
    """Kind of every head of every layer, of the [H, 3] masses on the oldest block, the middle and the current one."""
    whole = torch.stack([mass[layer] for layer in sorted(mass)]).cpu()
    kinds = torch.where(whole[..., 0] >= whole[..., 1], SINK, LOCAL)
    count = round(share * kinds.numel())
    most = whole[..., 2].flatten().sort(descending=True, stable=True).indices[:count]
    kinds.view(-1)[most] = DUMMY
    return tuple(map(tuple, kinds.tolist()))


def _mass(options: DummyOptions, view: View, first: tuple[int, ...], q: Tensor, k: Tensor) -> Tensor:
    """float32 [H, 3], the mean over samples and queries."""
    n = q.shape[1]
    asked = q[:, torch.linspace(0, n - 1, min(options.samples, n), device=q.device).round().long()]
    weights = (torch.einsum("bnhd,bmhd->bhnm", asked.float(), k.float()) * q.shape[-1] ** -0.5).softmax(dim=-1)
    part = [0 if i in first else 2 if frame in view.own else 1 for i, frame in enumerate(view.frames)]
    part = torch.tensor(part, device=q.device).repeat_interleave(view.video.tokens)[:k.shape[1]]
    mean = weights.mean(dim=(0, 2))
    return mean.new_zeros(mean.shape[0], 3).index_add_(1, part, mean)


def _by_kind(options: DummyOptions, view: View, past: tuple[int, ...], q: Tensor, k: Tensor) -> Selection:
    block, own = view.video.block, [i for i, frame in enumerate(view.frames) if frame in view.own]
    seen = {DUMMY: past[-block:], SINK: past[:block], LOCAL: past[len(past) - min(options.local, len(past)):]}
    table = torch.zeros(len(KINDS), len(view.frames), dtype=torch.bool)
    for kind, places in seen.items():
        table[kind, [*places, *own]] = True
    chosen = table[list(view.heads.kinds[view.layer])].to(q.device)[None, :, None].expand(q.shape[0], -1, -1, -1)
    queries = Blocks(q.shape[1], q.shape[1], q.shape[1])
    return Selection(queries, Blocks(k.shape[1], view.video.tokens, view.video.tokens), chosen)

