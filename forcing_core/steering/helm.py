"""Carries out what the mailbox holds: prompts by the ways of `rollout/transitions.py`, seeds, LoRA strengths, the end."""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Sequence

from torch import Tensor

from ..noise import BlockNoise
from ..plan import Block
from ..rollout.transitions import Switch, take_up
from .command import Command
from .mailbox import Steering


@dataclass
class SteeredNoise:
    """Noise of (seed, block, step) whose seed may change: a block keeps the one that ruled when it began.

    inner: with the seed of the start. changes: (index of the first block, seed), rising.
    """

    inner: BlockNoise
    changes: list[tuple[int, int]] = field(default_factory=list)

    def change(self, block: int, seed: int) -> None:
        self.changes.append((block, seed))

    @property
    def seed(self) -> int:
        """Of the newest blocks."""
        return self.changes[-1][1] if self.changes else self.inner.seed

    def initial(self, block: Block) -> Tensor:
        return self._of(block).initial(block)

    def renoise(self, block: Block, step: int) -> Tensor:
        return self._of(block).renoise(block, step)

    def _of(self, block: Block) -> BlockNoise:
        ruling = [seed for first, seed in self.changes if first <= block.index]
        return replace(self.inner, seed=ruling[-1]) if ruling else self.inner


@dataclass
class Helm:
    """Carries commands out before a block: what a rollout is given as `steer`, and calls with the block that comes and the
    switches that are still ahead. False ends the rollout.

    size: latent frames of an ordinary block. lora: sets the strength of the LoRA of that name, or of the only one.
    alive: raises where a paused run is to end. text: the steered prompt that rules now, None before the first one.
    stopping: set once the run was told to stop; `stopped` is called then, while the memory is still that of whole blocks.
    """

    steering: Steering
    denoiser: Any
    noise: SteeredNoise
    size: int
    lora: Callable[[str | None, float], None] | None = None
    alive: Callable[[], None] = lambda: None
    stopped: Callable[[], None] = lambda: None
    text: str | None = None
    stopping: bool = False

    def __call__(self, block: Block, pending: deque[Switch]) -> bool:
        for entry, made in self.steering.boundary(block, self.alive):
            ACTIONS[entry.command.kind](self, entry.command, block, pending, made)
        if self.stopping:
            self.stopped()
        return not self.stopping

    def restore(self, blocks: Sequence[Block], switches: Sequence[Switch]) -> Sequence[Switch]:
        """Be as after the blocks of a run that is gone on with, of which `steering.log` is left. Returns the switches for
        the rollout: those of the last prompt, or the given ones of the prompt track where there was none."""
        pending = deque(sorted(switches, key=lambda s: s.at))
        for entry in self.steering.log:
            if entry.command.kind in ("seed", "lora"):
                ACTIONS[entry.command.kind](self, entry.command, blocks[entry.block], pending, None)
        prompts = self.steering.prompts
        if prompts and prompts[0][0].block:
            take_up(self.denoiser, pending, blocks[prompts[0][0].block - 1].first)
        for place, (entry, made) in enumerate(prompts):
            if place:
                self.denoiser.replace_text(1)  # the one before rules by now
            _prompt_now(self, entry.command, blocks[entry.block], pending, made)
        return tuple(pending)


def _prompt_now(helm: Helm, command: Command, block: Block, pending: deque[Switch], made: Any) -> None:
    """A steered prompt rules until the next one: what is left of a prompt track is dropped."""
    helm.text = command.text
    helm.denoiser.push_prompt(made)
    pending.clear()
    if command.transition != "soft":
        pending.append(Switch(block.first, 1, transition=command.transition))
        return
    places = [block.first, *(block.end + i * helm.size for i in range(command.blocks - 1))]
    pending.extend(Switch(at, 1, transition="soft", previous=0, weight=i / command.blocks)
                   for i, at in enumerate(places[:-1], 1))
    pending.append(Switch(places[-1], 1, transition="keep"))


def _seed_now(helm: Helm, command: Command, block: Block, pending: deque[Switch], made: Any) -> None:
    helm.noise.change(block.index, command.seed)


def _lora_now(helm: Helm, command: Command, block: Block, pending: deque[Switch], made: Any) -> None:
    if helm.lora is not None:
        helm.lora(command.name, command.strength)


def _stop_now(helm: Helm, command: Command, block: Block, pending: deque[Switch], made: Any) -> None:
    helm.stopping = True


def _nothing(helm: Helm, command: Command, block: Block, pending: deque[Switch], made: Any) -> None:
    """`Steering.boundary` has waited already."""


ACTIONS: dict[str, Callable[[Helm, Command, Block, deque, Any], None]] = {
    "prompt": _prompt_now, "seed": _seed_now, "lora": _lora_now, "pause": _nothing, "resume": _nothing, "stop": _stop_now}
