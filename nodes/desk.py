"""What steers one run of Forcing Stream: its mailbox, its text encoder, its LoRAs, and the state that everybody sees."""
from __future__ import annotations

import re
import uuid
from typing import Any, Sequence

import comfy.model_management as mm
import psutil
import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.options import RolloutOptions
from ..forcing_core.policies import build
from ..forcing_core.rollout import Switch
from ..forcing_core.rollout.transitions import check_switches
from ..forcing_core.steering import Command, Entry, Refused, Steering
from ..forcing_core.streaming.live import Live, kept_ranges
from .host_steering import LoraStrengths, TextEncoder
from .routes import STREAMS


class Desk:
    """For one run; as a context it shows the stream to everybody, and leaves the model as it came.

    clip: a CLIP, or None for a stream whose prompt stays. script: a log to be replayed. node: id of the node. example: of
    the latents that the decoder takes next, scale: sides of a frame in their cells. Raises ForcingError for a log that
    this run cannot replay.
    """

    def __init__(self, guider, options: RolloutOptions, frames: int, clip, script: Sequence[Entry], fps: float,
                 node: str | None, decoder, samples: Tensor):
        self.guider, self.options, self.policy = guider, options, build(options.cache, frames)
        patcher, vae = guider.model_patcher, decoder.vae
        self.encoder = None if clip is None else TextEncoder(clip, patcher)
        self.loras = LoraStrengths(patcher, lambda: patcher.memory_required([*samples.shape[:2], options.block,
                                                                             *samples.shape[3:]]))
        self.steering = Steering(script, self.encoder, self.encoder is not None and self.encoder.background, self._check)
        self.example = torch.zeros(1, decoder.channels, 1, *samples.shape[3:], device=vae.device, dtype=vae.vae_dtype)
        self.scale = vae.spacial_compression_decode()
        context = get_executing_context()
        prompt = context.prompt_id if context else uuid.uuid4().hex
        name = re.sub(r"[^\w.:-]", "_", f"{prompt}.{node or 'stream'}", flags=re.ASCII)
        self.live = Live(name, str(node or ""), str(prompt), fps, self.steering,
                         policy=type(options.cache).__name__.removesuffix("Options"))
        self.steering.changed = self.live.changed

    def __enter__(self) -> Desk:
        STREAMS.begin(self.live)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.steering.close()
        self.loras.restore()
        cancelled = isinstance(error, mm.InterruptProcessingException)
        self.live.over(None if error is None or cancelled else str(error) or kind.__name__)

    def numbers(self, run) -> dict[str, Any]:
        """What the state shows beside frames and commands, after a block."""
        memories = list(run.denoiser.memories.values())
        held = memories[0].store.frames if memories else ()
        return {"store_bytes": run.denoiser.nbytes, "memory_bytes": _used(), "seed": run.noise.seed,
                "prompt": run.helm.text or "", "lora": [{"name": n, "strength": s} for n, s in self.loras.now.items()],
                "window": {"kept": kept_ranges(held), "policy": self.live.policy}}

    def _check(self, command: Command) -> None:
        if command.kind == "lora":
            self.loras.check(command.name)
        if command.kind == "prompt":
            self._check_prompt(command)

    def _check_prompt(self, command: Command) -> None:
        try:
            check_switches([Switch(0, 1, transition=command.transition)], self.policy, self.options.cache.rollout)
        except ForcingError as error:
            raise Refused(str(error)) from error
        if len(self.guider.original_conds.get("positive", ())) != 1:
            raise Refused("The positive prompt of this stream is not a single one, so it cannot be replaced. Connect one text "
                          "encode node to the guider.")
        if self.encoder is not None:
            self.encoder.tokens(command.text)


def _used() -> int:
    """Bytes: the most that the device had so far, or of this process on a CPU."""
    device = mm.get_torch_device()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
