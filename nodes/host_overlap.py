"""Decoding a block while the next one is sampled, where the device has room for both.

ComfyUI's list of loaded models belongs to the sampling thread, so whatever loads or moves weights happens there, with
nothing being decoded meanwhile. The other thread only computes, and only where the weights of both models are on their
devices and stay there: not with ComfyUI's dynamic VRAM on one card, which moves them in the middle of a forward.
"""
from __future__ import annotations

from typing import Callable

import comfy.model_management as mm
import torch
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.saved import Tree
from ..forcing_core.streaming.behind import Behind
from ..forcing_core.streaming.recorder import Recorder
from .host_vae import BlockDecoder

# Whether to overlap, of the VAE's device and the model's. Two threads on one CPU share its cores and gain next to nothing.
OVERLAP = {
    "auto": lambda vae, model: not (mm.is_device_cpu(vae) and mm.is_device_cpu(model)),
    "on": lambda vae, model: True,
    "off": lambda vae, model: False,
}


class Overlap:
    """What a stream hands its blocks to; a context for as long as it samples. recorder: decodes with `decoder.decoded`.
    sampling: bytes that the model needs beside its weights while it samples a block. how: key of OVERLAP. Every method is
    for the sampling thread."""

    def __init__(self, decoder: BlockDecoder, recorder: Recorder, sampling: Callable[[], int], how: str = "auto"):
        if how not in OVERLAP:
            raise ForcingError(f"Overlap {how!r} is not known. Use one of {', '.join(OVERLAP)}.")
        self.decoder, self.recorder, self.sampling = decoder, recorder, sampling
        self.wanted = OVERLAP[how](decoder.vae.device, decoder.patcher.load_device)
        if self.wanted and decoder.vae.device.type == "cuda":
            # all of its decoding, also what does not overlap: memory that was freed belongs to the stream it was made for
            decoder.aside = torch.cuda.Stream(decoder.vae.device)
        self._behind = Behind()

    def __enter__(self) -> Overlap:
        self._behind.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._behind.__exit__(kind, error, trace)

    def write(self, latents: Tensor, written: Callable[[], None] = lambda: None) -> None:
        """The next block, in the VAE's scale; `written` is called, by whichever thread, when its frames are in the file.
        Raises what this block or the one before it met with."""
        self._behind.settle()

        def job() -> None:
            self.recorder.write(latents)
            written()
        if self.wanted and fits(self.decoder, self.sampling):
            self.decoder.ready_for(latents)
            self._behind.hand(job)
            return
        self.decoder.load()
        self.decoder.ready_for(latents)
        job()
        self.decoder.give_way()

    def settle(self) -> None:
        """Nothing is being decoded when this returns: weights may be moved, and the decoder's state is that of whole
        blocks."""
        self._behind.settle()

    def state(self) -> Tree:
        """`Recorder.state`, of all blocks so far."""
        self.settle()
        return self.recorder.state()


def fits(decoder: BlockDecoder, sampling: Callable[[], int]) -> bool:
    """Whether a block can be decoded now without moving weights, and leaves the model the bytes that it needs to sample."""
    vae, shared = decoder.vae, decoder.vae.device == decoder.patcher.load_device
    if not _stays(vae.patcher) or (shared and not _stays(decoder.patcher)):
        return False
    if mm.is_device_cpu(vae.device):
        return True
    wanted = decoder.needed - decoder.stream.nbytes + (sampling() if shared else 0)
    return mm.get_free_memory(vae.device) >= wanted


def _stays(patcher) -> bool:
    """Whether all weights of a model are on its device for as long as nothing is loaded."""
    loaded = any(held.model is patcher for held in mm.current_loaded_models)
    return loaded and not patcher.is_dynamic() and patcher.loaded_size() >= patcher.model_size()
