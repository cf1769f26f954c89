"""Layers of the Wan 2.1 VAE, under the names that its checkpoints use.

Axes: b batch, c channels, t frames, h and w rows and columns. Feature maps are [b, c, t, h, w].

Every layer takes a `state`: None for a whole sequence, or the dict of one stream, in which each causal layer
keeps what the next block needs. Blocks of any lengths then give what the whole sequence gives. The dict belongs
to the stream, never to the module.
"""
from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = Optional[dict[nn.Module, Tensor]]


class CausalConv3d(nn.Conv3d):
    """A convolution whose frame t sees frames up to t; same size in h and w unless it is strided in time."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int, int], time_stride: int = 1):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(c_in, c_out, kernel, stride=(time_stride, 1, 1),
                         padding=(0, kernel[1] // 2, kernel[2] // 2))
        # Strided in time, it starts at the first real frame and has nothing before it.
        self.past = kernel[0] - 1 if time_stride == 1 else 0

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        if self.past:
            past = None if state is None else state.get(self)
            # The zeros before the first frame are kept like frames, so a block of one frame is no special case.
            x = F.pad(x, (0, 0, 0, 0, self.past, 0)) if past is None else torch.cat([past, x], dim=2)
            if state is not None:
                state[self] = x[:, :, -self.past:].clone()
        return super().forward(x)


class RMSNorm(nn.Module):
    """Scales every position to unit mean square over its channels, then each channel by gamma [c, 1, ...]."""

    def __init__(self, channels: int, axes: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        return x * (x.shape[1] ** 0.5 / length).to(x.dtype) * self.gamma.to(x.dtype)


class ResidualBlock(nn.Module):
    """Two causal 3x3x3 convolutions beside a shortcut."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        # Place 5 is a dropout in the original; the numbers are names in the checkpoint.
        self.residual = nn.Sequential(RMSNorm(c_in, 3), nn.SiLU(), CausalConv3d(c_in, c_out, 3),
                                      RMSNorm(c_out, 3), nn.SiLU(), nn.Identity(), CausalConv3d(c_out, c_out, 3))
        self.shortcut = CausalConv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        return self.shortcut(x) + in_order(self.residual, x, state)


class FrameAttention(nn.Module):
    """One head of attention over the positions of each frame, beside a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        frames = to_frames(x)
        n, c, h, w = frames.shape
        # [n, 3c, h, w] -> three times [n, 1 head, h w, c]
        q, k, v = self.to_qkv(self.norm(frames)).reshape(n, 3, c, h * w).transpose(2, 3).unbind(1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out = self.proj(out.transpose(1, 2).reshape(n, c, h, w))
        return x + from_frames(out, x.shape[2])


class Downsample(nn.Module):
    """Halves h and w; with `time` also the frames after the first one, in pairs."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if time:
            self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2)
        self.time = time

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        x = from_frames(self.resample(to_frames(x)), x.shape[2])
        if self.time and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
        return x


class Upsample(nn.Module):
    """Doubles h and w and halves the channels; with `time` also doubles the frames after the first one."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"),
                                      nn.Conv2d(channels, channels // 2, 3, padding=1))
        if time:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1))
        self.time = time

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        if self.time:
            x = self._double(x, state)
        return from_frames(self.resample(to_frames(x)), x.shape[2])

    def _double(self, x: Tensor, state: State) -> Tensor:
        # The video's first frame stays single, and the convolution of the others does not see it.
        single = 0 if state is not None and self in state else 1
        if state is not None:
            state[self] = x.new_empty(0)
        first, rest = x[:, :, :single], x[:, :, single:]
        if rest.shape[2] == 0:
            return first
        b, c, t, h, w = rest.shape
        pairs = self.time_conv(rest, state).reshape(b, 2, c, t, h, w)
        return torch.cat([first, pairs.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)], dim=2)


def in_order(layers: nn.Sequential, x: Tensor, state: State) -> Tensor:
    """Apply layers one after the other and hand the state to those that take one."""
    for layer in layers:
        x = layer(x, state) if isinstance(layer, STATEFUL) else layer(x)
    return x


def to_frames(x: Tensor) -> Tensor:
    """[b, c, t, h, w] -> [b t, c, h, w]."""
    return x.transpose(1, 2).flatten(0, 1)


def from_frames(x: Tensor, frames: int) -> Tensor:
    """[b t, c, h, w] -> [b, c, t, h, w]."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


STATEFUL = (CausalConv3d, ResidualBlock, FrameAttention, Downsample, Upsample)
