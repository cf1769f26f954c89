"""Streaming long tuning: one long rollout is trained on piece by piece, on the KV memory that it left behind.

Axis legend of latents: [B, C, F, h, w]. Every iteration makes 18 or 21 new frames and takes a loss of the newest 21,
the length that the teacher knows; only new frames get a gradient. At a random frame the prompt changes and the
memory is rewritten under the new one. The memory lies in the denoiser; `LongState` is everything else, without
gradients, and is replaced, never changed.

Source: arXiv 2509.22622 (LongLive), section on streaming long tuning.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Sequence

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import ForcingError
from ..noise import Noise
from ..plan import Block, layout
from ..rollout import Switch, recache
from ..schedule import Level, clean
from .self_rollout import exit_only

Generate = Callable[[Block], Tensor]  # the latents [B, C, n, h, w] of a block, with their graph
Objective = Callable[[Tensor, Tensor], Tensor]  # (clip [B, C, F, h, w], bool [F] of frames with a gradient) -> loss
ImageLatent = Callable[[Tensor], Tensor]  # latents [B, C, n, h, w] -> the last of them as an image's, [B, C, 1, h, w]


@dataclass(frozen=True)
class LongOptions:
    """window: frames of the loss. new_frames: an iteration makes one of these; the first one makes `window`.
    max_frames: of a rollout. switch_at: frames at which the prompt may change, empty for never. renew_sink: the
    change replaces the sink too. replay: newest frames that are rewritten then, at most the memory's window.
    context_timestep: of the clean passes.
    """

    block: int = 3
    window: int = 21
    new_frames: tuple[int, ...] = (18, 21)
    max_frames: int = 240
    switch_at: tuple[int, ...] = tuple(range(21, 202, 18))
    renew_sink: bool = True
    replay: int = 21
    context_timestep: float = 0.0

    def __post_init__(self):
        counts = (self.window, *self.new_frames)
        if not self.new_frames or any(n < 1 or n % self.block or n > self.window for n in counts):
            raise ForcingError(f"A loss window of {self.window} frames and {self.new_frames} new ones do not fit blocks "
                               f"of {self.block}. Use multiples of {self.block}, the new ones not above the window.")
        if not 1 <= self.replay <= self.window <= self.max_frames:
            raise ForcingError(f"{self.replay} replayed frames, a window of {self.window} and rollouts of "
                               f"{self.max_frames} do not go together. Use 1 <= replay <= window <= max_frames.")


@dataclass(frozen=True)
class LongState:
    """Where a rollout stands. frames: made so far. latents: the newest of them, at most a loss window, detached.
    switch: the change of prompt that is still to come. segment: number of the prompt that rules."""

    frames: int = 0
    latents: Tensor | None = None
    switch: Switch | None = None
    segment: int = 0


@dataclass(frozen=True)
class Extension:
    """One iteration. clip: newest frames [B, C, F, h, w], new ones with their graph; mask: bool [F], True for frames
    with a gradient; state: where the rollout stands now."""

    clip: Tensor
    mask: Tensor
    state: LongState


def begin(denoiser: Denoiser, options: LongOptions, generator: torch.Generator) -> LongState:
    """A new rollout: empty memory, first prompt, and a random frame at which the second one takes over."""
    denoiser.forget()
    denoiser.replace_text(0)
    places = [at for at in options.switch_at if at < options.max_frames]
    if not places:
        return LongState()
    return LongState(switch=Switch(places[_draw(len(places), generator)], 1, options.renew_sink))


def finished(state: LongState, options: LongOptions) -> bool:
    """Whether no further iteration fits."""
    return state.frames > 0 and not _fitting(state, options)


def live_generate(denoiser: Denoiser, levels: Sequence[Level], noise: Noise, exit_step: int) -> Generate:
    """Blocks made as in `self_rollout`: stopped at one step of the list, which alone has a graph.

    denoiser: a `LiveDenoiser`, or gradients are lost. Drawn anew for every iteration.
    """
    def generate(block: Block) -> Tensor:
        def predict(x: Tensor, level: Level) -> Tensor:
            return denoiser(x, (level,) * block.frames, block.first, "noisy")

        return exit_only(noise.initial(block), levels[:exit_step + 1], predict, lambda step: noise.renoise(block, step))
    return generate


def extend(state: LongState, denoiser: Denoiser, generate: Generate, options: LongOptions,
           generator: torch.Generator, image_latent: ImageLatent | None = None) -> Extension:
    """Make the next frames of a rollout and write them into the memory.

    image_latent: makes the first frame of a clip that starts within a rollout what the teacher knows there, the
    latent of a single image (decode, take the last picture, encode); that frame gets no gradient.
    Raises ForcingError where the rollout is finished.
    """
    new = _new_frames(state, options, generator)
    denoiser.replace_text(state.segment)  # the weights may have changed since its keys were cached
    made, now = [], state
    for block in layout(state.frames + new, options.block)[state.frames // options.block:]:
        now = _switched(now, denoiser, options)
        made.append(generate(block))
        done = made[-1].detach()
        denoiser(done, (clean(options.context_timestep),) * block.frames, block.first, "clean")
        now = replace(now, frames=block.end, latents=_joined(now.latents, done)[:, :, -options.window:])
    every = torch.cat(made, 2) if state.latents is None else torch.cat([state.latents, *made], 2)
    clip, mask = every[:, :, -options.window:], torch.arange(options.window) >= options.window - new
    before = every.shape[2] - options.window
    if before and image_latent is not None:
        with torch.no_grad():
            image = image_latent(every[:, :, :before + 1].detach())
        clip, mask[0] = torch.cat([image, clip[:, :, 1:]], 2), False
    return Extension(clip, mask.to(clip.device), now)


def loss(state: LongState, denoiser: Denoiser, generate: Generate, objective: Objective, options: LongOptions,
         generator: torch.Generator, image_latent: ImageLatent | None = None) -> tuple[Tensor, LongState]:
    """(objective of the next piece, state after it). While `objective` runs the denoiser holds the prompt of the
    newest frames."""
    step = extend(state, denoiser, generate, options, generator, image_latent)
    return objective(step.clip, step.mask), step.state


@dataclass(frozen=True)
class _Replay:
    """What `recache` wants of a history."""

    latents: Tensor


def _switched(state: LongState, denoiser: Denoiser, options: LongOptions) -> LongState:
    """Change the prompt and rewrite the memory where the change is due at the next frame."""
    if state.switch is None or state.switch.at > state.frames:
        return state
    if state.latents is None:
        raise ForcingError("The prompt cannot change at frame 0. Give the rollout that prompt from its start.")
    recache(denoiser, state.switch, state.frames, _Replay(state.latents[:, :, -options.replay:]),
            options.context_timestep)
    return replace(state, switch=None, segment=state.switch.segment)


def _fitting(state: LongState, options: LongOptions) -> list[int]:
    return [n for n in options.new_frames if state.frames + n <= options.max_frames]


def _new_frames(state: LongState, options: LongOptions, generator: torch.Generator) -> int:
    if not state.frames:
        return options.window
    counts = _fitting(state, options)
    if not counts:
        raise ForcingError(f"A rollout of {state.frames} frames cannot grow within {options.max_frames}. "
                           "Begin a new one where `finished` says so.")
    return counts[_draw(len(counts), generator)]


def _joined(older: Tensor | None, newer: Tensor) -> Tensor:
    return newer if older is None else torch.cat([older, newer], 2)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator, device=generator.device))
