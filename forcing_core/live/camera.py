"""Cameras: paths through keyframes, poses relative to a frame, and the rays of pixels as Plücker coordinates.

A pose is [R | t] from world to camera, [3, 4], axes as of OpenCV: x to the right, y down, z into the picture. Intrinsics are
(fx, fy, cx, cy) in parts of the picture's width and height. A ray is (direction of length 1, origin x direction).

RealEstate10K's files give the intrinsics of the whole 16:9 video, while LIVE's pictures are square crops of it, and the
public loader passes them on unchanged: so the default path does the same (inferred from the loader).
Source: arXiv 2602.03747, public repo Junchao-cs/LIVE @20c82a9 (tvideo/utils.py, its data loader).
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ForcingError

FIELD_OF_VIEW = 60.0  # degrees, from top to bottom; common in RealEstate10K
VIDEO_ASPECT = 16 / 9
# A step between two frames beyond these is none that an indoor walk of the data set has (chosen by us, not published).
MOST_STEP, MOST_TURN = 0.5, 20.0  # scene units, degrees
LENGTHS = {16: 4, 18: 6, 19: 7}  # numbers a line of a pose file -> where its [R | t] starts


@dataclass(frozen=True)
class CameraPath:
    """intrinsics: [F, 4], poses: [F, 3, 4], both float64. Raises ForcingError for other shapes, poses that turn no camera, and
    steps that are too large."""

    intrinsics: Tensor
    poses: Tensor

    def __post_init__(self):
        if self.poses.ndim != 3 or self.poses.shape[1:] != (3, 4) or self.intrinsics.shape != (len(self.poses), 4):
            raise ForcingError(f"Poses of the shape {list(self.poses.shape)} and intrinsics of {list(self.intrinsics.shape)} "
                               "are no camera path. Give a [3, 4] pose and four intrinsics for every frame.")
        if not len(self.poses) or not bool(torch.isfinite(self.poses).all() and torch.isfinite(self.intrinsics).all()):
            raise ForcingError("The camera path is empty or holds NaN. Give a finite pose for every frame.")
        if bool((self.intrinsics[:, :2] <= 0).any()):
            raise ForcingError("The camera path has a focal length of 0 or less. Give fx and fy in parts of the picture, such "
                               "as 0.5 and 0.87.")
        _check_rotations(self.poses[:, :, :3])
        _check_steps(self.poses)

    @property
    def length(self) -> int:
        return len(self.poses)

    @property
    def centres(self) -> Tensor:
        """Places of the camera in the world, [F, 3]."""
        return -torch.einsum("fji,fj->fi", self.poses[:, :, :3], self.poses[:, :, 3])

    def vectors(self) -> Tensor:
        """[F, 16] as the public code wants them: intrinsics, then the rows of the pose."""
        return torch.cat([self.intrinsics, self.poses.flatten(1)], dim=1)

    @classmethod
    def parse(cls, text: str) -> CameraPath:
        """From the lines of a pose file: 16 numbers a frame, or 18 or 19 as RealEstate10K has them (two zeros behind the
        intrinsics, a time in front). A first line without numbers, its address, is passed over."""
        rows = [_numbers(line) for line in text.splitlines() if line.strip()]
        rows = rows[1:] if rows and rows[0] is None else rows
        if not rows or any(row is None or len(row) not in LENGTHS or len(row) != len(rows[0]) for row in rows):
            raise ForcingError("The text holds no camera poses. Give 16, 18 or 19 numbers a line, the same count in each: fx "
                               "fy cx cy and the three rows of [R | t].")
        start = LENGTHS[len(rows[0])]
        table = torch.tensor(rows, dtype=torch.float64)
        first = 1 if len(rows[0]) == 19 else 0
        return cls(table[:, first:first + 4], table[:, start:].unflatten(1, (3, 4)))


def _numbers(line: str) -> list[float] | None:
    try:
        return [float(word) for word in line.replace(",", " ").split()]
    except ValueError:
        return None


def _check_rotations(r: Tensor) -> None:
    off = (r @ r.mT - torch.eye(3, dtype=r.dtype)).abs().amax(dim=(1, 2))
    wrong = (off > 1e-3) | (torch.linalg.det(r) < 0)
    if bool(wrong.any()):
        raise ForcingError(f"The pose of frame {int(wrong.nonzero()[0])} has no rotation in it: its first three columns are "
                           "not orthonormal. Give [R | t] from world to camera, row by row, without a scale.")


def _check_steps(poses: Tensor) -> None:
    path = homogeneous(poses)
    steps = path[1:] @ torch.linalg.inv(path[:-1])
    lengths = steps[:, :3, 3].norm(dim=1)
    cosine = ((steps[:, :3, :3].diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1)
    turns = torch.rad2deg(torch.arccos(cosine))
    if bool((lengths > MOST_STEP).any()):
        far = float(lengths.max())
        raise ForcingError(f"The camera moves {far:.3g} units between two frames; LIVE knows steps of up to {MOST_STEP:g}. "
                           f"Scale the path by {MOST_STEP / far:.2g} or less, or give it more frames.")
    if bool((turns > MOST_TURN).any()):
        raise ForcingError(f"The camera turns by {float(turns.max()):.3g} degrees between two frames; LIVE knows turns of up "
                           f"to {MOST_TURN:g}. Give the turn more frames.")


def homogeneous(poses: Tensor) -> Tensor:
    """[F, 3, 4] -> [F, 4, 4]."""
    last = poses.new_tensor([0, 0, 0, 1]).expand(len(poses), 1, 4)
    return torch.cat([poses, last], dim=1)


def relative(poses: Tensor) -> Tensor:
    """Poses [F, 3, 4] in the world of the first one, which becomes the identity."""
    r, t = poses[:, :, :3], poses[:, :, 3]
    turned = r @ r[0].mT
    return torch.cat([turned, (t - turned @ t[0]).unsqueeze(2)], dim=2)


def plucker(intrinsics: Tensor, poses: Tensor, size: tuple[int, int]) -> Tensor:
    """Rays through the middles of `size` (rows, columns) cells, [F, 6, rows, columns]: direction, then origin x direction."""
    rows, columns = size
    fx, fy, cx, cy = intrinsics.unsqueeze(2).unbind(1)
    x = ((torch.arange(columns, dtype=poses.dtype) + 0.5) / columns - cx) / fx
    y = ((torch.arange(rows, dtype=poses.dtype) + 0.5) / rows - cy) / fy
    y, x = y.unsqueeze(2).expand(-1, rows, columns), x.unsqueeze(1).expand(-1, rows, columns)
    seen = torch.stack([x, y, torch.ones_like(x)], dim=1)
    seen = torch.einsum("fji,fjhw->fihw", poses[:, :, :3], seen)
    direction = seen / seen.norm(dim=1, keepdim=True)
    origin = -torch.einsum("fji,fj->fi", poses[:, :, :3], poses[:, :, 3])
    moment = torch.linalg.cross(origin[:, :, None, None].expand_as(direction), direction, dim=1)
    return torch.cat([direction, moment], dim=1)


def lens(frames: int, field_of_view: float = FIELD_OF_VIEW, aspect: float = VIDEO_ASPECT) -> Tensor:
    """Intrinsics [frames, 4] of a camera that sees `field_of_view` degrees from top to bottom."""
    if not 1 <= field_of_view <= 170:
        raise ForcingError(f"A field of view of {field_of_view:g} degrees makes no camera. Use 1 to 170, 60 as usual.")
    fy = 0.5 / math.tan(math.radians(field_of_view) / 2)
    return torch.tensor([fy / aspect, fy, 0.5, 0.5], dtype=torch.float64).repeat(frames, 1)
