"""A narrow VAE in the format of Wan 2.1: 8x8 pixels a latent cell, one frame and then four a latent frame.

Key names and shapes are those of the official checkpoint, so ComfyUI's VAELoader opens the file. Two kinds of
latents have to be told apart:

- *stored* latents are what the network of the file speaks and what ComfyUI's VAE object returns and takes;
- *normalised* latents are (stored - WAN_MEAN) / WAN_STD, a fixed step of ComfyUI's Wan 2.1 latent format between
  the VAE and the diffusion model. `encode`, `decode` and `DecodeStream` speak these.

WAN_MEAN and WAN_STD belong to the official weights. `rescale` folds any other scale of ours into the 1x1x1
convolutions conv1 and conv2, so that normalised latents have mean 0, and variance 1 on average over the channels.

Axes: B batch, T video frames, F latent frames, H and W pixels; T = 1 + 4 (F - 1).
"""
from __future__ import annotations

from pathlib import Path
from typing import Mapping

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import ForcingError
from ..saved import Saved, Tree
from .vae_layers import CausalConv3d, Downsample, FrameAttention, ResidualBlock, RMSNorm, State, Upsample, in_order

Z_DIM, MULTIPLES, RES_BLOCKS = 16, (1, 2, 4, 4), 2
TIME_DOWNSAMPLE = (False, True, True)
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# The unused log variance of the posterior: small enough to mean "no noise" to whoever reads it.
LOG_VARIANCE = -12.0


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, channels), FrameAttention(channels),
                         ResidualBlock(channels, channels))


def _head(channels: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(RMSNorm(channels, 3), nn.SiLU(), CausalConv3d(channels, c_out, 3))


class Encoder(nn.Module):
    """[B, 3, T, H, W] -> [B, 2 * Z_DIM, F, H/8, W/8]."""

    def __init__(self, dim: int):
        super().__init__()
        widths = [dim * m for m in (1, *MULTIPLES)]
        layers: list[nn.Module] = []
        for level, (c_in, c_out) in enumerate(zip(widths, widths[1:])):
            layers += [ResidualBlock(c_in if n == 0 else c_out, c_out) for n in range(RES_BLOCKS)]
            if level < len(TIME_DOWNSAMPLE):
                layers.append(Downsample(c_out, TIME_DOWNSAMPLE[level]))
        self.conv1 = CausalConv3d(3, dim, 3)
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * Z_DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for part in (self.downsamples, self.middle, self.head):
            x = in_order(part, x, None)
        return x


class Decoder(nn.Module):
    """[B, Z_DIM, F, H/8, W/8] -> [B, 3, T, H, W]; a block of a stream where a state is given."""

    def __init__(self, dim: int):
        super().__init__()
        widths = [dim * m for m in (MULTIPLES[-1], *reversed(MULTIPLES))]
        layers: list[nn.Module] = []
        for level, (c_in, c_out) in enumerate(zip(widths, widths[1:])):
            c_in = c_in if level == 0 else c_in // 2  # the upsampling before it halved them
            layers += [ResidualBlock(c_in if n == 0 else c_out, c_out) for n in range(RES_BLOCKS + 1)]
            if level < len(TIME_DOWNSAMPLE):
                layers.append(Upsample(c_out, TIME_DOWNSAMPLE[-1 - level]))
        self.conv1 = CausalConv3d(Z_DIM, widths[0], 3)
        self.middle = _middle(widths[0])
        self.upsamples = nn.Sequential(*layers)
        self.head = _head(dim, 3)

    def forward(self, x: Tensor, state: State = None) -> Tensor:
        x = self.conv1(x, state)
        for part in (self.middle, self.upsamples, self.head):
            x = in_order(part, x, state)
        return x


class MicroVAE(nn.Module):
    """The whole network. dim: width of the first level, a multiple of 4; the official one has 96.

    Raises ForcingError for another dim.
    """

    def __init__(self, dim: int = 12):
        super().__init__()
        if dim < 4 or dim % 4:
            raise ForcingError(f"A VAE of width {dim} cannot be built. Use a multiple of 4, for example 12.")
        self.dim = dim
        self.encoder, self.decoder = Encoder(dim), Decoder(dim)
        self.conv1, self.conv2 = CausalConv3d(2 * Z_DIM, 2 * Z_DIM, 1), CausalConv3d(Z_DIM, Z_DIM, 1)
        self._reset_scale()

    @torch.no_grad()
    def _reset_scale(self) -> None:
        """conv1 and conv2 turn the inner networks' numbers into stored latents and back; not trained."""
        mean, std = (torch.tensor(values) for values in (WAN_MEAN, WAN_STD))
        for conv in (self.conv1, self.conv2):
            conv.requires_grad_(False).weight.zero_()
        self.conv1.weight[:Z_DIM, :Z_DIM, 0, 0, 0] = torch.diag(std)
        self.conv1.bias.copy_(torch.cat([mean, torch.full_like(mean, LOG_VARIANCE)]))
        self.conv2.weight[:, :, 0, 0, 0] = torch.diag(1 / std)
        self.conv2.bias.copy_(-mean / std)
        for unused in (self.encoder.head[2].weight, self.encoder.head[2].bias):
            unused[Z_DIM:] = 0

    @torch.no_grad()
    def rescale(self, mean: Tensor, std: Tensor) -> None:
        """Fold a new scale: normalised latents n become (n - mean) / std. mean, std: [16], std > 0."""
        wan_mean, wan_std = _wan(self.conv1.weight, 1)
        mean, std = mean.to(wan_mean), std.to(wan_mean)
        # stored' = (stored - wan_mean - wan_std mean) / std + wan_mean
        self.conv1.weight[:Z_DIM] /= std.view(-1, 1, 1, 1, 1)
        self.conv1.bias[:Z_DIM] = (self.conv1.bias[:Z_DIM] - wan_mean - wan_std * mean) / std + wan_mean
        self.conv2.bias += self.conv2.weight[:, :, 0, 0, 0] @ (wan_mean * (1 - std) + wan_std * mean)
        self.conv2.weight *= std.view(1, -1, 1, 1, 1)

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents [B, 16, F, H/8, W/8] (the posterior's mean) of a video [B, 3, T, H, W] in [-1, 1].

        Raises ForcingError for sizes that are no multiples of 8, and for T other than 1, 5, 9, ...
        """
        frames, height, width = video.shape[2:]
        if frames % 4 != 1 or height % 8 or width % 8:
            raise ForcingError(f"A video of {frames} frames, {width}x{height}, does not fill latent cells. Use 1, 5, "
                               "9, ... frames and sides that are multiples of 8.")
        inner = self.encoder(video)
        with torch.autocast(video.device.type, enabled=False):  # scales of up to 10 would cost bf16 its digits
            mean, std = _wan(self.conv1.weight, 5)
            return (self.conv1(inner.to(mean.dtype))[:, :Z_DIM] - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Video [B, 3, T, H, W], about [-1, 1] and not clamped, of normalised latents [B, 16, F, h, w]."""
        return self.decoder(self._inner(latents))

    def _inner(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            mean, std = _wan(self.conv2.weight, 5)
            return self.conv2(latents.to(mean.dtype) * std + mean)


class DecodeStream:
    """Decodes a video block by block, exactly as `MicroVAE.decode` would decode it at once.

    Blocks may have any number of latent frames, one included, first or later. (ComfyUI's own chunked decoder is
    wrong for later chunks of one frame, because it keeps only the current chunk's last two.)
    """

    def __init__(self, vae: MicroVAE):
        self._vae, self._state = vae, {}

    def push(self, latents: Tensor) -> Tensor:
        """Frames [B, 3, T, H, W] of the next normalised latents [B, 16, F, h, w].

        The first block gives 4 F - 3 frames, every later one 4 F. B, h and w stay those of the first block.
        """
        return self._vae.decoder(self._vae._inner(latents), self._state)

    def state(self) -> Tree:
        """What a fresh stream over the same VAE needs to go on with the next block."""
        layers = {module: name for name, module in self._vae.decoder.named_modules()}
        return {"begun": [layers[m] for m, t in self._state.items() if not t.numel()],
                "caches": {layers[m]: t for m, t in self._state.items() if t.numel()}}

    def load(self, saved: Saved, latents: Tensor) -> None:
        """Go on where the saved one stood. latents: an example of the next ones. Raises ForcingError for what does not
        fit."""
        layers, caches, scale = dict(self._vae.decoder.named_modules()), saved.part("caches"), 1
        begun = saved.anything("begun")
        if not isinstance(begun, list) or not all(isinstance(n, str) and isinstance(layers.get(n), Upsample) for n in begun):
            saved.fail("begun", "names no layers")
        self._state = {layers[name]: latents.new_empty(0) for name in begun}
        for name, layer in layers.items():
            scale *= 2 if isinstance(layer, Upsample) else 1  # it comes before its own convolution in time
            if isinstance(layer, CausalConv3d) and layer.past and name in caches:
                sides = (side * scale // (2 if name.endswith("time_conv") else 1) for side in latents.shape[3:])
                shape = (latents.shape[0], layer.in_channels, layer.past, *sides)
                self._state[layer] = caches.tensor(name, shape, torch.float32).to(latents.device)


def _wan(like: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """WAN_MEAN and WAN_STD in dtype and on device of `like`: [16], or for 5 axes [1, 16, 1, 1, 1]."""
    shape = (-1,) if axes == 1 else (1, -1, 1, 1, 1)
    mean, std = (like.new_tensor(values).view(shape) for values in (WAN_MEAN, WAN_STD))
    return mean, std


def vae_bytes(vae: MicroVAE, metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of a VAE, weights in float16. metadata: strings for its header."""
    state = {name: value.half().cpu().contiguous() for name, value in vae.state_dict().items()}
    return safetensors.torch.save(state, {"format": "pt", **metadata})


def load_vae(path: str | Path) -> MicroVAE:
    """A VAE in float32, on the CPU, set to evaluation. Raises ForcingError for files that hold none of ours."""
    try:
        state = safetensors.torch.load_file(str(path))
    except FileNotFoundError as error:
        raise ForcingError(f"There is no file {path}. Check the path, or train one.") from error
    except (SafetensorError, OSError) as error:
        raise ForcingError(f"{path} is no readable safetensors file. Train or copy it again.") from error
    gamma = state.get("decoder.head.0.gamma")
    if gamma is None:
        raise ForcingError(f"{path} holds no Wan 2.1 VAE. Choose the file of a VAE.")
    vae = MicroVAE(gamma.shape[0])
    try:
        vae.load_state_dict(state)
    except RuntimeError as error:
        raise ForcingError(f"{path} holds another kind of VAE than Wan 2.1's. Choose the file of a VAE.") from error
    return vae.requires_grad_(False).eval()
