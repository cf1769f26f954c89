"""The demo: a whole rollout on the CPU, from noise to an MP4, with nothing to download.

By default it runs the trained micro model that comes with the package (`micro.source.MicroSource`). The network of
`RandomSource` has RANDOM weights: its picture is abstract coloured noise and says nothing about quality, only that
schedule, store, window, rollout and video output work on this machine. Any other model is another `Source`.

Axis legend of latents: [B, C, F, h, w]. Pixel frames = 1 + 4 * (latent frames - 1).
"""
from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, Protocol

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from .denoiser import NetworkDenoiser
from .errors import ForcingError
from .media import ContactSheet, check_writers, save_png, write_mp4
from .micro.source import MicroSource
from .noise import BlockNoise
from .options import pixel_frames
from .policies import WindowOptions
from .presets import Preset, get
from .rope import TABLE_ROWS
from .standalone import blocks_of, conditions, latent_size, make_denoiser, preset_rollout, window_options
from .wan import WanConfig
from .wan.random import random_network, random_prompt

if TYPE_CHECKING:
    from numpy import ndarray

FPS = 16  # of every model of the family
LONGEST = 3600.0
Decoder = Callable[[Tensor], Iterator["ndarray"]]


class Source(Protocol):
    """Where network and pictures of a demo come from.

    notice: one sentence on what will be seen. channels: latent channels. size: usual (width, height) in pixels.
    usual_preset: name of the preset for so many latent frames, where none was asked for.
    latent_size: (h, w) of the latent for a picture of that many pixels; ForcingError where there is none.
    denoiser: with empty stores, for `frames` latent frames of (h, w).
    decoder: a new causal decoder: fed x0 [1, C, n, h, w] block by block, it yields uint8 [H, W, 3] frames, one
    for the first latent frame of the video and four for every other one.
    """

    notice: str
    channels: int
    size: tuple[int, int]

    def usual_preset(self, frames: int) -> str: ...

    def latent_size(self, width: int, height: int) -> tuple[int, int]: ...

    def denoiser(self, preset: Preset, options: WindowOptions, frames: int,
                 size: tuple[int, int]) -> NetworkDenoiser: ...

    def decoder(self) -> Decoder: ...


@dataclass(frozen=True)
class RandomSource:
    """A small Wan network with random weights (always the same ones) and a fixed projection to colours."""

    config: WanConfig = WanConfig(dim=192, ffn_dim=384, heads=3, layers=4, text_dim=64, text_len=64)
    size: tuple[int, int] = (256, 144)
    notice: str = ("The weights are random: the picture is abstract coloured noise. It shows that the machinery "
                   "runs, not what a trained model makes.")

    @property
    def channels(self) -> int:
        return self.config.in_channels

    def usual_preset(self, frames: int) -> str:
        """self-forcing for up to 5 s as trained, longlive (window 12, sink 3) to the end of its position table,
        then longlive with relative positions."""
        if frames <= 21:
            return "self-forcing"
        return "longlive" if frames <= TABLE_ROWS else "longlive-infinity"

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        return latent_size(width, height)

    def denoiser(self, preset: Preset, options: WindowOptions, frames: int, size: tuple[int, int]) -> NetworkDenoiser:
        prompts = [random_prompt(self.config, seed) for seed in range(conditions(preset))]
        return make_denoiser(random_network(self.config, 0), options, frames, size, prompts, preset.cfg)

    def decoder(self) -> Decoder:
        return Projection(self.channels)


class Projection:
    """Stands in for a VAE decoder: three orthonormal directions of the latent channels are red, green and blue.

    Patches of 2x2 are averaged and enlarged to 16x16 pixels each; between two latent frames the colours are
    mixed linearly, which makes four pixel frames of one latent frame and needs no look ahead.
    """

    def __init__(self, channels: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.basis = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0][:, :3]
        self._last: Tensor | None = None

    def __call__(self, latents: Tensor) -> Iterator[ndarray]:
        """x0 [1, C, n, h, w] -> uint8 [8h, 8w, 3] frames."""
        colours = torch.einsum("cfhw,ck->fkhw", latents[0].float().cpu(), self.basis)
        for picture in interpolate(2 * avg_pool2d(colours, 2), scale_factor=16, mode="bicubic"):
            between = (1.0,) if self._last is None else (0.25, 0.5, 0.75, 1.0)
            last = picture if self._last is None else self._last
            for part in between:
                yield self._pixels(torch.lerp(last, picture, part))
            self._last = picture

    @staticmethod
    def _pixels(picture: Tensor) -> ndarray:
        return picture.div(2).tanh().add(1).mul(127.5).round().byte().permute(1, 2, 0).contiguous().numpy()


@dataclass(frozen=True)
class DemoOptions:
    """seconds: length of the video at 16 fps, rounded up to a latent frame. preset: name of a preset with the
    window policy, None leaves it to the source. seed: of the noise. size: (width, height) in pixels, None is usual."""

    seconds: float = 5.0
    preset: str | None = None
    seed: int = 0
    size: tuple[int, int] | None = None

    def __post_init__(self):
        if not (math.isfinite(self.seconds) and 0 < self.seconds <= LONGEST):
            raise ForcingError(f"A demo of {self.seconds:g} seconds cannot be made. "
                               f"Use more than 0 and at most {LONGEST:g} seconds.")

    @property
    def frames(self) -> int:
        """Latent frames: the fewest whose pixel frames last `seconds`."""
        return 1 + max(0, math.ceil((self.seconds * FPS - 1) / 4))


@dataclass(frozen=True)
class Progress:
    """After a block: its number from 1, how many there will be, pixel frames so far, pixel frames a second
    (over the whole run), bytes of all stores."""

    block: int
    blocks: int
    frames: int
    fps: float
    store_bytes: int


@dataclass(frozen=True)
class Made:
    """What a demo left. video, sheet: files, None where it was stopped before the first block. frames: pixel
    frames written, of `wanted`."""

    preset: str
    options: WindowOptions
    video: Path | None
    sheet: Path | None
    frames: int
    wanted: int
    seconds: float
    stopped: bool


def make(out: str | Path, options: DemoOptions = DemoOptions(), source: Source | None = None, *,
         stop: Callable[[], bool] = lambda: False, progress: Callable[[Progress], None] = lambda _: None) -> Made:
    """Run the rollout and write the video to `out` (.mp4) and a contact sheet beside it (.png).

    source: what makes the pictures, by default the micro model with its default prompt.
    stop: asked before every forward of the network; once it says True, what has been made is written.
    Raises ForcingError for bad options, an unknown preset and a place that cannot be written to.
    """
    out = _video_path(out)
    check_writers()
    source = source or MicroSource()
    preset = get(source.usual_preset(options.frames) if options.preset is None else options.preset)
    run = _Run(options, preset, source, stop, progress)
    frames = run.pictures()
    first = next(frames, None)
    if first is not None:
        write_mp4(out, chain([first], frames), FPS)
        save_png(run.sheet.image(), out.with_suffix(".png"))
    made = first is not None
    return Made(preset.name, run.window, out if made else None, out.with_suffix(".png") if made else None,
                run.sheet.seen, pixel_frames(options.frames), time.perf_counter() - run.started, run.stopped)


def _video_path(out: str | Path) -> Path:
    path = Path(out)
    if path.suffix.lower() != ".mp4":
        raise ForcingError(f"{path} is not the name of an MP4 file. Let it end with .mp4.")
    if not path.parent.is_dir():
        raise ForcingError(f"The folder {path.parent} does not exist. Make it or choose another one.")
    return path


class _Stopped(Exception):
    pass


class _Run:
    """One demo under way: a generator of pictures that ends early, and cleanly, when it is stopped."""

    def __init__(self, options: DemoOptions, preset: Preset, source: Source, stop: Callable[[], bool],
                 progress: Callable[[Progress], None]):
        self.options, self.preset, self.stop, self.progress = options, preset, stop, progress
        self.window = window_options(preset)
        size = source.latent_size(*(options.size or source.size))
        self.noise = BlockNoise(options.seed, (1, source.channels), size)
        self.denoiser = source.denoiser(preset, self.window, options.frames, size)
        self.decode = source.decoder()
        self.sheet = ContactSheet(fps=FPS)
        self.stopped = False
        self.started = time.perf_counter()

    def pictures(self) -> Iterator[ndarray]:
        blocks = len(blocks_of(self.preset, self.options.frames))
        try:
            for block, latents in preset_rollout(self.preset, _Stoppable(self.denoiser, self.stop),
                                                 self.options.frames, self.noise):
                for picture in self.decode(latents):
                    self.sheet.add(picture)
                    yield picture
                speed = self.sheet.seen / (time.perf_counter() - self.started)
                held = sum(condition.memory.store.nbytes for condition in self.denoiser.conditions)
                self.progress(Progress(block.index + 1, blocks, self.sheet.seen, speed, held))
        except _Stopped:
            self.stopped = True


@dataclass
class _Stoppable:
    """A denoiser that asks before every forward whether to go on."""

    inner: NetworkDenoiser
    stop: Callable[[], bool]

    def __call__(self, *args) -> Tensor | None:
        if self.stop():
            raise _Stopped
        return self.inner(*args)

    def replace_text(self, segment: int) -> None:
        self.inner.replace_text(segment)

    def forget(self) -> None:
        self.inner.forget()
