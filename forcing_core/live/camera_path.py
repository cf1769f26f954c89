"""Camera paths for users: keyframes, presets by name, and a picture of a path.

The world is that of the first frame: x to the right, y down, z ahead. Angles are interpolated, not rotations, so that a
camera may turn all the way round.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ForcingError
from ..media import INK, PAPER, font, pillow
from .camera import FIELD_OF_VIEW, CameraPath, lens
from .lines import entries

# between two keyframes: part of the time -> part of the way
EASINGS: dict[str, Callable[[float], float]] = {"smooth": lambda t: t * t * (3 - 2 * t), "linear": lambda t: t}


@dataclass(frozen=True)
class Keyframe:
    """Where the camera is at a frame: x, y, z in scene units; yaw (to the right), pitch (up), roll (clockwise) in degrees."""

    frame: int
    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0

    @property
    def numbers(self) -> tuple[float, ...]:
        return self.x, self.y, self.z, self.yaw, self.pitch, self.roll


def _line(**at_one: float) -> Callable[[int, float], list[Keyframe]]:
    def keys(last: int, amount: float) -> list[Keyframe]:
        return [Keyframe(0), Keyframe(last, **{name: amount * value for name, value in at_one.items()})]
    return keys


def _orbit(side: float) -> Callable[[int, float], list[Keyframe]]:
    """Round a point one unit ahead, which stays in the middle of the picture."""
    def keys(last: int, amount: float) -> list[Keyframe]:
        turns = [45.0 * amount * n / last for n in range(last + 1)]
        return [Keyframe(n, x=side * math.sin(math.radians(a)), z=1 - math.cos(math.radians(a)), yaw=-side * a)
                for n, a in enumerate(turns)]
    return keys


# name -> (last frame, amount) -> keyframes; an amount of 1 is one scene unit or 45 degrees
PRESETS: dict[str, Callable[[int, float], list[Keyframe]]] = {
    "forward": _line(z=1.0), "back": _line(z=-1.0), "left": _line(x=-1.0), "right": _line(x=1.0), "up": _line(y=-1.0),
    "down": _line(y=1.0), "turn left": _line(yaw=-45.0), "turn right": _line(yaw=45.0), "look up": _line(pitch=45.0),
    "look down": _line(pitch=-45.0), "roll": _line(roll=45.0), "orbit left": _orbit(-1.0), "orbit right": _orbit(1.0),
    "still": _line(),
}


def preset_path(name: str, frames: int, amount: float = 1.0, easing: str = "smooth",
                field_of_view: float = FIELD_OF_VIEW) -> CameraPath:
    """A path of `frames` frames by name. Raises ForcingError for an unknown name."""
    if name not in PRESETS:
        raise ForcingError(f"There is no camera move {name!r}. Use one of {', '.join(PRESETS)}.")
    if frames < 1:
        raise ForcingError(f"A camera path of {frames} frames cannot be made. Use at least 1.")
    keys = PRESETS[name](frames - 1, amount) if frames > 1 else [Keyframe(0)]
    return keyed_path(keys, frames, "linear" if len(keys) == frames else easing, field_of_view)


def parse_keyframes(text: str, frames: int) -> list[Keyframe]:
    """Keyframes from lines `frame: x y z [yaw [pitch [roll]]]`. Raises ForcingError for lines that are none."""
    keys = []
    for frame, words in entries(text, frames):
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            numbers = []
        if not 3 <= len(numbers) <= 6:
            raise ForcingError(f"Keyframe {frame} is '{' '.join(words)}'. Give three to six numbers: x y z yaw pitch roll.")
        keys.append(Keyframe(frame, *numbers))
    return keys


def keyed_path(keys: Sequence[Keyframe], frames: int, easing: str = "smooth",
               field_of_view: float = FIELD_OF_VIEW) -> CameraPath:
    """A path through keyframes; before the first and behind the last one the camera stands still. Raises ForcingError for
    no keyframes, an unknown easing, and steps that are too large."""
    if not keys:
        raise ForcingError("A camera path needs a keyframe. Write one such as '0: 0 0 0 0 0 0'.")
    if easing not in EASINGS:
        raise ForcingError(f"Easing {easing!r} is not known. Use one of {', '.join(EASINGS)}.")
    numbers = torch.tensor([_between(keys, frame, EASINGS[easing]) for frame in range(frames)], dtype=torch.float64)
    facing = _facing(*torch.deg2rad(numbers[:, 3:]).unbind(1))
    return CameraPath(lens(frames, field_of_view), _poses(facing, numbers[:, :3]))


def _between(keys: Sequence[Keyframe], frame: int, ease: Callable[[float], float]) -> tuple[float, ...]:
    after = next((n for n, key in enumerate(keys) if key.frame >= frame), len(keys))
    if after == 0 or after == len(keys):
        return keys[min(after, len(keys) - 1)].numbers
    one, other = keys[after - 1], keys[after]
    part = ease((frame - one.frame) / (other.frame - one.frame))
    return tuple(a + part * (b - a) for a, b in zip(one.numbers, other.numbers))


def _facing(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Camera-to-world rotations [F, 3, 3]: roll first, then pitch, then yaw."""
    one, nil = torch.ones_like(yaw), torch.zeros_like(yaw)

    def matrix(*rows: Tensor) -> Tensor:
        return torch.stack(rows, dim=1).unflatten(1, (3, 3))

    about_y = matrix(yaw.cos(), nil, yaw.sin(), nil, one, nil, -yaw.sin(), nil, yaw.cos())
    about_x = matrix(one, nil, nil, nil, pitch.cos(), -pitch.sin(), nil, pitch.sin(), pitch.cos())
    about_z = matrix(roll.cos(), -roll.sin(), nil, roll.sin(), roll.cos(), nil, nil, nil, one)
    return about_y @ about_x @ about_z


def _poses(facing: Tensor, centres: Tensor) -> Tensor:
    """World-to-camera poses [F, 3, 4] of cameras at `centres` [F, 3]."""
    r = facing.mT
    return torch.cat([r, -(r @ centres.unsqueeze(2))], dim=2)


def draw(path: CameraPath, width: int = 768, height: int = 384) -> Tensor:
    """A picture of the path from above and from the side, float32 [height, width, 3] in 0..1: a line through the places of the
    camera, a tick every few frames in the direction it looks, a ring where it starts."""
    pictures, drawing, _ = pillow()
    image = pictures.new("RGB", (width, height), PAPER)
    pen = drawing.Draw(image)
    ahead = path.poses[:, 2, :3]  # rows of R are the camera's axes in the world
    half = width // 2
    for left, title, across, along in ((0, "from above (ahead is up)", 0, 2), (half, "from the side (ahead is right)", 2, 1)):
        sign = -1.0 if along == 2 else 1.0
        flat = torch.stack([path.centres[:, across], sign * path.centres[:, along]], dim=1)
        look = torch.stack([ahead[:, across], sign * ahead[:, along]], dim=1)
        _view(pen, flat, look, (left, half, height))
        pen.text((left + 10, 8), title, fill=INK, font=font(13))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3).float() / 255


def _view(pen, places: Tensor, look: Tensor, box: tuple[int, int, int]) -> None:
    left, width, height = box
    middle = (places.amin(0) + places.amax(0)) / 2
    scale = 0.35 * min(width, height) / max(0.5, float((places - middle).abs().max()))
    to = places.new_tensor([left + width / 2, height / 2])
    points = ((places - middle) * scale + to).tolist()
    pen.line([tuple(p) for p in points] * (2 if len(points) == 1 else 1), fill=(84, 134, 188), width=3)
    for n in range(0, len(points), max(1, len(points) // 12)):
        end = [p + 22 * d for p, d in zip(points[n], look[n].tolist())]
        pen.line([tuple(points[n]), tuple(end)], fill=(217, 95, 46), width=2)
    x, y = points[0]
    pen.ellipse([x - 5, y - 5, x + 5, y + 5], outline=INK, width=2)
