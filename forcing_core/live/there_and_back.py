"""Drift without a reference: drive a world there and back, and see how much of its beginning has changed.

What was generated, read backwards, is given to the network with the conditions that undo the way. A world without drift ends
in the pictures it began with; no true video is needed, and no judge. Axes: [B, C, F, H, W].
Source: arXiv 2602.03747 (LIVE), whose training objective this measures.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ForcingError
from ..noise import Noise
from .conditions import Track
from .model import LiveModel
from .rollout import live_rollout


@dataclass(frozen=True)
class Return:
    """there: start frames and those made of them. back: the way back in the order of time, its last frames being the start
    again. Both [B, C, F, H, W]. error: root mean square difference of the start frames, a number for each of them, the frame
    that was first and so comes back last in front."""

    there: Tensor
    back: Tensor
    error: tuple[float, ...]


def there_and_back(net: LiveModel, there: Track, back: Track, given: Tensor, noise: Noise, **settings: Any) -> Return:
    """Roll out behind `given` to the end of the track `there`, and along `back` to the beginning again.

    back: as long as there, the conditions of its frames from the last to the first. The way back is given the newest frames of
    the way there, one less than a window. settings: of `live_rollout`. Raises ForcingError for tracks of different length, and
    for those that end before the start frames are out of sight.
    """
    frames, start = there.length - given.shape[2], given.shape[2]
    held = min((settings.get("window") or net.config.window) - 1, there.length)
    if back.length != there.length:
        raise ForcingError(f"The way back has {back.length} frames, the way there {there.length}. Turn the same track around.")
    if frames < held:
        raise ForcingError(f"After {frames} frames some start pictures are still in the window of {held + 1}, and nothing has "
                           f"to be recovered. Make the track at least {held + start} frames long.")
    went = torch.cat([given, *(made for _, made in live_rollout(net, there, given, frames, noise, **settings))], dim=2)
    turned = went.flip(2)[:, :, :held]
    made = live_rollout(net, back, turned, there.length - held, noise, **settings)
    came = torch.cat([turned, *(x0 for _, x0 in made)], dim=2)
    difference = came[:, :, -start:].flip(2).float() - given.float()
    return Return(went, came, tuple(difference.square().mean((0, 1, 3, 4)).sqrt().tolist()))
