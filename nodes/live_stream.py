"""LIVE as a stream: a world that goes on from a picture while keys steer it, shown and written frame by frame."""
from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import Any, Iterator

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ..forcing_core.live import ActionTrack, CameraPath, CameraTrack, LiveDenoiser, live_rollout
from ..forcing_core.live.driving import KINDS, ActionDrive, LiveHelm, Pace
from ..forcing_core.live.rollout import context_noise
from ..forcing_core.micro.live import STEPS
from ..forcing_core.noise import BlockNoise
from ..forcing_core.steering import SteeredNoise, Steering, read_log
from ..forcing_core.streaming import ENDLESS, FORMATS, VideoSink
from ..forcing_core.streaming.live import Live as Shown
from ..forcing_core.streaming.live import kept_ranges
from ..forcing_core.streaming.recorder import Recorder
from .common import CATEGORY
from .desk import identity, used_bytes
from .live import Drive, Live, LiveModels, frames_of, start_pictures
from .routes import STREAMS
from .stream_files import log_beside, metadata, new_file, stores_metadata

log = logging.getLogger(__name__)
POLICY = "LIVE"


class LivePlay:
    """One video of a world that is steered. start: pictures [M, H, W, 3]; new: frames behind them, or ENDLESS. script: a log
    to be replayed. Raises ForcingError for a checkpoint that no keys drive, and for logs that do not belong to it."""

    def __init__(self, live: LiveModels, start: Tensor, track: ActionTrack | CameraPath | None, new: int, seed: int, steps: int,
                 window: int, pace: Pace, script: tuple):
        config, device = live.config, live.network.load_device
        prepared = CameraTrack(track, config.latent) if isinstance(track, CameraPath) else track
        self.live, self.start, self.new, self.steps = live, start, new, steps
        self.drive = ActionDrive(config, start.shape[0] + new, prepared)
        self.noise = SteeredNoise(BlockNoise(seed, (1, config.channels), config.latent, device))
        self.steering = Steering(script, kinds=KINDS, check=self._check, pixels=lambda frame: frame)
        self.denoiser = LiveDenoiser(live.network.model, self.drive, self.noise, context_noise(config, steps),
                                     min(window, config.window), live.dtype)
        alive = mm.throw_exception_if_processing_interrupted
        self.helm = LiveHelm(self.steering, self.drive, self.noise, pace, alive)

    def frames(self) -> Iterator[tuple[int, Tensor]]:
        """(index of the block, pictures float32 [n, H, W, 3] in 0..1) of what is made. The models have to be loaded."""
        autoencoder = self.live.autoencoder.model
        given = autoencoder.encode((2 * self.start - 1).movedim(-1, 1).to(self.live.network.load_device)).float()
        self.drive.decide(self.start.shape[0])
        made = live_rollout(self.live.network.model, self.drive, given.movedim(0, 1)[None], self.new, self.noise,
                            steps=self.steps, dtype=self.live.dtype, denoiser=self.denoiser, steer=self.helm)
        for block, latents in made:
            mm.throw_exception_if_processing_interrupted()
            yield block.index, frames_of(autoencoder.decode(latents[0].movedim(0, 1)))

    def numbers(self) -> dict[str, Any]:
        """What the state of the stream shows beside frames and commands."""
        config = self.live.config
        return {"seed": self.noise.seed, "store_bytes": self.denoiser.nbytes, "memory_bytes": used_bytes(),
                "window": {"kept": kept_ranges(self.denoiser.held), "policy": POLICY},
                "drive": {"actions": list(self.drive.names), "held": self.drive.held, "together": config.actions is None}}

    def _check(self, command) -> None:
        if command.kind == "drive":
            self.drive.read(command.held)


@contextmanager
def on_air(shown: Shown) -> Iterator[None]:
    """Everybody sees the stream meanwhile, and how it ended."""
    STREAMS.begin(shown)
    error = None
    try:
        yield
    except mm.InterruptProcessingException:
        raise
    except BaseException as raised:
        error = str(raised) or type(raised).__name__
        raise
    finally:
        shown.steering.close()
        shown.over(error)


def new_frames(seconds: float, fps: float) -> int:
    return max(1, round(seconds * fps)) if seconds else ENDLESS


@torch.inference_mode()
def record(play: LivePlay, recorder: Recorder) -> None:
    """Make the video. An interrupt ends it; only before the first new frame it is passed on."""
    live, progress = play.live, comfy.utils.ProgressBar(play.new) if play.new < ENDLESS else None
    mm.load_models_gpu([live.network, live.autoencoder])
    recorder.write(play.start)
    try:
        for index, pictures in play.frames():
            recorder.write(pictures)
            recorder.live.wrote(index, recorder.frames, **play.numbers())
            if progress is not None:
                progress.update(len(pictures))
    except mm.InterruptProcessingException:
        if recorder.frames == play.start.shape[0]:
            raise
    recorder.note()


def pixels(pictures: Tensor, deep: bool = False):
    """uint8, or uint16 where deep, [n, H, W, 3] of pictures in 0..1."""
    most, dtype = (65535, torch.uint16) if deep else (255, torch.uint8)
    return pictures.mul(most).round().to(dtype).cpu().numpy()


class ForcingLiveStream(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingLiveStream",
            display_name="Forcing LIVE Stream",
            category=CATEGORY,
            description="A world that you steer while it is made: arrow keys, the pad of the panel, or a gamepad. Every frame "
                        "is shown and written at once, and what was pressed can be replayed.",
            search_aliases=["world model", "game", "interactive video", "keyboard", "gamepad", "play"],
            is_output_node=True,
            inputs=[
                Live.Input("live", tooltip="From Forcing LIVE Checkpoint: one that actions drive, such as the micro LIVE."),
                io.Image.Input("image", tooltip="Start picture, or a clip to go on from. For the micro LIVE: Forcing Micro "
                                              "World."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="The same seed, picture and keys give the same video."),
                io.Float.Input("length", default=0.0, min=0.0, max=1000000.0, step=0.5,
                               tooltip="Seconds that are made after the start picture. 0: until Stop or Cancel."),
                io.Float.Input("fps", default=8.0, min=1.0, max=120.0, step=1.0,
                               tooltip="Frames a second: 8 for the micro LIVE, 15 for the published ones."),
                io.Boolean.Input("real_time", default=True,
                                 tooltip="Make no frame before its time, so that keys act on what is on the screen. Off: as "
                                         "fast as the machine can, for replays."),
                io.String.Input("filename_prefix", default="video/Forcing", tooltip="Name in ComfyUI's output folder."),
                io.Combo.Input("format", options=list(FORMATS), default="mp4",
                               tooltip="mp4 (H.264) plays everywhere, webm (VP9) is smaller and slower to write, mkv lossless "
                                       "(FFV1) keeps every bit and plays in most players, but not in the browser. 16 bit: "
                                       "for editing, 16 bits a colour instead of 8, in files several times as large."),
                io.Int.Input("steps", default=STEPS, min=2, max=1000, advanced=True,
                             tooltip="Solver steps of a frame: 18 as published, 3 for the micro LIVE. Fewer answer sooner."),
                io.Int.Input("window", default=32, min=2, max=32, advanced=True,
                             tooltip="Frames that are seen at once, the new one included; at most as many as trained (the "
                                     "micro LIVE: 8)."),
                Drive.Input("track", optional=True,
                            tooltip="From Forcing Action Track: drives until the first key is pressed. Behind its end "
                                    "nothing is held."),
                io.String.Input("replay", default="", multiline=True, optional=True, advanced=True,
                                tooltip="The log of a steered stream (JSON, from the panel or the file's metadata): presses "
                                        "the same keys at the same frames. Empty: nothing."),
            ],
            outputs=[io.Video.Output(tooltip="The written file.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, live, image, seed, length, fps, real_time, filename_prefix, format, steps=STEPS, window=32, track=None,
                replay="") -> io.NodeOutput:
        start, hidden = start_pictures(image, live.config), cls.hidden
        pace = Pace(fps if real_time else 0, mm.throw_exception_if_processing_interrupted)
        play = LivePlay(live, start, track, new_frames(length, fps), seed, steps, window, pace, read_log(replay))
        path, subfolder = new_file(filename_prefix, *live.config.picture)
        sink = VideoSink(path, fps, format, metadata=metadata(hidden), note={} if stores_metadata() else None)
        shown = Shown(*identity(hidden.unique_id), fps, play.steering, policy=POLICY, numbers=play.numbers())
        shown.file = {"filename": sink.path.name, "subfolder": subfolder, "type": "output", "format": sink.format.suffix}
        play.steering.changed = shown.changed
        recorder = Recorder(lambda pictures: iter([pixels(pictures, sink.format.deep)]), None, sink, play.steering, shown)
        with on_air(shown), sink:
            record(play, recorder)
        if stores_metadata() and not recorder.note():
            log_beside(sink.path, recorder)
        log.info("%.1f s of video are in %s.", sink.seconds, sink.path)
        saved = ui.SavedResult(sink.path.name, subfolder, io.FolderType.output)
        return io.NodeOutput(InputImpl.VideoFromFile(str(sink.path)), ui=ui.PreviewVideo([saved]))
