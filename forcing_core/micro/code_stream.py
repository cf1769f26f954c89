"""Decoding the linear code block by block: what `LinearCode.decode` would make of the whole video, with nothing held."""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from ..saved import Saved, Tree


class CodeStream:
    """decode: latents [B, 16, F, h, w] to a video [B, 3, 1 + 4 (F - 1), H, W], the first latent frame being one picture."""

    nbytes = 0  # nothing stays between blocks

    def __init__(self, decode: Callable[[Tensor], Tensor]):
        self.decode, self._started = decode, False

    def state(self) -> Tree:
        """What a fresh stream needs to go on with the next block."""
        return {"started": int(self._started)}

    def load(self, saved: Saved, latents: Tensor) -> None:
        """Go on where the saved one stood."""
        self._started = bool(saved.integer("started", 0, 2))

    def push(self, latents: Tensor) -> Tensor:
        """The video of the next latents. The first block gives 4 F - 3 frames, every later one 4 F."""
        if self._started:  # cells do not see each other, so any latent may stand before them
            return self.decode(torch.cat([latents[:, :, :1], latents], dim=2))[:, :, 1:]
        self._started = True
        return self.decode(latents)
