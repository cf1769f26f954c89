"""What happens to text and memory where one prompt takes over from another: one small function a kind.

    recache   the new prompt, and the memory rewritten under it (arXiv 2509.22622, LongLive 1)
    keep      the new prompt; the memory stays as it is
    soft      a mixture of two prompts, one step of several; nothing is recached
    flush     the new prompt; of the memory only sink and newest frames stay (2511.20649, Infinity-RoPE: KV flush)
    jump      a flush, and the next block stands far away in time (2511.20649: RoPE cut)
    cut       the new prompt and an empty memory: nothing of the old scene is left

All happen between two blocks, after the clean pass of the older one. What is forgotten is also taken out of the
history, so that no later recache brings it back.
"""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Callable, Protocol, Sequence

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import ForcingError
from ..memory import can_flush, can_jump
from ..plan import Block
from ..schedule import clean

KEEP_FRAMES = 2  # newest latent frames that a flush leaves, as published
JUMP_FRAMES = 42  # as published: a block at positions 45-47 behind a memory at 0-2


@dataclass(frozen=True)
class Switch:
    """From latent frame `at` on (rounded up to a block), prompt number `segment` rules.

    renew_sink: the recache also replaces the sink frames (LongLive's global_sink = false). transition: key of
    TRANSITIONS. previous, weight: a soft one takes `weight` of the new prompt and the rest of `previous`.
    """

    at: int
    segment: int
    renew_sink: bool = False
    transition: str = "recache"
    previous: int = 0
    weight: float = 1.0


class Replay(Protocol):
    """`latents`: the newest clean ones [B, C, F, H, W] that a recache may replay, or None."""

    latents: Tensor | None


class History:
    """Clean latents of the last `window` frames (all with None): what a recache replays."""

    def __init__(self, window: int | None):
        self.window, self.latents = window, None

    def add(self, latents: Tensor) -> None:
        joined = latents if self.latents is None else torch.cat([self.latents, latents], dim=2)
        self.latents = joined if self.window is None else joined[:, :, -self.window:]

    def keep(self, frames: int) -> None:
        """Forget all but the newest `frames`."""
        self.latents = self.latents[:, :, -frames:] if frames and self.latents is not None else None


def recache(denoiser: Denoiser, switch: Switch, frame: int, history: Replay, context_timestep: float) -> None:
    """Change the prompt at `frame` and rewrite the store under it: one forward over the clean latents of the
    window, unmasked, as LongLive 1 does it. Before the first frame there is nothing to rewrite."""
    if switch.renew_sink:
        denoiser.forget()
    _take_over(denoiser, switch.segment)
    if frame and history.latents is not None:
        latents = history.latents
        levels = (clean(context_timestep),) * latents.shape[2]
        denoiser(latents, levels, frame - latents.shape[2], "recache")


def _take_over(denoiser: Denoiser, segment: int) -> None:
    """The new prompt, and word of it to memories that choose by prompt."""
    denoiser.replace_text(segment)
    turned = getattr(denoiser, "turned", None)
    if turned is not None:
        turned()


def _keep(denoiser: Denoiser, switch: Switch, frame: int, history: History, context_timestep: float) -> None:
    _take_over(denoiser, switch.segment)


def _soft(denoiser: Denoiser, switch: Switch, frame: int, history: History, context_timestep: float) -> None:
    denoiser.blend_text(switch.previous, switch.segment, switch.weight)


def _flush(denoiser: Denoiser, switch: Switch, frame: int, history: History, context_timestep: float) -> None:
    denoiser.flush(KEEP_FRAMES)
    history.keep(KEEP_FRAMES)
    _take_over(denoiser, switch.segment)


def _jump(denoiser: Denoiser, switch: Switch, frame: int, history: History, context_timestep: float) -> None:
    _flush(denoiser, switch, frame, history, context_timestep)
    denoiser.jump(frame, JUMP_FRAMES)


def _cut(denoiser: Denoiser, switch: Switch, frame: int, history: History, context_timestep: float) -> None:
    denoiser.forget()
    history.keep(0)
    denoiser.replace_text(switch.segment)


TRANSITIONS: dict[str, Callable[[Denoiser, Switch, int, History, float], None]] = {
    "recache": recache, "keep": _keep, "soft": _soft, "flush": _flush, "jump": _jump, "cut": _cut}
# the next block stands behind an empty memory, as the first one of a video does
FRESH = frozenset({"cut"})
SCENES = frozenset({"cut", "jump"})  # nothing of the next block has been begun with the one before


def take_up(denoiser: Denoiser, pending: deque[Switch], frame: int) -> None:
    """Drop the switches up to `frame`, which a rollout carried out before it was saved, and bring back their text."""
    due = passed(pending, frame)
    if due:
        if due[-1].transition == "soft":
            _soft(denoiser, due[-1], frame, None, 0.0)
        else:
            denoiser.replace_text(due[-1].segment)


def passed(pending: deque[Switch], frame: int) -> list[Switch]:
    """Take those up to `frame` out of switches that are sorted by place."""
    return [pending.popleft() for _ in list(pending) if pending[0].at <= frame]


def switch_prompt(denoiser: Denoiser, switch: Switch, frame: int, history: History, context_timestep: float) -> None:
    """Carry out a switch before the block that starts at latent frame `frame`."""
    TRANSITIONS[switch.transition](denoiser, switch, frame, history, context_timestep)


def fresh_starts(switches: Sequence[Switch], blocks: Sequence[Block]) -> int:
    """How many of the blocks after the first one stand behind an empty memory."""
    return sum(1 for s in switches if s.transition in FRESH and s.at > blocks[0].first)


def replays(switches: Sequence[Switch], rollout: str = "block") -> int:
    """Forwards that the switches cost: one for every recache behind at least one frame. A rollout that recomputes its
    context makes none."""
    return sum(1 for s in switches if rollout == "block" and s.transition == "recache" and s.at > 0)


# rollout -> the transitions that it can do, where those are not all, and why
LIMITED = {
    "rolling": (("keep",), "blocks that are being denoised together carry the old prompt on for as many blocks as there are "
                           "steps. Set every transition to keep"),
    "recompute": (("recache", "keep", "soft"), "it empties the memory before every block and rebuilds it from the newest "
                                               "frames. Set every transition to recache, keep or soft"),
    "per_step": (("keep", "soft"), "its memory holds noisy frames, which cannot be made anew. Set every transition to keep or "
                                   "soft"),
}


def check_switches(switches: Sequence[Switch], policy, rollout: str) -> None:
    """Raise ForcingError, before any work, for transitions that a rollout or a memory cannot do.

    policy: the cache policy that will run; rollout: key of `rollout.ROLLOUTS`.
    """
    kinds = {s.transition for s in switches}
    allowed, why = LIMITED.get(rollout, (tuple(TRANSITIONS), ""))
    if kinds - {*allowed}:
        raise ForcingError(f"A {rollout} rollout cannot change prompts by {', '.join(sorted(kinds - {*allowed}))}: {why}, or "
                           "use a block rollout.")
    if kinds & {"flush", "jump"}:
        can_flush(policy)
    if "jump" in kinds:
        can_jump(policy)
