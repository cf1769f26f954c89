"""Where a rollout stands between two blocks, beside the memories of its denoiser.

Axis legend of latents: [B, C, F, H, W]. A rollout that is handed a `RolloutState` keeps it up to date: whenever a block
has been yielded, it and the denoiser's memories are all that another rollout needs to go on with the next block, bit for
bit. Noise is keyed by seed and block, so there is no generator to save.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Iterable, Iterator, Sequence

from torch import Tensor

from ..errors import ForcingError
from ..plan import Block
from ..saved import LARGEST, Saved, Tree
from .transitions import History


@dataclass
class RolloutState:
    """done: the newest final block and its latents; its clean pass is still to come. history: newest clean latents before
    it. first: first latent frame of the video, where a rollout recomputes it. in_work: blocks that are being denoised
    together, with their noisy latents. knot: clean latents that the next block begins with. An empty state is the beginning
    of a video."""

    done: tuple[Block, Tensor] | None = None
    history: History | None = None
    first: Tensor | None = None
    in_work: dict[Block, Tensor] = field(default_factory=dict)
    knot: Tensor | None = None

    def remember(self, window: int | None) -> History:
        """The history, with room for `window` frames from now on."""
        self.history = self.history or History(window)
        self.history.window = window
        return self.history

    def left(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Those of the blocks that are still to be made. Raises ForcingError where the done one is not one of them."""
        for block in blocks:
            if self.done is None or block.index > self.done[0].index:
                yield block
            elif block.index == self.done[0].index and block != self.done[0]:
                raise ForcingError(f"The snapshot ends with latent frames {_span(self.done[0])}, where this video has a "
                                   f"block of {_span(block)}. Use the block size and the given frames of the first run; a "
                                   "short last block cannot be gone on from.")

    def check_in_work(self, blocks: Sequence[Block], steps: int) -> None:
        """Raise ForcingError where a rolling rollout over these blocks would have others in work now."""
        wanted = list(blocks[self.done[0].index + 1:self.done[0].index + steps])
        if sorted(self.in_work, key=lambda b: b.index) != wanted:
            raise ForcingError(f"The snapshot has {len(self.in_work)} blocks in work, this video would have {len(wanted)} now. "
                               "Use the steps of the first run; to go on beyond its end, take a snapshot from before its "
                               f"last {steps} blocks.")

    def state(self) -> Tree:
        """As `saved` explains. Only once a block is done."""
        tree: Tree = {"block": _numbers(self.done[0]), "latents": self.done[1],
                      "in work": {str(i): {"block": _numbers(block), "latents": latents}
                                  for i, (block, latents) in enumerate(self.in_work.items())}}
        if self.history is not None and self.history.latents is not None:
            tree["history"] = self.history.latents
        tree |= {} if self.first is None else {"first": self.first}
        return tree | ({} if self.knot is None else {"knot": self.knot})

    @classmethod
    def load(cls, saved: Saved, size: tuple[int, int, int, int], device) -> RolloutState:
        """size: (B, C, H, W) of the latents. Raises ForcingError for what does not fit."""
        def latents(part: Saved, name: str, frames: int | None) -> Tensor:
            return part.tensor(name, (*size[:2], frames, *size[2:])).to(device)

        def block(part: Saved) -> tuple[Block, Tensor]:
            numbers = part.integers("block", 0, LARGEST)
            if len(numbers) != 3 or not numbers[2]:
                raise ForcingError("A block of the snapshot makes no sense. Take an earlier or another snapshot.")
            return Block(*numbers), latents(part, "latents", numbers[2])

        state = cls(block(saved), in_work=dict(block(saved.part("in work").part(n)) for n in saved.part("in work")))
        if "history" in saved:
            state.history = History(None)
            state.history.add(latents(saved, "history", None))
        state.first = latents(saved, "first", 1) if "first" in saved else None
        state.knot = latents(saved, "knot", None) if "knot" in saved else None
        return state


def _numbers(block: Block) -> list[int]:
    return [block.index, block.first, block.frames]


def _span(block: Block) -> str:
    return f"{block.first}-{block.end - 1}"
