"""The host's side of steering: encoding a new prompt, and another strength for a LoRA, while a rollout runs.

A CLIP that lives on the CPU never competes with the diffusion model, so it encodes in a thread of its own. One that
shares the device would push weights out in the middle of a block: it encodes between two blocks, on the sampling thread,
and the diffusion model is loaded again. LoRA strengths are changed between two blocks too, by ComfyUI's own patcher.
"""
from __future__ import annotations

import threading
import uuid
from typing import Any, Callable

import comfy.model_management as mm
import torch
from torch import Tensor

from ..forcing_core.steering import Refused
from .track import embedding_of


class TextEncoder:
    """Text -> embedding [1, n, text_dim]. clip: a CLIP. patcher: of the diffusion model, or None.

    background: whether it may be called from another thread while the model works. Its weights are loaded now. settle: called
    before others are loaded.
    """

    def __init__(self, clip, patcher=None, settle: Callable[[], None] = lambda: None):
        self.clip, self.patcher, self.settle, self._words = clip, patcher, settle, threading.Lock()
        own = getattr(clip, "patcher", None)
        self.background = own is not None and mm.is_device_cpu(own.load_device) and getattr(own, "forced_hooks", None) is None
        if self.background:
            clip.load_model()
            self.clip = clip.clone()
            self.clip.load_model = lambda tokens=None: own  # ComfyUI's list of loaded models belongs to the sampling thread

    def tokens(self, text: str) -> Any:
        """Raises ForcingError for words that the encoder refuses. From any thread; the model is not used."""
        with self._words:
            return self.clip.tokenize(text)

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        tokens = self.tokens(text)
        if not self.background:
            self.settle()
        try:
            return embedding_of(self.clip.encode_from_tokens_scheduled(tokens), "The new prompt").clone()
        except mm.InterruptProcessingException:
            if self.background:  # meant for the sampler, which has not seen it
                mm.interrupt_current_processing()
            raise
        finally:
            if not self.background and self.patcher is not None:
                self._load_again()

    def _load_again(self) -> None:
        if not any(loaded.model is self.patcher for loaded in mm.current_loaded_models):
            mm.load_models_gpu([self.patcher])


class LoraStrengths:
    """The LoRAs that are on a MODEL, and other strengths for them during one run. `restore` leaves it as it came.

    room: bytes that loading has to leave free. settle: called before weights change. now: name -> strength; ComfyUI does not
    keep their names, so they are called "lora 1" and so on, in the order in which they were put on the MODEL.
    """

    def __init__(self, patcher, room: Callable[[], int] = lambda: 0, settle: Callable[[], None] = lambda: None):
        self.patcher, self.room, self.settle = patcher, room, settle
        self._before = patcher.patches, patcher.patches_uuid
        self._names: dict[Any, str] = {}
        self.now: dict[str, float] = {}
        for entries in patcher.patches.values():
            for entry in entries:
                key = _origin(entry)
                if key is not None and key not in self._names:
                    self._names[key] = f"lora {len(self._names) + 1}"
                    self.now[self._names[key]] = float(entry[0])

    def check(self, name: str | None) -> None:
        """Raises Refused where there is no such LoRA, or it could be another one."""
        if not self.now:
            raise Refused("There is no LoRA in the weights of this model whose strength could change. Put one on the MODEL "
                          "with a LoRA loader (not a bypass one) before the stream starts, with a small strength if need be.")
        if name is None and len(self.now) > 1:
            raise Refused(f"The model has {len(self.now)} LoRAs. Name one of {', '.join(self.now)}.")
        if name is not None and name not in self.now:
            raise Refused(f"The model has no LoRA of that name. Use one of {', '.join(self.now)}.")

    def set(self, name: str | None, strength: float) -> None:
        """Patch the weights again. Only between two blocks."""
        self.check(name)
        name = name or next(iter(self.now))
        if self.now[name] == strength:
            return
        self.settle()
        self.now[name] = float(strength)
        changed = {key: [self._changed(entry) for entry in entries] for key, entries in self._before[0].items()}
        self._put(changed, uuid.uuid4())
        mm.load_models_gpu([self.patcher], memory_required=self.room())

    def restore(self) -> None:
        """For the runs that follow; the weights themselves are patched again when the model is used next."""
        if self.patcher.patches is not self._before[0]:
            self._put(*self._before)

    def _changed(self, entry: tuple) -> tuple:
        name = self._names.get(_origin(entry))
        return entry if name is None else (self.now[name], *entry[1:])

    def _put(self, patches: dict, number: uuid.UUID) -> None:
        self.patcher.patches, self.patcher.patches_uuid = patches, number


def _origin(entry: tuple) -> Any:
    """What all patches of one LoRA have in common: the set of names that its file was read with. Others - differences of
    whole weights - by their strength. None for what is no LoRA (merged models)."""
    strength, value, strength_model = entry[:3]
    if strength_model != 1.0:
        return None
    keys = getattr(value, "loaded_keys", None)
    return id(keys) if keys is not None else ("difference", strength)
