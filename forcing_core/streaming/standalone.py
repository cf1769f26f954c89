"""A stream without ComfyUI: a model like that of the demo, steered and saved as in the node.

Axis legend of latents: [B, C, F, h, w].
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

from torch import Tensor

from .. import snapshot
from ..errors import ForcingError
from ..files import sweep
from ..noise import BlockNoise
from ..options import first_levels_of, levels_of
from ..plan import Block, layout
from ..policies import build
from ..presets import Preset
from ..rollout import ROLLOUTS, RolloutState
from ..solvers import SOLVERS
from ..standalone import window_options
from ..steering import Entry, Helm, SteeredNoise, Steering
from .endless import ENDLESS, EndlessBlocks
from .recorder import Recorder, saved_log
from .sink import VideoSink


@dataclass(frozen=True)
class StreamOptions:
    """blocks: of the whole video, 0 until it is stopped. seed: of its start. kind: key of FORMATS. save: snapshot to be
    written every `every` blocks, or None. resume: snapshot to go on from, or None. replay: a log. encode: makes of a
    prompt's text what the denoiser takes, or None."""

    blocks: int = 0
    seed: int = 0
    kind: str = "mkv lossless"
    fps: float = 16
    save: Path | None = None
    every: int = 4
    resume: Path | None = None
    replay: tuple[Entry, ...] = ()
    encode: Callable[[str], Any] | None = None


class Stream:
    """One stream of a model to `path` (without suffix). source: a `demo.Source` whose decoder can be saved.

    steering: its mailbox. Iterating over `run` makes the video, a block a step, and closes the file. Raises ForcingError for
    snapshots that do not fit, and like `VideoSink`.
    """

    def __init__(self, source: Any, preset: Preset, path: Path, options: StreamOptions = StreamOptions(), **cache: Any):
        """cache: settings of the memory instead of the preset's own."""
        self.options, self.preset, self.cache = options, preset, window_options(preset, **cache)
        frames = options.blocks * preset.block or ENDLESS
        self.size = source.latent_size(*source.size)
        self.denoiser = source.denoiser(preset, self.cache, frames, self.size)
        self.window = build(self.cache, frames).capacity
        self.blocks = layout(frames, preset.block) if options.blocks else EndlessBlocks(preset.block)
        decoder = source.decoder()
        found = None if options.resume is None else snapshot.load(options.resume)
        if options.resume is not None:
            sweep(options.resume.parent, options.resume.name.__eq__)
        self.identity = snapshot.Identity(snapshot.fingerprint(self.denoiser.net.named_parameters()),
                                          snapshot.settings(self.cache), (1, source.channels, *self.size))
        self.state = RolloutState() if found is None else found.resume(self.identity, self.denoiser)
        self.steering = Steering(options.replay, options.encode)
        self.sink = VideoSink(path, options.fps, options.kind, note={}, keep=options.save is not None)
        self.recorder = Recorder(lambda latents: (frame[None] for frame in decoder(latents)), decoder, self.sink, self.steering)
        self.noise = SteeredNoise(BlockNoise(options.seed, (1, source.channels), self.size))
        self.helm = Helm(self.steering, self.denoiser, self.noise, preset.block)
        if found is not None:
            done = max(block.index for block in (self.state.done[0], *self.state.in_work))
            self.steering.go_on(saved_log(_stream_part(found), done), done)
        self.switches = self.helm.restore(self.blocks, ())
        if found is not None:
            width = source.size[0] * _enlarged(decoder) // self.size[1]
            self.recorder.load(_stream_part(found), self.state.done[1], width)

    def run(self) -> Iterator[tuple[Block, Tensor]]:
        """Yield (block, latents) once its frames are in the file."""
        preset, options = self.preset, self.options
        with self.sink:
            for block, latents in ROLLOUTS[self.cache.rollout](
                    self.denoiser, self.blocks, levels_of(preset), self.noise, first_levels=first_levels_of(preset),
                    block=preset.block, context_timestep=preset.context_timestep, window=self.window,
                    switches=self.switches, solver=SOLVERS[preset.solver], resume=self.state, steer=self.helm):
                self.recorder.write(latents)
                if options.save is not None and (block.index + 1) % options.every == 0:
                    self.save()
                yield block, latents
            self.recorder.note()
        self.steering.close()

    def save(self) -> None:
        """Write the snapshot, between two blocks."""
        packed = snapshot.pack(self.identity, self.denoiser, self.state, seed=self.options.seed)
        snapshot.write(self.options.save, packed | {"stream": self.recorder.state()})


def _enlarged(decoder: Any) -> int:
    return getattr(decoder, "enlarged", 1)


def _stream_part(found: snapshot.Snapshot):
    if "stream" not in found.saved:
        raise ForcingError("This snapshot is of a clip, not of a stream. Choose one that a stream wrote.")
    return found.saved.part("stream")
