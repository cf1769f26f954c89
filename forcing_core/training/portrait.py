"""Stage "portrait": a small network that moves a drawn face from one reference picture, driven by a puppet video.

Teacher forcing, all blocks in one forward: [a reference for each block | clean | noisy]. A noisy block is as long as at
inference with a knot: its own frames, and the first of the next. Which parts of Knot Forcing (arXiv 2512.21734) are used is
drawn anew for every step, so that one network can be run with and without each:

- the reference stands ahead of the block, as `policies.reference` places it, or before its window, as a sink does;
- the first frame of a block is given (timestep 0) or not;
- the frame of the next block is there or not.

Histories and given frames are disturbed, by noise and by a shift of their channels, and the network is not told: what it
makes itself is not clean either, and who it is has to come from the reference. Axis legend: B clips, F latent frames.
"""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import ForcingError
from ..micro import face, portrait
from ..micro.bundle import TEXT_DIM
from ..micro.code import LinearCode, fit
from ..noise import mix
from ..schedule import TRAIN_STEPS, table
from ..wan import Ops, TextState, WanConfig, WanModel
from . import history
from .dit import start
from .flow import add_noise, draw_noise
from .network import NetSettings, NetTrainer, pixel_latents
from .parallel import parallel_velocity
from .state import write_whole

BLOCK, KNOT, HISTORY, SHIFT = 3, 1, 6, 5.0
AT_ONCE = 8  # clips painted together
SILENT = Ops(cross_attention=lambda *_: 0.0)  # what the zeros of the prompt's layers give
CLIPS, CODE = 40, 41  # streams of random numbers


@dataclass(frozen=True)
class PortraitSettings(NetSettings):
    """pool: clips that are painted before the first step and used again and again; frames: their length in pixels.
    blocks: of a training sequence. behind: share of steps with the reference before the window; given, alone: shares with
    the first frame given, and without the next block's frame. disturbed: largest deviation of histories.
    """

    layers: int = 2
    batch: int = 4
    steps: int = 2400
    muon_lr: float = 0.02
    average: float = 0.99
    pool: int = 256
    frames: int = 53
    blocks: int = 4
    behind: float = 0.25
    given: float = 0.5
    alone: float = 0.3
    disturbed: float = 0.3
    code_clips: int = 96

    @property
    def config(self) -> WanConfig:
        return portrait.config(self.dim, self.layers)


QUICK = PortraitSettings(layers=1, batch=2, steps=4, pool=8, code_clips=16)


def clips(seed: int, count: int, frames: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(faces, puppets, both [b, 3, frames, 64, 64]; references [b, 3, 1, 64, 64]) of `count` people, a few at a time."""
    for number, first in enumerate(range(0, count, AT_ONCE)):
        size = min(AT_ONCE, count - first)
        who = face.identities(mix(seed, number), size)
        drive = face.eased(face.track(mix(seed, number), size, frames))
        yield face.paint(who, drive), face.driver(drive), face.reference(who)[:, :, None]


def code_of_faces(count: int, seed: int) -> LinearCode:
    """The linear code of faces and puppets; the one of the generated world knows too little of either."""
    return fit(video for faces, puppets, _ in clips(mix(seed, CODE), count, 33) for video in (faces, puppets))


class Draw(NamedTuple):
    """What is drawn for a step: distance of the reference ahead (None: behind), and whether frames are given, or alone."""

    ahead: int | None
    given: bool
    alone: bool


class Layout(NamedTuple):
    """numbers: latent frames of the noisy part. positions: of all frames in time. mask [n, n]."""

    numbers: list[int]
    positions: list[int]
    mask: Tensor


def sequence(blocks: int, draw: Draw) -> Layout:
    """References, then the clean frames of all blocks but the last, then noisy blocks of BLOCK + KNOT frames."""
    firsts = [BLOCK * b for b in range(blocks)]
    begins = [max(0, first - HISTORY) for first in firsts]
    past = list(range(BLOCK * (blocks - 1)))
    numbers = [first + n for first in firsts for n in range(BLOCK + KNOT)]
    ends = [first + BLOCK for first in firsts]
    stands = [begin - 1 for begin in begins] if draw.ahead is None else [end - 1 + draw.ahead for end in ends]
    # (kind, block, frame) of every frame of the sequence
    cells = [("reference", b, None) for b in range(blocks)] + [("clean", f // BLOCK, f) for f in past]
    cells += [("noisy", n // (BLOCK + KNOT), f) for n, f in enumerate(numbers)]

    def sees(query: tuple, key: tuple) -> bool:
        (kind, b, _), (other, c, f) = query, key
        if kind == "reference" or other == "reference":
            return other == "reference" and b == c
        if other == "clean":
            return begins[b] <= f < (ends if kind == "clean" else firsts)[b]
        return kind == "noisy" and b == c and not (draw.alone and f >= ends[b] and query != key)

    mask = torch.tensor([[sees(query, key) for key in cells] for query in cells])
    return Layout(numbers, [place + 1 for place in (*stands, *past, *numbers)], mask)


def disturbed(clean: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Latents [B, C, F, h, w] with noise, and every clip's channels shifted, each up to a deviation of `most`."""
    shift = torch.randn(*clean.shape[:2], 1, 1, 1, generator=generator)
    sizes = most * torch.rand(2, clean.shape[0], 1, 1, 1, 1, generator=generator)
    return clean + sizes[0] * draw_noise(clean, generator) + sizes[1] * shift


def loss(net: WanModel, latents: Tensor, drive: Tensor, reference: Tensor, settings: PortraitSettings, draw: Draw,
         generator: torch.Generator) -> Tensor:
    """Flow-matching error. latents, drive: [B, 16, F, 8, 8] with F = BLOCK * blocks + KNOT; reference [B, 16, 1, 8, 8]."""
    lay, batch, blocks = sequence(settings.blocks, draw), len(latents), settings.blocks
    kept = BLOCK * (blocks - 1)
    clean, noise = latents[:, :, lay.numbers], draw_noise(latents[:, :, lay.numbers], generator)
    rows = torch.randint(TRAIN_STEPS, (batch, blocks), generator=generator).repeat_interleave(BLOCK + KNOT, 1)
    timesteps, sigmas = (values[rows] for values in table(SHIFT))
    counted = torch.ones(len(lay.numbers), dtype=torch.bool)
    worn = disturbed(latents, settings.disturbed, generator)
    noisy = add_noise(clean, noise, sigmas)
    if draw.given:
        firsts = list(range(BLOCK + KNOT, len(lay.numbers), BLOCK + KNOT))
        noisy[:, :, firsts] = worn[:, :, lay.numbers][:, :, firsts]
        timesteps[:, firsts] = 0
        counted[firsts] = False
    if draw.alone:
        counted[BLOCK::BLOCK + KNOT] = False
    x = torch.cat([reference.expand(-1, -1, blocks, -1, -1), worn[:, :, :kept], noisy], 2)
    rest = drive[:, :, :1].expand(-1, -1, blocks, -1, -1)  # a track begins at rest, as the reference is
    x = torch.cat([x, torch.cat([rest, drive[:, :, :kept], drive[:, :, lay.numbers]], 2)], 1)
    before = torch.zeros(batch, blocks + kept)
    text = TextState(torch.zeros(batch, portrait.ROWS, TEXT_DIM))
    velocity = parallel_velocity(net, x, torch.cat([before, timesteps], 1), text, lay.mask, positions=lay.positions,
                                 ops=SILENT)
    error = velocity[:, :, blocks + kept:] - (noise - clean)
    return error[:, :, counted].square().mean()


class PortraitTrainer(NetTrainer):
    """The state of a run and its steps, on the CPU. Raises ForcingError for another device."""

    name, stream, settings_type = portrait.NAME, 42, PortraitSettings
    settings: PortraitSettings

    def __init__(self, settings: PortraitSettings, device: str = "cpu", code: LinearCode | None = None):
        if torch.device(device).type != "cpu":
            raise ForcingError(f"The portrait is trained on the CPU, not on {device}: it is too small for anything else. Leave "
                               "out --device.")
        seed = settings.seed if settings.code_seed is None else settings.code_seed
        super().__init__(settings, "cpu", code or code_of_faces(settings.code_clips, seed))
        self.pool: tuple[Tensor, ...] = ()

    def new_net(self) -> WanModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            net = WanModel(self.settings.config)
            start(net)
        return portrait.silence(net)

    def prepare(self) -> None:
        """Paint the pool: latents, driving latents and references of all clips."""
        made = clips(mix(self.settings.seed, CLIPS), self.settings.pool, self.settings.frames)
        parts = zip(*([self.code.encode(video) for video in videos] for videos in made))
        self.pool = tuple(map(torch.cat, parts))

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; the loss, still on the device."""
        s, generator = self.settings, self.generator()
        chosen = torch.randperm(s.pool, generator=generator)[:s.batch]
        latents, drive, reference = (part[chosen] for part in self.pool)
        length = BLOCK * s.blocks + KNOT
        # half of the steps show the beginning of a video, whose first latent is a single frame
        first = self.clock.total % 2 * (pixel_latents(s.frames) - length)
        u = torch.rand(3, generator=generator).tolist()
        ahead = None if u[0] < s.behind else int(torch.randint(2, 9, (), generator=generator))
        draw = Draw(ahead, u[1] < s.given, u[2] < s.alone)
        cut = slice(first, first + length)
        value = loss(self.net, latents[:, :, cut], drive[:, :, cut], reference, s, draw, generator)
        value.backward()
        self.optimisers["optimiser"].step(self.rate())
        self.average.update(self.net, self.clock.total)
        return self.noted({"loss": value})


def finish(trainer: PortraitTrainer, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write weights, code and report to the folder `out`; returns the report."""
    settings = {"settings": asdict(trainer.settings), "steps": trainer.clock.total}
    state = portrait.state_dict(trainer.finished(), trainer.code)
    data = save({name: value.contiguous() for name, value in state.items()}, {"forcing.training": json.dumps(settings)})
    file = out / f"micro_{trainer.name}.safetensors"
    report = {"stage": trainer.name, **settings, "file": file.name, **facts, "file_bytes": len(data),
              "losses": history.told(trainer.history)}
    write_whole(out / f"{trainer.name}_report.json", (json.dumps(report) + "\n").encode())
    write_whole(file, data)
    return report
