"""LIVE's autoencoder: one picture at a time, 16x16 pixels a latent cell, 16 channels, a Gaussian posterior.

The architecture is latent diffusion's KL autoencoder; names of weights are the public ones (kl16 of MAR, arXiv 2406.11838,
which LIVE uses). Axes: N pictures, H and W pixels, h and w latent cells.
Source: public repo Junchao-cs/LIVE @20c82a9, arXiv 2112.10752.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ForcingError
from .config import AutoencoderConfig

AT_ONCE = 8  # pictures that go through the network together
LOG_VARIANCE = (-30.0, 20.0)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    """Two normed 3x3 convolutions beside the identity, or beside a 1x1 convolution where the width changes."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = _norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class CellAttention(nn.Module):
    """Attention of one head among the cells of a picture."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + self.proj_out(y.unflatten(2, x.shape[2:]))


class Halve(nn.Module):
    """Half the size; the missing edge is at the right and at the bottom."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one size; `resample` names the module that leads to the next one, "" for none."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attention: bool, resample: str):
        super().__init__()
        self.block = nn.ModuleList(Residual(c_in if n == 0 else c_out, c_out) for n in range(blocks))
        self.attn = nn.ModuleList(CellAttention(c_out) for _ in range(blocks if attention else 0))
        self.resample = resample
        if resample:
            setattr(self, resample, {"downsample": Halve, "upsample": Double}[resample](c_out))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            x = self.attn[index](x) if len(self.attn) else x
        return getattr(self, self.resample)(x) if self.resample else x


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1 = Residual(channels, channels), CellAttention(channels)
        self.block_2 = Residual(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[N, 3, H, W] -> [N, 2 * latent channels, h, w]. The smallest level has attention."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.channels * m for m in (1, *config.multiples)]
        last = len(config.multiples) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(a, b, config.blocks, attention=i == last, resample="" if i == last else "downsample")
            for i, (a, b) in enumerate(zip(widths, widths[1:])))
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[N, latent channels, h, w] -> [N, 3, H, W]. `up` is in the order of the encoder; the last one comes first."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.channels * m for m in (*config.multiples, config.multiples[-1])]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(b, a, config.blocks + 1, attention=False, resample="upsample" if i else "")
            for i, (a, b) in enumerate(zip(widths, widths[1:])))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Pictures in -1..1 and the latents that the network works on, scaled."""

    def __init__(self, config: AutoencoderConfig | None = None):
        super().__init__()
        self.config = config = config or AutoencoderConfig()
        channels = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @torch.no_grad()
    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """[N, 3, H, W] -> [N, C, h, w]: the mean of the posterior, or with noise [N, C, h, w] a draw from it, as the public
        code takes one. Raises ForcingError for sizes that do not divide."""
        cell = 2 ** (len(self.config.multiples) - 1)
        if pictures.shape[2] % cell or pictures.shape[3] % cell:
            raise ForcingError(f"A picture of {pictures.shape[3]}x{pictures.shape[2]} pixels does not divide into cells of "
                               f"{cell}. Crop or scale it first.")
        like = self.quant_conv.weight
        moments = torch.cat([self.quant_conv(self.encoder(part.to(like))) for part in pictures.split(AT_ONCE)])
        mean, spread = moments.chunk(2, dim=1)
        if noise is not None:
            mean = mean + torch.exp(0.5 * spread.clamp(*LOG_VARIANCE)) * noise.to(mean)
        return self.config.scale * mean

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, 3, H, W], not clamped."""
        like = self.post_quant_conv.weight
        parts = ((part / self.config.scale).to(like) for part in latents.split(AT_ONCE))
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])
