"""Decoding and encoding with a Wan VAE block by block, exactly as it would do the whole video at once.

Works on the modules of the official network as ComfyUI builds them (`encoder`, `decoder`, `conv1`, `conv2`, and the
`feat_cache` their forwards take); they are handed in, and nothing of them is changed. Their convolutions are causal
in time, so all that a later block needs is the last two input frames of each. ComfyUI's Wan 2.1 layers remember only
what the last call had of them, so a call of one frame forgets one that the next call needs; it is put back here.
Wan 2.2's layers remember it themselves, but take one latent frame at a time.

Axes: B batch, T video frames, F latent frames, H and W pixels; T = 1 + 4 (F - 1). Latents are those that the network
takes, without the latent format of a diffusion model. Public repo: Wan-Video/Wan2.1.
"""
from __future__ import annotations

import inspect
from typing import Iterator

import torch
from torch import Tensor, nn

from ..errors import ForcingError
from ..saved import Saved, Tree

PIECE = 4  # most latent frames of one call: the layers before the first upsampling hold all of them
PAIR = 2  # video frames of one call of the 2.1 encoder
PATCH = 2  # Wan 2.2 works on patches of 2x2 pixels
TIME_DOWNSAMPLE = [False, True, True]
WORDS = (None, "Rep")  # what ComfyUI's layers keep where there is no frame yet
SCALES, PAST = (1, 2, 4, 8), 2  # sides of what a layer keeps, in latent cells, and its most frames


class _Half:
    """Encoder or decoder with its caches. rest: device on which the caches wait between calls; None leaves them."""

    def __init__(self, module: nn.Module, rest: torch.device | None = None):
        self.module, self.rest = module, rest
        count = sum(type(m).__name__ == "CausalConv3d" or getattr(m, "mode", None) == "downsample3d"
                    for m in module.modules())
        self.slots: list = [None] * count

    def __call__(self, x: Tensor, **kwargs) -> Tensor | None:
        before = _smallest(self.slots)
        out = self.module(x, feat_cache=self.slots, feat_idx=[0], **kwargs)
        for index, slot in enumerate(self.slots):
            if isinstance(slot, Tensor):
                self.slots[index] = _owned(_completed(before.get(index), slot)).to(self.rest or slot.device)
        return torch.cat(out, dim=2) if isinstance(out, list) else out

    def state(self) -> Tree:
        """As `saved` explains. The places without a tensor hold None, or a word of the network's own."""
        tensors = {str(i): slot for i, slot in enumerate(self.slots) if isinstance(slot, Tensor)}
        return {"words": [None if isinstance(slot, Tensor) else slot for slot in self.slots], **tensors}

    def load(self, saved: Saved, latents: Tensor) -> None:
        """latents: an example [B, C, F, h, w] of the next ones."""
        words = saved.texts("words", len(self.slots))
        slots: list = [word if word in WORDS else saved.fail("words", "holds an unknown one") for word in words]
        for index in range(len(slots)):
            if str(index) in saved:
                slots[index] = self._slot(saved, str(index), latents)
        self.slots = slots

    def _slot(self, saved: Saved, name: str, latents: Tensor) -> Tensor:
        slot = saved.tensor(name, (latents.shape[0], None, None, None, None), latents.dtype)
        scale = slot.shape[3] // latents.shape[3]
        if scale not in SCALES or slot.shape[3:] != tuple(scale * side for side in latents.shape[3:]) or slot.shape[2] > PAST:
            saved.fail(name, "is of another size")
        return slot.to(self.rest or latents.device)

    @property
    def nbytes(self) -> int:
        """Bytes that wait between calls where the network computes."""
        return 0 if self.rest is not None else sum(slot.nbytes for slot in self.slots if isinstance(slot, Tensor))


def _smallest(slots: list) -> dict[int, Tensor]:
    """The slots of the lowest resolution. Only there do calls of one frame occur, and the others, which are large,
    have to be free to go during the call."""
    held = {index: slot for index, slot in enumerate(slots) if isinstance(slot, Tensor)}
    least = min((slot.shape[-2:].numel() for slot in held.values()), default=0)
    return {index: slot for index, slot in held.items() if slot.shape[-2:].numel() == least}


def _completed(before: Tensor | None, now: Tensor) -> Tensor:
    """The last two input frames of a layer, of which the last call may have had only one."""
    if before is None or now is before or now.shape[2] > 1:
        return now
    return torch.cat([before[:, :, -1:].to(now), now], dim=2)


def _owned(part: Tensor) -> Tensor:
    """A view would keep all frames of the call alive."""
    return part.clone() if part.untyped_storage().nbytes() > part.nbytes else part


def _checked(vae: nn.Module, what: str = "decode") -> bool:
    """Whether this is the VAE of Wan 2.2; ForcingError unless it is that or 2.1's. what: it is to do."""
    if not all(hasattr(vae, name) for name in ("encoder", "decoder", "conv1", "conv2", "temperal_downsample")):
        raise ForcingError(f"A {type(vae).__name__} cannot {what} block by block: it is no Wan VAE. Load the Wan 2.1 VAE "
                           "(wan_2.1_vae.safetensors).")
    newer = "first_chunk" in inspect.signature(vae.decoder.forward).parameters
    if not newer and list(vae.temperal_downsample) != TIME_DOWNSAMPLE:
        raise ForcingError(f"This VAE halves time where Wan 2.1's does not ({list(vae.temperal_downsample)}). Load the Wan "
                           "2.1 VAE (wan_2.1_vae.safetensors).")
    return newer


class DecodeStream:
    """Latents to video, block by block. Blocks may have any number of latent frames, one included, first or later.

    vae: a WanVAE of 2.1 (of any width) or 2.2. rest: device on which caches wait between blocks, for example the CPU
    while the device works on the next block; None leaves them. Raises ForcingError for other networks. After an
    exception in `push` (out of memory) the stream is of no more use.
    """

    def __init__(self, vae: nn.Module, rest: torch.device | None = None):
        self.newer = _checked(vae)
        self.vae, self._half, self._started = vae, _Half(vae.decoder, rest), False
        self._loaded = False

    @property
    def nbytes(self) -> int:
        """Bytes of the caches that stay on the device between blocks."""
        return self._half.nbytes

    def state(self) -> Tree:
        """What a fresh stream over the same network needs to go on with the next block."""
        return {"started": int(self._started), "caches": self._half.state()}

    def load(self, saved: Saved, latents: Tensor) -> None:
        """Go on where the saved one stood. latents: an example of the next ones, as `push` takes them. Raises ForcingError
        for what does not fit."""
        self._half.load(saved.part("caches"), latents)
        self._started, self._loaded = bool(saved.integer("started", 0, 2)), True

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """Video [B, 3, T, H, W], about [-1, 1] and not clamped, of the next latents [B, C, F, h, w] in the dtype and on
        the device of the network. The first block gives 4 F - 3 frames, every later one 4 F."""
        try:
            video = torch.cat([self._decoded(piece) for piece in self._pieces(latents)], dim=2)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self._loaded:  # sizes that only the network knows
                raise ForcingError("The snapshot's decoder does not fit this VAE. Load the VAE of the first run.") from error
            raise
        self._loaded = False
        return video

    def _pieces(self, latents: Tensor) -> Iterator[Tensor]:
        if not self._started:
            yield latents[:, :, :1]
            latents = latents[:, :, 1:]
        if latents.shape[2]:
            yield from latents.split(1 if self.newer else PIECE, dim=2)

    def _decoded(self, piece: Tensor) -> Tensor:
        first, self._started = not self._started, True
        x = self.vae.conv2(piece)
        return _unpatched(self._half(x, first_chunk=first)) if self.newer else self._half(x)


class EncodeStream:
    """Video to latents (the posterior's mean), block by block: 1 + 4 n frames first, then multiples of four.

    vae: as in `DecodeStream`.
    """

    def __init__(self, vae: nn.Module):
        self.newer = _checked(vae, "encode")
        self.vae, self._half, self._started = vae, _Half(vae.encoder), False

    @torch.no_grad()
    def push(self, video: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] of the next frames [B, 3, T, H, W] in [-1, 1]; F = T / 4, one more in the first block.

        Raises ForcingError for a number of frames that does not fill latent frames.
        """
        head = 0 if self._started else 1
        if video.shape[2] == 0 or video.shape[2] % 4 != head:
            legal = "1, 5, 9, ... frames first" if head else "4, 8, 12, ... frames after the first block"
            raise ForcingError(f"{video.shape[2]} frames do not fill latent frames. Give {legal}.")
        self._started = True
        parts = [self._encoded(video[:, :, :1])] if head else []
        rest = video[:, :, head:]
        parts += [self._encoded(four) for four in rest.split(4, dim=2)] if rest.shape[2] else []
        return self.vae.conv1(torch.cat(parts, dim=2)).chunk(2, dim=1)[0]

    def _encoded(self, frames: Tensor) -> Tensor:
        if self.newer:
            return self._half(_patched(frames))
        *early, last = frames.split(PAIR, dim=2)
        for pair in early:  # gives nothing yet: half a latent frame waits in the caches
            self._half(pair)
        return self._half(last, final=True)


def _patched(video: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, C * 4, T, H/2, W/2], channels in the order colour, column, row."""
    x = video.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # B C T h q w r
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _unpatched(x: Tensor) -> Tensor:
    """The reverse of `_patched`."""
    x = x.unflatten(1, (-1, PATCH, PATCH))  # B C r q T h w
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
