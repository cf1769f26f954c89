"""The block rollout without clean passes, for a memory that keeps what every denoising step saw at its own noise level.

Source: arXiv 2512.04677 (Live Avatar); see `policies.per_step`.
"""
from __future__ import annotations

from typing import Any, Iterable, Iterator, Sequence

from torch import Tensor

from ..denoiser import Denoiser
from ..noise import Noise
from ..plan import Block
from ..schedule import Level
from .block import block_rollout


def per_step_rollout(denoiser: Denoiser, blocks: Iterable[Block], levels: Sequence[Level], noise: Noise,
                     **settings: Any) -> Iterator[tuple[Block, Tensor]]:
    """Yield (block, x0 [B, C, n, H, W]) as each block becomes final. settings: as in `block_rollout`; given frames are written
    by clean passes, as there."""
    yield from block_rollout(denoiser, blocks, levels, noise, leave=_nothing, **settings)


def _nothing(denoiser: Denoiser, block: Block, x0: Tensor, context_timestep: float) -> None:
    """All that stays of a block is there already."""
