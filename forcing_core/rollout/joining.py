"""A denoiser that holds a clean pass back until the next noisy pass, to make both in one forward (`joined.py`)."""
from __future__ import annotations

from typing import Any, Sequence

from torch import Tensor

from ..denoiser import Denoiser
from ..joined import Frames
from ..plan import Phase
from ..schedule import Level


class Joining:
    """Any rollout runs over it as over the denoiser inside. Whatever else is asked of that one - another prompt, a flush,
    its state - finds the clean pass made, in a forward of its own."""

    def __init__(self, denoiser: Denoiser):
        self._denoiser = denoiser
        self._waiting: Frames | None = None

    def __call__(self, x: Tensor, levels: Sequence[Level], first: int, phase: Phase) -> Tensor | None:
        if phase == "noisy" and self._waiting is not None:
            clean, self._waiting = self._waiting, None
            return self._denoiser.joined(clean, Frames(x, levels, first))
        self._catch_up()
        if phase != "clean" or not self._denoiser.joins:
            return self._denoiser(x, levels, first, phase)
        self._waiting = Frames(x, levels, first)
        return None

    def __getattr__(self, name: str) -> Any:
        self._catch_up()
        return getattr(self._denoiser, name)

    def _catch_up(self) -> None:
        if self._waiting is not None:
            (x, levels, first), self._waiting = self._waiting, None
            self._denoiser(x, levels, first, "clean")
