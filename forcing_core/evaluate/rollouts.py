"""One batch of videos from captions: sampled block by block, decoded and looked at as it goes.

No more of a video than a block is ever held: its length costs what was measured in it, 3 KB a frame.

Axes: B captions, T frames, K things; latents [B, 16, F, 8, 8], clips [B, T, 3, 64, 64].
"""
from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..denoiser import NetworkDenoiser
from ..micro import bundle, world
from ..micro.observe import Observation, frames_of, observe
from ..micro.temporal import Pixels
from ..micro.vae import Z_DIM, DecodeStream, MicroVAE
from ..noise import BlockNoise
from ..plan import Block
from ..policies import build, replayed_frames
from ..rollout import Switch
from ..standalone import blocks_of, conditions, latent_size, make_denoiser, preset_rollout
from ..wan import WanModel
from .settings import Setting

if TYPE_CHECKING:
    from numpy import ndarray

LATENT = latent_size(*bundle.SIZE)
CELLS = 8  # pictures of a setting on the contact sheet
Tick = Callable[[int, int], None]  # (blocks done, blocks)


class Models:
    """The VAE and the networks of a folder, each read once. Raises ForcingError where a file is missing."""

    def __init__(self, folder: Path, networks: Iterable[str]):
        self.folder = folder
        self.nets: dict[str, WanModel] = {name: bundle.network(name, folder) for name in dict.fromkeys(networks)}
        self.vae: MicroVAE = bundle.vae(folder)
        for weight in self.vae.parameters():  # a quarter faster on a CPU
            if weight.dim() == 5:
                weight.data = weight.data.to(memory_format=torch.channels_last_3d)


@dataclass(frozen=True)
class Turn:
    """A prompt switch: from block number `block` on the clips follow `captions`, one a clip."""

    block: int
    captions: Sequence[str]


@dataclass
class Made:
    """What a rollout left. sizes: latent frames of every block. seen, pixels: measurements of the frames looked at, with a
    prompt switch those from the first block after it on. tiles: pictures uint8 [H, W, 3] of the first clip, at the frames
    `cells`. times: seconds of sampling for each block, all clips together. store_bytes: most that the stores held, all
    clips together.
    """

    cells: Sequence[int] = ()
    sizes: list[int] = field(default_factory=list)
    seen: list[Observation] = field(default_factory=list)
    pixels: Pixels = field(default_factory=Pixels)
    tiles: list[ndarray] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    store_bytes: int = 0

    def look(self, part: Tensor, things: int = 1) -> None:
        """At the next frames [B, t, 3, H, W] in [-1, 1]."""
        first = self.pixels.frames
        self.seen.append(observe(part, things))
        self.pixels.push(part)
        here = [frame - first for frame in self.cells if first <= frame < first + part.shape[1]]
        shades = part[0, here].float().add(1).mul(127.5).round().byte()
        self.tiles += list(shades.permute(0, 2, 3, 1).numpy())

    @property
    def observation(self) -> Observation:
        return Observation(**{f.name: torch.cat([getattr(part, f.name) for part in self.seen], 1)
                              for f in fields(Observation)})

    @property
    def seconds_per_block(self) -> float:
        """The median; the first block, which also warms up, counts only where there is no other."""
        return median(self.times[1:] or self.times)


def times(frames: int) -> list[int]:
    """CELLS evenly spaced ones of so many frames, first and last included."""
    return [round(cell * (frames - 1) / (CELLS - 1)) for cell in range(CELLS)]


def latent_frames(seconds: float, block: int) -> int:
    """Latent frames in whole blocks that last `seconds` at least."""
    needed = 1 + max(0, math.ceil((seconds * world.FPS - 1) / 4))
    return -(-needed // block) * block


def _denoiser(setting: Setting, net: WanModel, captions: Sequence[str], frames: int, turn: Turn | None) -> NetworkDenoiser:
    """Guided settings have a second condition without a caption."""
    prompts = [bundle.prompt(captions), bundle.prompt([""] * len(captions))][:conditions(setting.preset)]
    denoiser = make_denoiser(net, setting.cache(), frames, LATENT, prompts, setting.preset.cfg)
    if turn is not None:
        later = [bundle.prompt(turn.captions), *prompts[1:]]
        for condition, before, after in zip(denoiser.conditions, prompts, later, strict=True):
            condition.prompts = [before, after]
    return denoiser


def _switching(setting: Setting, blocks: Sequence[Block], turn: Turn | None) -> dict:
    """Settings of the rollout that make the switch, in the way of the setting's system."""
    if turn is None:
        return {}
    renew = setting.preset.recache and not setting.preset.global_sink
    return {"switches": (Switch(blocks[turn.block].first, 1, renew_sink=renew, transition=setting.transition),)}


def _timed(items: Iterator, times: list[float]) -> Iterator:
    while True:
        begin = time.perf_counter()
        item = next(items, None)
        if item is None:
            return
        times.append(time.perf_counter() - begin)
        yield item


@torch.no_grad()
def roll(models: Models, setting: Setting, captions: Sequence[str], frames: int, seed: int, tick: Tick,
         turn: Turn | None = None, things: int = 1) -> Made:
    """Videos of `frames` latent frames, one a caption; `tick` is called after every block and may raise to stop.

    The noise depends on seed and number of captions alone, so that settings are compared on the same draws. Raises
    ForcingError where the setting cannot make that length or, with a turn, cannot switch.
    """
    blocks, stream = blocks_of(setting.preset, frames), DecodeStream(models.vae)
    made = Made(times(4 * frames - 3) if turn is None else ())
    denoiser = _denoiser(setting, models.nets[setting.network], captions, frames, turn)
    noise = BlockNoise(seed, (len(captions), Z_DIM), LATENT)
    steps = preset_rollout(setting.preset, denoiser, frames, noise, **_switching(setting, blocks, turn),
                           window=replayed_frames(build(setting.cache(), frames)))
    for block, latents in _timed(steps, made.times):
        part = frames_of(stream.push(latents).clamp_(-1, 1))
        if turn is None or block.index >= turn.block:
            made.look(part, things)
        made.sizes.append(block.frames)
        held = sum(condition.memory.store.nbytes for condition in denoiser.conditions)
        made.store_bytes = max(made.store_bytes, held)
        tick(block.index + 1, len(blocks))
    return made
