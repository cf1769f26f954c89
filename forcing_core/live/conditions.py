"""What drives LIVE, frame by frame: a camera, poses as plain vectors, or actions.

A track belongs to a whole video and is asked for windows of it: cameras and poses are given relative to the first frame of
the window, so the network never sees how far the camera has come. Axes: F frames, h/w latent cells.
Source: arXiv 2602.03747, public repo Junchao-cs/LIVE @20c82a9.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Sequence

import torch
from torch import Tensor

from ..errors import ForcingError
from .camera import CameraPath, homogeneous, plucker, relative
from .config import LiveConfig
from .lines import entries

# The 25 actions of Minecraft in the order of public repo etched-ai/open-oasis; the order of LIVE's own unpublished weights
# is not known. The two camera numbers lie in -1..1, all others are 0 or 1.
ACTIONS = ("inventory", "ESC", *(f"hotbar.{n}" for n in range(1, 10)), "forward", "back", "left", "right", "cameraX",
           "cameraY", "jump", "sneak", "sprint", "swapHands", "attack", "use", "pickItem", "drop")
SIGNED = ("cameraX", "cameraY")


class Track(Protocol):
    """kind: key of config.CONDITIONS. `window` gives frames first..first+frames-1 as a network wants them, float32
    [F, 6, h, w] for cameras and [F, channels] otherwise, or with a batch axis in front. `length`: frames in all."""

    kind: str
    length: int

    def window(self, first: int, frames: int) -> Tensor: ...


@dataclass(frozen=True)
class CameraTrack:
    """Plücker rays of a path at the cells of a latent of `latent` (rows, columns)."""

    path: CameraPath
    latent: tuple[int, int]
    kind = "camera"

    @property
    def length(self) -> int:
        return self.path.length

    def window(self, first: int, frames: int) -> Tensor:
        poses = relative(self.path.poses[first:first + frames])
        return plucker(self.path.intrinsics[first:first + frames], poses, self.latent).float()


@dataclass(frozen=True)
class PoseTrack:
    """Intrinsics and poses as 16 numbers a frame: the inverse of the window's first pose times each of them, as the public
    code forms them where it does without rays."""

    path: CameraPath
    kind = "pose"

    @property
    def length(self) -> int:
        return self.path.length

    def window(self, first: int, frames: int) -> Tensor:
        poses = homogeneous(self.path.poses[first:first + frames])
        moved = (torch.linalg.inv(poses[:1]) @ poses)[:, :3].flatten(1)
        return torch.cat([self.path.intrinsics[first:first + frames], moved], dim=1).float()


@dataclass(frozen=True)
class ActionTrack:
    """actions: [F, 25], one row a frame; nothing in them is relative. Raises ForcingError for numbers that no action has."""

    actions: Tensor
    kind = "action"

    def __post_init__(self):
        if self.actions.ndim != 2 or self.actions.shape[1] != len(ACTIONS):
            raise ForcingError(f"Actions of the shape {list(self.actions.shape)} are not those that LIVE was trained on. Give "
                               f"{len(ACTIONS)} numbers a frame, in this order: {', '.join(ACTIONS)}.")
        low = torch.tensor([-1.0 if name in SIGNED else 0.0 for name in ACTIONS])
        if not bool(((self.actions >= low) & (self.actions <= 1)).all()):  # NaN is no action either
            raise ForcingError("Actions have numbers outside of the trained ones. Keep cameraX and cameraY between -1 and 1, "
                               "all others between 0 and 1.")

    @property
    def length(self) -> int:
        return self.actions.shape[0]

    def window(self, first: int, frames: int) -> Tensor:
        return self.actions[first:first + frames].float()

    @classmethod
    def parse(cls, text: str, length: int) -> ActionTrack:
        """A track from lines `frame: name name=value ...`; each holds until the next one. Raises ForcingError for actions
        outside the trained set, and for lines out of order or behind the end."""
        rows = torch.zeros(length, len(ACTIONS))
        for frame, words in entries(text, length):
            rows[frame:] = action_row(words)
        return cls(rows)


def action_row(words: Sequence[str]) -> Tensor:
    """One frame [25] of actions `name` or `name=value`. Raises ForcingError for others and for numbers outside of -1..1."""
    row = torch.zeros(1, len(ACTIONS))
    for word in words:
        name, _, value = word.partition("=")
        row[0, _action(name)] = _number(value, word) if value else 1.0
    return ActionTrack(row).actions[0]


def check_actions(actions: Tensor, config: LiveConfig) -> None:
    """Raise ForcingError where the rows [F, 25] hold what this network was not trained on: other actions, or several at
    once."""
    if config.actions is None:
        return
    used = actions != 0
    unknown = [name for name, there in zip(ACTIONS, used.any(0).tolist()) if there and name not in config.actions]
    if unknown:
        raise ForcingError(f"This LIVE was not trained on the action {unknown[0]}. Use {', '.join(config.actions)}.")
    if bool((used.sum(1) > 1).any()):
        frame = int((used.sum(1) > 1).nonzero()[0])
        names = [name for name, there in zip(ACTIONS, used[frame].tolist()) if there]
        raise ForcingError(f"This LIVE was trained on one action at a time, not on {' and '.join(names)} together. Hold one of "
                           "them, then the other.")


def _action(name: str) -> int:
    if name not in ACTIONS:
        raise ForcingError(f"The action '{name}' is none that LIVE was trained on. Use one of {', '.join(ACTIONS)}.")
    return ACTIONS.index(name)


def _number(value: str, word: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ForcingError(f"'{word}' has no number behind its '='. Write it like cameraX=0.5.") from None


def check_kind(track: Track, config: LiveConfig) -> None:
    """Raise ForcingError for a track of another kind than the network's."""
    if track.kind != config.condition:
        raise ForcingError(f"This LIVE checkpoint is driven by a track of kind {config.condition}, not {track.kind}. Connect "
                           f"a track of the kind {config.condition}, or load a checkpoint of another data set.")


def check_track(track: Track, config: LiveConfig, frames: int) -> None:
    """Raise ForcingError where a track does not drive this network for `frames` frames."""
    check_kind(track, config)
    if track.length != frames:
        raise ForcingError(f"The {track.kind} track is {track.length} frames long, the video {frames} (start pictures "
                           f"included). Make the track {frames} frames long.")
    if isinstance(track, ActionTrack):
        check_actions(track.actions, config)
