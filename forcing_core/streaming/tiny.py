"""Decoding with a tiny autoencoder (TAEHV) block by block, exactly as it would do the whole video at once.

Works on the decoder as ComfyUI builds it: plain layers, and those that know of time by their names, `MemBlock` (sees its
own input of the frame before) and `TGrow` (makes several frames of one). All of a video that a later frame needs is one
frame in front of every `MemBlock`. Frames go through one at a time, as in ComfyUI, so that even rounding is the same.

Public repo: madebyollin/taehv. Axes: B batch, F latent frames, T video frames; T = 1 + 4 (F - 1).
"""
from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor, nn

from ..errors import ForcingError
from ..saved import Saved, Tree


class TinyDecodeStream:
    """Latents to video. Blocks may have any number of latent frames.

    tae: a TAEHV of 8x8 pixels a latent cell. Latents are those that its layers take; who knows the file says whether that
    is the scale of the model or of the VAE. Raises ForcingError for one that works on patches (Wan 2.2 and others).
    """

    def __init__(self, tae: nn.Module):
        if tae.patch_size != 1:
            raise ForcingError("This tiny VAE belongs to another model than Wan 2.1: it works on patches of pixels. Load "
                               "taew2_1 or lighttaew2_1.")
        self.layers, self.trim = tae.decoder, tae.frames_to_trim
        self._before: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that stay on the device between blocks."""
        return sum(frame.nbytes for frame in self._before.values())

    def state(self) -> Tree:
        """What a fresh stream over the same network needs to go on with the next block."""
        return {"trim": self.trim, "frames": {str(at): frame for at, frame in self._before.items()}}

    def load(self, saved: Saved, latents: Tensor) -> None:
        """Go on where the saved one stood. latents: an example of the next ones. Raises ForcingError for what does not
        fit."""
        frames, scale = saved.part("frames"), 1
        for at, layer in enumerate(self.layers):
            kind = type(layer).__name__
            scale *= 2 if kind == "Upsample" else 1
            if kind == "MemBlock" and str(at) in frames:
                sides = (scale * side for side in latents.shape[3:])
                frame = frames.tensor(str(at), (latents.shape[0], _channels(layer), *sides), latents.dtype)
                self._before[at] = frame.to(latents.device)
        self.trim = saved.integer("trim", 0, self.trim + 1)

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """Video [B, 3, T, H, W], about [0, 1] and not clamped, of the next latents [B, C, F, h, w] in the dtype and on the
        device of the network. The first block gives 4 F - 3 frames, every later one 4 F."""
        frames = [frame for latent in latents.unbind(2) for frame in self._through(latent, 0)]
        dropped, self.trim = frames[self.trim:], 0  # the first latent frame stands for one frame of video
        return torch.stack(dropped, dim=2)

    def _through(self, x: Tensor, index: int) -> Iterator[Tensor]:
        """Frames [B, 3, H, W] that the layers from `index` on make of one frame."""
        for at in range(index, len(self.layers)):
            layer, kind = self.layers[at], type(self.layers[at]).__name__
            if kind == "TGrow":
                for part in layer(x).view(x.shape[0], -1, *x.shape[2:]).split(x.shape[1], dim=1):
                    yield from self._through(part, at + 1)
                return
            if kind == "MemBlock":
                before, self._before[at] = self._before.get(at), x
                x = layer(x, torch.zeros_like(x) if before is None else before)
            else:
                x = layer(x)
        yield x


def _channels(block: nn.Module) -> int:
    """Of the frames that a MemBlock takes: it joins two of them."""
    return next(layer for layer in block.modules() if isinstance(layer, nn.Conv2d)).in_channels // 2
