"""LIVE behind the contract of `forcing_core.denoiser`: the block rollout runs it as it runs Wan.

What is remembered are clean latents, not keys: before every block the newest ones get light noise and go through the network
anew, in their places of the window and under conditions relative to its first frame. Their keys and values then serve all
steps of the block, because no frame sees a later one. So the passes are one over the context and one a step, where the public
code sends the whole window through the network at every step, with the same numbers.

Axes: [B, C, F, H, W]. Source: arXiv 2602.03747, public repo Junchao-cs/LIVE @20c82a9.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence

import torch
from torch import Tensor

from ..attention import backend
from ..errors import ForcingError
from ..noise import Noise
from ..plan import Block, Phase
from ..saved import LARGEST, Saved, Tree
from ..schedule import Level, renoise, x0_from_velocity
from .attention import Attend, Context
from .conditions import Track
from .model import LiveModel


@dataclass
class LiveDenoiser:
    """net: with weights in `dtype`. track: of the whole video. noise: the rollout's; its `renoise` at step 0 is asked for the
    noise of a context, as a block of that many frames whose index is the number of the frame behind it. context_level: noise
    that a context gets. window: frames of a sequence, the block included. forwards, encodings: network calls for steps and
    for contexts. Raises ForcingError for a window that the network does not have."""

    net: LiveModel
    track: Track
    noise: Noise
    context_level: Level
    window: int = 32
    dtype: torch.dtype = torch.float32
    attend: Attend = field(default_factory=backend)
    forwards: int = 0
    encodings: int = 0
    _latents: Tensor | None = field(default=None, init=False)
    _end: int = field(default=0, init=False)
    _context: Context | None = field(default=None, init=False)
    _own: Tensor | None = field(default=None, init=False)  # the condition of the block itself

    def __post_init__(self):
        if not 2 <= self.window <= self.net.config.window:
            raise ForcingError(f"A window of {self.window} frames cannot be used: LIVE was trained on "
                               f"{self.net.config.window}. Use 2 to {self.net.config.window}.")

    @torch.no_grad()
    def __call__(self, x: Tensor, levels: Sequence[Level], first: int, phase: Phase) -> Tensor | None:
        if phase == "recache":
            raise ForcingError(_NO_TEXT)
        self._check_place(first)
        if phase == "clean":
            self._add(x)
            return None
        if self._context is None:
            self._context, self._own = self._encoded(x, first)
        self.forwards += 1
        velocity = self.net(x.to(self.dtype), _timesteps(x, levels), self._own, self._context, self.attend)
        return x0_from_velocity(x, velocity.to(x.dtype), [level.sigma for level in levels])

    def replace_text(self, segment: int) -> None:
        raise ForcingError(_NO_TEXT)

    def blend_text(self, a: int, b: int, weight: float) -> None:
        raise ForcingError(_NO_TEXT)

    def forget(self) -> None:
        self.flush(0)

    def flush(self, last: int) -> None:
        """Keep the newest `last` frames; the first of them is where the camera then counts from."""
        self._latents = self._latents[:, :, -last:] if last and self._latents is not None else None
        self._context = None

    def jump(self, first: int, distance: int) -> None:
        raise ForcingError("LIVE's frames have no places beyond their window, so none can jump. Use the transition flush or "
                           "cut, or move the camera.")

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered: clean latents, and keys and values of the newest context."""
        context = self._context or Context()
        held = [*context.keys, *context.values, *([] if self._latents is None else [self._latents])]
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def held(self) -> tuple[int, ...]:
        """Numbers of the frames that are remembered."""
        return tuple(range(self._end - (0 if self._latents is None else self._latents.shape[2]), self._end))

    def state(self) -> Tree:
        """Clean latents and how many frames there were. What the context becomes follows from them."""
        return {"end": self._end} if self._latents is None else {"end": self._end, "latents": self._latents}

    def load(self, saved: Saved) -> None:
        """Go on behind the saved frames. Raises ForcingError for those of another network."""
        config = self.net.config
        self._end = saved.integer("end", 0, LARGEST)
        if "latents" in saved:
            weight = self.net.x_embedder.proj.weight
            self._latents = saved.tensor("latents", (None, config.channels, None, *config.latent)).to(weight.device)
        self._context = None

    def _check_place(self, first: int) -> None:
        if first != self._end:
            raise ForcingError(f"Frame {first} asks for the frames before it as context, but only {self._end} were given. Give "
                               f"{first} start frames, or begin at frame {self._end}.")

    def _add(self, x: Tensor) -> None:
        joined = x if self._latents is None else torch.cat([self._latents, x], dim=2)
        self._latents, self._context = joined[:, :, -(self.window - 1):], None
        self._end += x.shape[2]

    def _encoded(self, x: Tensor, first: int) -> tuple[Context, Tensor]:
        """The context of a block - as many of the newest frames as the window holds beside it - and the block's condition."""
        held = 0 if self._latents is None else self._latents.shape[2]
        frames = min(held, self.window - x.shape[2])
        drive = self.track.window(first - frames, frames + x.shape[2]).to(x.device, self.dtype)
        axes = 4 if self.net.config.condition == "camera" else 2
        condition = drive if drive.ndim > axes else drive.expand(x.shape[0], *drive.shape)
        if frames == 0:
            return Context(), condition
        drawn = self.noise.renoise(Block(first, first - frames, frames), 0)
        latents = renoise(self._latents[:, :, -frames:], drawn.to(x), self.context_level.sigma)
        timesteps = _timesteps(latents, (self.context_level,) * frames)
        self.encodings += 1
        context = self.net.remember(latents.to(self.dtype), timesteps, condition[:, :frames], self.attend)
        return context, condition[:, frames:]


_NO_TEXT = "LIVE is driven by a camera or by actions and knows no prompts. Use one scene without prompt switches."


def _timesteps(x: Tensor, levels: Sequence[Level]) -> Tensor:
    return torch.tensor([level.timestep for level in levels], device=x.device).expand(x.shape[0], -1)
