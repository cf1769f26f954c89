"""What steers one run of Forcing Stream: its mailbox, its text encoder, its LoRAs, and the state that everybody sees."""
from __future__ import annotations

import re
import uuid
from typing import Any, Callable, Sequence

import comfy.model_management as mm
import psutil
import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.options import RolloutOptions
from ..forcing_core.plan import REFERENCE, Block
from ..forcing_core.policies import build
from ..forcing_core.rollout import Switch
from ..forcing_core.rollout.transitions import check_switches
from ..forcing_core.steering import Command, Entry, Refused, Steering
from ..forcing_core.streaming.live import Live, kept_ranges
from .host_memory import TRACK
from .host_steering import LoraStrengths, TextEncoder
from .routes import STREAMS


class Desk:
    """For one run; as a context it shows the stream to everybody, and leaves the model as it came.

    clip: a CLIP, or None for a stream whose prompt stays. script: a log to be replayed. node: id of the node. example: of
    the latents that the decoder takes next, scale: sides of a frame in their cells. words: text of the first prompt, where
    that is known. settle: is called before weights are loaded or changed. Raises ForcingError for a log that this run cannot
    replay.
    """

    def __init__(self, guider, options: RolloutOptions, frames: int, clip, script: Sequence[Entry], fps: float,
                 node: str | None, decoder, samples: Tensor, words: str = ""):
        self.guider, self.options, self.policy, self.words = guider, options, build(options.cache, frames), words
        self.settle: Callable[[], None] = lambda: None
        patcher, vae, self._block = guider.model_patcher, decoder.vae, [*samples.shape[:2], options.block, *samples.shape[3:]]
        self.encoder = None if clip is None else TextEncoder(clip, patcher, lambda: self.settle())
        self.loras = LoraStrengths(patcher, self.room, lambda: self.settle())
        self.steering = Steering(script, self.encoder, self.encoder is not None and self.encoder.background, self._check)
        self.example = torch.zeros(1, decoder.channels, 1, *samples.shape[3:], device=vae.device, dtype=vae.vae_dtype)
        self.scale = vae.spacial_compression_decode()
        self.live = Live(*identity(node), fps, self.steering,
                         policy=type(options.cache).__name__.removesuffix("Options"))
        self.steering.changed = self.live.changed
        self.live.numbers = {"prompt": self.prompt(None, 0)}

    def __enter__(self) -> Desk:
        STREAMS.begin(self.live)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.steering.close()
        if self.live.ear is not None:
            self.live.ear.close()
        self.loras.restore()
        cancelled = isinstance(error, mm.InterruptProcessingException)
        self.live.over(None if error is None or cancelled else str(error) or kind.__name__)

    def room(self) -> int:
        """Bytes that the model needs beside its weights while it samples a block."""
        return self.guider.model_patcher.memory_required(self._block)

    def prompt(self, steered: str | None, first: int) -> str:
        """Text of the prompt of a block that begins with this latent frame: the steered one, that of the prompt track, or of
        the node behind the guider. "" where it is not known."""
        if steered is not None:
            return steered
        track = next((cond[TRACK] for cond in self.guider.original_conds.get("positive", ()) if TRACK in cond), None)
        begun = [s.text for s in track.segments if s.frame <= first] if track else [self.words]
        return begun[-1] or (self.words if len(begun) == 1 else "")

    def numbers(self, run, block: Block) -> dict[str, Any]:
        """What the state shows beside frames and commands, after this block."""
        memories = list(run.denoiser.memories.values())
        held = tuple(f for f in memories[0].store.frames if f < REFERENCE) if memories else ()
        return {"store_bytes": run.denoiser.nbytes, "memory_bytes": used_bytes(), "seed": run.noise.seed,
                "prompt": self.prompt(run.helm.text, block.first),
                "lora": [{"name": n, "strength": s} for n, s in self.loras.now.items()],
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


def identity(node: str | None) -> tuple[str, str, str]:
    """(id, node, prompt) of a stream that this node makes now."""
    context = get_executing_context()
    prompt = context.prompt_id if context else uuid.uuid4().hex
    name = re.sub(r"[^\w.:-]", "_", f"{prompt}.{node or 'stream'}", flags=re.ASCII)
    return name, str(node or ""), str(prompt)


def used_bytes() -> int:
    """Bytes: the most that the device had so far, or of this process on a CPU."""
    device = mm.get_torch_device()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
