"""The steerable micro world: one coloured shape on a plain background, moved by a key a frame, 64x64 at 8 fps.

A shape stands on a board of 3x3 places, 16 pixels apart, and a key moves it by one place; at the edge of the board it stays
where it is. So what every frame has to show is known exactly, from the start and the keys, for as long as one plays, and a
walk can be taken back by the opposite keys.

    play = steer.keys(seed=1, n=8, frames=480)           # [8, 480], indices into KEYS
    worlds = steer.draw(seed=2, n=8)
    video = steer.paint(worlds, steer.walk(worlds.start, play))
    steer.obedience(video, play, worlds).all()           # measured from the pixels alone

Axes: B worlds, F frames. Key f is the one that leads to frame f; the first one leads nowhere.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from ..errors import ForcingError
from ..live.conditions import ACTIONS, ActionTrack
from ..noise import mix
from .motion import FRAME
from .names import BACKGROUNDS, COLOURS, SHAPES, rgb
from .observe import frames_of, observe
from .shapes import coverage, half_extents

FPS = 8
STEP, REACH, RADIUS = 16.0, 1, 9.0  # pixels between places, places from the middle to an edge, pixels
HOLD = 3  # frames that a key of a random play is held at most
# Triangles were tried and did not hold: at a step of a token their tips come apart, and within half a minute they are gone.
MOVED = ("circle", "square")
GROUNDS = ("dark", "light")  # on gray a shape is lost sooner, here as in the world of the film models
# key -> (right, down); the opposite of each is what takes its step back
KEYS = {"none": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = (0, 2, 1, 4, 3)
# The names that a track of LIVE has for them: up leads away from whoever plays.
NAMES = {"left": "left", "right": "right", "up": "forward", "down": "back"}


@dataclass(frozen=True)
class Worlds:
    """shape, colour, background: indices into names.py, [B]. start: place on the board, [B, 2] whole numbers, 0 the middle."""

    shape: Tensor
    colour: Tensor
    background: Tensor
    start: Tensor


def draw(seed: int, n: int) -> Worlds:
    """n random worlds, the same on every machine."""
    generator = torch.Generator("cpu").manual_seed(mix(seed, 0x57E))
    counts = (len(MOVED), len(COLOURS), len(GROUNDS), 2 * REACH + 1, 2 * REACH + 1)
    shape, colour, background, x, y = (torch.randint(count, (n,), generator=generator) for count in counts)
    shape = torch.tensor([SHAPES.index(name) for name in MOVED])[shape]
    background = torch.tensor([list(BACKGROUNDS).index(name) for name in GROUNDS])[background]
    return Worlds(shape, colour, background, torch.stack([x, y], 1) - REACH)


def keys(seed: int, n: int, frames: int) -> Tensor:
    """[n, frames] random keys, each held for up to HOLD frames."""
    generator = torch.Generator("cpu").manual_seed(mix(seed, 0xE15))
    pressed = torch.randint(len(KEYS), (n, frames), generator=generator)
    lengths = torch.randint(1, HOLD + 1, (n, frames), generator=generator)
    return torch.stack([row.repeat_interleave(length)[:frames] for row, length in zip(pressed, lengths)])


def _moves() -> Tensor:
    return torch.tensor(list(KEYS.values()))


def walk(start: Tensor, play: Tensor) -> Tensor:
    """Places [B, F, 2] of a play [B, F] that begins at `start` [B, 2]."""
    places, moves = [start], _moves()[play]
    for frame in range(1, play.shape[1]):
        places.append((places[-1] + moves[:, frame]).clamp(-REACH, REACH))
    return torch.stack(places, 1)


def taken(places: Tensor, play: Tensor) -> Tensor:
    """The play [B, F] with `none` for keys that the edge of the board held up."""
    stood = (places[:, 1:] == places[:, :-1]).all(-1)
    return torch.cat([torch.zeros_like(play[:, :1]), play[:, 1:].masked_fill(stood, 0)], 1)


def backwards(play: Tensor) -> Tensor:
    """The play [B, F] that leads through the same places from the last to the first, for one in which every key moved.

    Frame k of it is frame F-1-k of the other, reached by the opposite of the key that led away from there."""
    back = torch.tensor(OPPOSITE)[play[:, 1:].flip(1)]
    return torch.cat([torch.zeros_like(play[:, :1]), back], 1)


def paint(worlds: Worlds, places: Tensor, size: int = int(FRAME)) -> Tensor:
    """Video [B, 3, F, size, size] in [-1, 1] of shapes at these places [B, F, 2]."""
    scale = size / FRAME
    half = half_extents(worlds.shape, torch.full((len(worlds.shape),), RADIUS)) * scale
    centre = (FRAME / 2 + STEP * places.double()) * scale
    covered = coverage(worlds.shape, half, centre, size).unsqueeze(1)
    colour, ground = ((2 * rgb(table) - 1)[index][..., None, None, None]
                      for table, index in ((COLOURS, worlds.colour), (BACKGROUNDS, worlds.background)))
    return torch.lerp(ground, colour, covered)


def rows(play: Tensor) -> Tensor:
    """[..., F] keys -> float32 [..., F, 25] actions as LIVE has them."""
    table = torch.zeros(len(KEYS), len(ACTIONS))
    for row, name in enumerate(KEYS):
        if name in NAMES:
            table[row, ACTIONS.index(NAMES[name])] = 1.0
    return table[play]


def track(pressed: Sequence[str]) -> ActionTrack:
    """The track of keys by name, one a frame. Raises ForcingError for other names."""
    if unknown := set(pressed) - KEYS.keys():
        raise ForcingError(f"{', '.join(sorted(unknown))} cannot be pressed here. Use {', '.join(KEYS)}.")
    return ActionTrack(rows(torch.tensor([list(KEYS).index(name) for name in pressed])))


def places_seen(video: Tensor, worlds: Worlds) -> Tensor:
    """Places [B, F, 2] read from the pixels of a video [B, 3, F, 64, 64], not rounded, NaN where nothing is seen.

    A triangle's centre of area is not where it stands; the same shape, painted, tells by how much."""
    middle = paint(worlds, torch.zeros(len(worlds.shape), 1, 2, dtype=torch.long))
    at_rest = observe(frames_of(middle)).centre[:, :, 0]
    return (observe(frames_of(video)).centre[:, :, 0] - at_rest) / STEP


def obedience(video: Tensor, play: Tensor, worlds: Worlds) -> Tensor:
    """[B, F - 1] bool: the shape did in frame 1.. what its key asks for, from where the frame before shows it.

    The step between two frames counts as the one of the five that it is nearest to, if it is nearer than half a step."""
    seen = places_seen(video, worlds)
    before, step = seen[:, :-1], seen[:, 1:] - seen[:, :-1]
    asked = (before.round() + _moves()[play[:, 1:]]).clamp(-REACH, REACH) - before.round().clamp(-REACH, REACH)
    return ((step - asked).abs() < 0.5).all(-1)  # NaN is near nothing


def kept(video: Tensor, worlds: Worlds) -> Tensor:
    """[B, F] bool: colour and shape are still those of the world."""
    seen = observe(frames_of(video))
    same = ((seen.colour[..., 0], worlds.colour), (seen.shape[..., 0], worlds.shape))
    return torch.stack([found == wanted[:, None] for found, wanted in same]).all(0)
