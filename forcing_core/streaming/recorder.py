"""Blocks of a rollout to frames of a file, with all that a snapshot of a stream needs beside that of the rollout.

A snapshot holds the decoder's caches, the log, and the newest frames that may not be on the disk yet when the power goes.
A stream that goes on writes a second file, which begins with those. So the first file, cut where the second one begins,
and the second one are the video that would have been made without the interruption, frame by frame.
"""
from __future__ import annotations

from typing import Any, Callable, Iterator, Protocol

import numpy
import torch
from torch import Tensor

from ..errors import ForcingError
from ..saved import Saved, Tree
from ..steering import Entry, Steering, read_entries
from .live import Live
from .sink import VideoSink


class Decoder(Protocol):
    """A causal decoder that can be saved, as `DecodeStream`."""

    def state(self) -> Tree: ...

    def load(self, saved: Saved, latents: Tensor) -> None: ...


class Recorder:
    """One file of a stream. decode: frames [T, H, W, 3] of the next latents, in parts, as the sink takes them; decoder: what
    it remembers, or None for one that is never saved. start: number of the first frame of this file in the whole video.
    live: gets previews, or None."""

    def __init__(self, decode: Callable[[Tensor], Iterator[Any]], decoder: Decoder | None, sink: VideoSink, steering: Steering,
                 live: Live | None = None):
        self.decode, self.decoder, self.sink, self.steering, self.live = decode, decoder, sink, steering, live
        self.start, self._noted = 0, 0  # commands that are in the file

    @property
    def frames(self) -> int:
        """Of the whole video, earlier files included."""
        return self.start + self.sink.frames

    def write(self, latents: Tensor) -> None:
        """The next latents [1, C, F, h, w], in the decoder's scale."""
        for part in self.decode(latents):
            first = self.frames
            self.sink.write(part)
            if self.live is not None:
                self.live.previews.push(first, part)
        self.note()

    def note(self) -> bool:
        """Bring the log in the file up to date; whether it is."""
        count = len(self.steering.log)
        if count != self._noted and self.sink.rewrite(self.noted()):
            self._noted = count
        return count == self._noted

    def noted(self) -> dict[str, Any]:
        """What the file says about itself, for `replay`."""
        return {"version": 1, "start_frame": self.start, "log": [entry.plain() for entry in self.steering.log]}

    def state(self) -> Tree:
        """As `saved` explains, between two blocks. The sink has to `keep`."""
        tail = self.sink.tail()
        tree: Tree = {"frames": self.frames, "log": [entry.plain() for entry in self.steering.log],
                      "decoder": self.decoder.state()}
        return tree | ({"tail": torch.from_numpy(numpy.stack(tail).view(numpy.uint8))} if tail else {})

    def load(self, saved: Saved, latents: Tensor, scale: int) -> None:
        """Go on where the saved one stood: begins the file with the frames that the first one may lack. latents: an example
        [1, C, F, h, w] of the next ones; scale: sides of a frame in latent cells. Raises ForcingError for what does not
        fit."""
        frames = saved.integer("frames", 0, 1 << 40)
        self.decoder.load(saved.part("decoder"), latents)
        tail = ()
        if "tail" in saved:
            sides = [scale * side for side in latents.shape[3:]]
            tail = saved.tensor("tail", (None, *sides, None), torch.uint8).numpy()
            deep = self.sink.format.deep
            if tail.shape[-1] != 3 * (1 + deep):
                raise ForcingError(f"The snapshot's newest frames have {16 >> deep} bits a colour, this file {8 << deep}. Use "
                                   "the format of the first run.")
            tail = tail.view(numpy.uint16) if deep else tail
        if len(tail) > frames:
            saved.fail("tail", "is longer than the video")
        self.start = frames - len(tail)
        self.sink.hear_from(self.start)
        self.sink.rewrite(self.noted())
        self.sink.write(tail)


def saved_log(saved: Saved, done: int) -> tuple[Entry, ...]:
    """The log of a saved stream, up to block `done`. Raises ForcingError for what is none."""
    return tuple(entry for entry in read_entries(saved.anything("log")) if entry.block <= done)
