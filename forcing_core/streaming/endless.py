"""The blocks of a video without an end: computed when asked for, never laid out."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..plan import Block

ENDLESS = 10 ** 9  # latent frames that stand for "no end": eight years


@dataclass(frozen=True)
class EndlessBlocks(Sequence):
    """What `plan.layout` would give for ENDLESS frames, without holding them. given, independent_first: as there."""

    block: int
    given: int = 0
    independent_first: bool = False

    @property
    def head(self) -> int:
        """Frames of a first block that differs from the others, or 0."""
        return 1 if self.independent_first and self.given == 0 else 0

    def __len__(self) -> int:
        return bool(self.head) + (ENDLESS - self.given - self.head) // self.block

    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        if self.head and index == 0:
            return Block(0, self.given, self.head)
        return Block(index, self.given + self.head + (index - bool(self.head)) * self.block, self.block)
