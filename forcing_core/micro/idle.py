"""An idle face: it breathes, sways and looks around for ever, and words say how it behaves.

    source = Idle(code, seed=1)                    # of driving latents, a `conditioning.Directed`
    reader = source.begin()                        # of one run
    latents = reader.of(0, 3, prompt("looks left"))    # [1, 16, 3, 8, 8]

Words are numbers in the first row of a conditioning [1, 1, 4096] that the network, which has no prompt, does not see. So
whatever changes a prompt - a new one at a block, a track, a soft transition - changes the motion. A mood is a list of
weights of motions that are given in closed form, and takes over within a second; nothing of the video is held. The
drawn face has no eyelids (`face.PARTS`), so it does not blink.

Axes: T frames of video, F latent frames; latent frame f > 0 is frames 4 f - 3 .. 4 f.
"""
from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ForcingError
from ..plan import REFERENCE
from ..streaming.ear import Ear
from ..streaming.endless import ENDLESS
from . import face
from .bundle import TEXT_DIM
from .code import GROUP, LinearCode

EASE = 16  # frames in which a mood takes over
MOST = 256  # changes of mood that are remembered, for passes that go back
SWAY, BREATH = 0.3, 64  # share of a lively head's way that an idle one goes; frames of a breath
REACH = torch.tensor([0.36, 0.2, 0.14, 1.0])  # most of yaw, pitch, roll and mouth, as in training
MOTIONS = ("yaw", "pitch", "roll", "sway", "speech", "nod", "shake")
# word -> weights of MOTIONS that it sets; left and right as the viewer sees it
WORDS: dict[str, dict[str, float]] = {
    "calm": {"sway": 1.0}, "still": {"sway": 0.0}, "lively": {"sway": 3.0},
    "left": {"yaw": -0.2}, "right": {"yaw": 0.2}, "up": {"pitch": -0.11}, "down": {"pitch": 0.11}, "tilts": {"roll": 0.11},
    "speaks": {"speech": 1.0}, "nods": {"nod": 0.12}, "shakes": {"shake": 0.16}}
FILLING = {"a", "the", "face", "head", "person", "is", "looks", "and", "its", "to"}


def mood(text: str) -> Tensor:
    """Weights of MOTIONS [7] of a text; calm where it says nothing. Raises ForcingError, with the words, for others."""
    weights = {"sway": 1.0}
    for word in text.lower().replace(",", " ").replace(".", " ").split():
        if word not in WORDS and word not in FILLING:
            raise ForcingError(f"The idle portrait does not know the word {word!r}. Use some of {', '.join(WORDS)}, for "
                               "example 'looks left and nods'.")
        weights |= WORDS.get(word, {})
    return torch.tensor([weights.get(name, 0.0) for name in MOTIONS])


def embedded(weights: Tensor) -> Tensor:
    """Conditioning [B, 1, 4096] that holds moods [B, 7]."""
    return pad(weights, (0, TEXT_DIM - len(MOTIONS)))[:, None]


def prompt(text: str) -> Tensor:
    """Conditioning [1, 1, 4096] that holds the mood of a text."""
    return embedded(mood(text)[None])


def motions(seed: int, start: int, frames: int) -> Tensor:
    """[7, 4, frames]: what one unit of each of MOTIONS adds to yaw, pitch, roll and mouth from frame `start` on."""
    time = torch.arange(start, start + frames, dtype=torch.float64)
    lively = face.track(seed, 1, frames, start=start)[0]
    made = torch.zeros(len(MOTIONS), 4, frames)
    made[0, 0], made[1, 1], made[2, 2] = 1, 1, 1
    made[3, :3] = SWAY * lively[:3]
    made[3, 1] += 0.02 * torch.sin(2 * math.pi * time / BREATH)
    made[4, 3] = lively[3]
    made[5, 1], made[6, 0] = torch.sin(2 * math.pi * time / 24), torch.sin(2 * math.pi * time / 28)
    return made


@dataclass
class Moods:
    """Which mood ruled when. It begins at rest, as in a reference picture."""

    _changes: deque = field(default_factory=lambda: deque([(0, *torch.zeros(2, len(MOTIONS)))], MOST))

    def change(self, frame: int, weights: Tensor) -> None:
        """From this frame on, which lies behind all other changes, the mood goes over to `weights` [7]."""
        if not torch.equal(weights, self._changes[-1][2]):
            self._changes.append((frame, self.of(frame, 1)[:, 0], weights))

    def of(self, start: int, frames: int) -> Tensor:
        """Weights [7, frames] from frame `start` on."""
        time = torch.arange(start, start + frames)
        first, *rest = self._changes
        made = self._over(first, time)
        for change in rest:
            made = torch.where(time >= change[0], self._over(change, time), made)
        return made

    @staticmethod
    def _over(change: tuple[int, Tensor, Tensor], time: Tensor) -> Tensor:
        share = ((time - change[0]) / EASE).clamp(0, 1)
        return torch.lerp(change[1][:, None], change[2][:, None], share * share * (3 - 2 * share))


@dataclass
class IdleReader:
    """Driving latents of one run. voice(start, frames): opening of the mouth [frames] that is added, or None."""

    code: LinearCode
    seed: int
    voice: Callable[[int, int], Tensor] | None = None
    moods: Moods = field(default_factory=Moods)
    _newest: int = field(init=False, default=-1)

    def of(self, first: int, count: int, prompt: Tensor) -> Tensor:
        """[1, 16, count, 8, 8] of latent frames first .. under a prompt [1, n, 4096]. What a pass goes back to is as it was;
        a reference is at rest."""
        if first >= REFERENCE:
            return self._encoded(torch.zeros(1, 4, 1)).expand(-1, -1, count, -1, -1)
        if first > self._newest:
            self._newest = first
            self.moods.change(max(0, GROUP * first - 3), prompt[0, 0, :len(MOTIONS)].float().cpu())
        before = GROUP * first - GROUP if first else 0  # the frame before them, for the code begins with one
        drive = self.drive(before, GROUP * (first + count) - 3 - before)
        return self._encoded(drive[None])[:, :, -count:]

    def drive(self, start: int, frames: int) -> Tensor:
        """[4, frames]: yaw, pitch, roll and mouth."""
        drive = torch.einsum("mt,mdt->dt", self.moods.of(start, frames), motions(self.seed, start, frames))
        if self.voice is not None:
            drive[3] = torch.maximum(drive[3], self.voice(start, frames))
        return drive.clamp(torch.cat([-REACH[:3], REACH.new_zeros(1)])[:, None], REACH[:, None])

    def _encoded(self, drive: Tensor) -> Tensor:
        return self.code.encode(face.driver(drive))


@dataclass
class Idle:
    """A source of driving latents without an end. seed: how the head sways. listens: whether a voice may come while it runs,
    for which whoever runs it sets `ear`."""

    code: LinearCode
    seed: int
    listens: bool = False
    ear: Ear | None = None
    frames: int = ENDLESS

    def begin(self) -> IdleReader:
        return IdleReader(self.code, self.seed, None if self.ear is None else self._voice)

    def _voice(self, start: int, frames: int) -> Tensor:
        return torch.tensor(self.ear.opening(start, frames))
