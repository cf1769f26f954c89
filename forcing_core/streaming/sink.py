"""Video files that grow as frames come and play at any moment, also after a crash.

A frame is a uint8 array [H, W, 3], RGB, or a uint16 one where the format is deep. Nothing of what was written is held,
except an index of a few dozen bytes a frame from which a player finds its place in a finished MP4. An MP4 consists of
fragments of about a second, and is turned into an ordinary one when it is closed (by FFmpeg 7.1 or later; before that the
fragments stay, which play too).
"""
from __future__ import annotations

import json
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

from ..errors import ForcingError
from ..media import disk_advice, frame_rate, pyav
from .note import KEY, Note

if TYPE_CHECKING:
    from numpy import ndarray

HYBRID = (61, 7)  # libavformat of FFmpeg 7.1, which makes an ordinary file of the fragments in the end
LAYOUTS = {1: "mono", 2: "stereo"}
SETTLED = 2  # seconds of video behind which a frame that left the encoder is on its way to the disk: two fragments


@dataclass(frozen=True)
class Format:
    """suffix: of the file. pixels: pixel format; halved: whether it stores colour at half the resolution; deep: with 16 bits.
    options: of the codec; container_options: of the file."""

    suffix: str
    codec: str
    pixels: str
    audio: str
    halved: bool = True
    deep: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    container_options: Mapping[str, str] = field(default_factory=dict)


# bf: frames that only look back cost some size, but reach the disk at once. delay_moov: the head of the file is
# written with the first fragment, when it is known by how much sound has to be shifted.
FORMATS = {
    "mp4": Format("mp4", "h264", "yuv420p", "aac",
                  options={"crf": "18", "bf": "0", "rc-lookahead": "16"},
                  container_options={"movflags": "frag_keyframe+delay_moov+default_base_moof+use_metadata_tags"}),
    "webm": Format("webm", "libvpx-vp9", "yuv420p", "libopus",
                   options={"crf": "28", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1",
                            "lag-in-frames": "16"},
                   container_options={"cluster_time_limit": "1000"}),
}
FORMATS |= {name: Format("mkv", "ffv1", pixels, "flac", halved=False, deep=deep, options={"level": "3", "g": "1"},
                         container_options={"cluster_time_limit": "1000", "write_crc32": "0"})
            for name, pixels, deep in (("mkv lossless", "bgr0", False), ("mkv lossless 16 bit", "gbrp16le", True))}


@dataclass(frozen=True)
class Audio:
    """samples: float32 [channels, N] in [-1, 1], one or two channels; rate: samples a second."""

    samples: ndarray
    rate: int


class VideoSink:
    """A video file. Frames go to disk as they come; the file appears with the first one.

    path: without suffix, which the format gives (`path` has it then). fps: frames a second. kind: key of FORMATS.
    metadata: what ComfyUI writes (prompt, workflow); what is no text is stored as JSON. audio: is cut to the length
    of the video. frames: how many were written. Use it as a context manager, or call `close`: until then the newest
    second is not on disk. note: kept among the metadata; `rewrite` changes it. keep: hold frames until they are settled on
    the disk, for `tail`. Raises ForcingError for bad settings, and in `write` and `close` for sizes that cannot be
    stored, a full disk and the like; what is on disk then plays.
    """

    def __init__(self, path: str | Path, fps: float = 16, kind: str = "mp4", *, metadata: Mapping[str, Any] | None = None,
                 audio: Audio | None = None, note: Mapping[str, Any] | None = None, keep: bool = False):
        if kind not in FORMATS:
            raise ForcingError(f"Video format {kind!r} is not known. Use one of {', '.join(FORMATS)}.")
        if audio is not None and len(audio.samples) not in LAYOUTS:
            raise ForcingError(f"Audio with {len(audio.samples)} channels cannot be stored. Use one or two.")
        self.format, self.rate, self.metadata, self.audio = FORMATS[kind], frame_rate(fps), metadata or {}, audio
        self.path = Path(f"{path}.{self.format.suffix}")
        self.frames, self._shape, self._heard = 0, None, 0
        self._container = self._video = self._sound = None
        self._note = None if note is None else Note(dict(note))
        self._encoded, self._tail = 0, deque() if keep else None

    @property
    def seconds(self) -> float:
        return float(self.frames / self.rate)

    def __enter__(self) -> VideoSink:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close(quiet=error is not None)

    def write(self, frames: ndarray) -> None:
        """Append frames, uint8 [T, H, W, 3]; a deep format also takes uint16, and 8 bits exactly."""
        for frame in frames:
            self._check(frame.shape)
            if self.format.deep and frame.dtype == "uint8":
                frame = frame.astype("uint16") * 257
            self._guarded(self._write, frame)

    def rewrite(self, note: Mapping[str, Any]) -> bool:
        """Change the note. Whether it is in the file now: not before that has its first fragment, nor if it is too long."""
        if self._note is None:
            return False
        if self.frames:
            return self._note.write(self.path, dict(note), finished=self._container is None)
        if self._note.fits(dict(note)):
            self._note.value = dict(note)
        return False

    def hear_from(self, frame: int) -> None:
        """Before the first frame: this file begins with frame `frame` of the video, and the sound with its place there."""
        if self.audio is not None:
            self.audio = Audio(self.audio.samples[:, int(frame / self.rate * self.audio.rate):], self.audio.rate)

    def tail(self) -> list[ndarray]:
        """The newest frames, all that may not be on the disk yet; those before them are when this returns."""
        if self.frames:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())  # of what the system still holds, whoever wrote it
        return list(self._tail or ())

    def close(self, quiet: bool = False) -> None:
        """Write what is still in the encoder and finish the file. quiet: raise nothing, another error is on its way."""
        if self._container is None:
            return
        try:
            self._guarded(self._finish)
        except ForcingError:
            if not quiet:
                raise

    def _check(self, shape: tuple[int, ...]) -> None:
        height, width = shape[:2]
        if self._shape is None and self.format.halved and (height % 2 or width % 2):
            raise ForcingError(f"A video of {width}x{height} pixels cannot be stored with halved colour resolution. Use an "
                               "even width and height, or the format 'mkv lossless'.")
        if self._shape not in (None, shape):
            raise ForcingError(f"Frame {self.frames} is {width}x{height}, the first one was {self._shape[1]}x"
                               f"{self._shape[0]}. Give frames of one size.")

    def _guarded(self, step, *args) -> None:
        """Run a step that writes. After an error the file is left as it is on disk."""
        av = pyav()
        try:
            step(*args)
        except (OSError, av.error.FFmpegError) as error:
            container, self._container = self._container, None
            opened = container is not None and self.frames > 0
            _abandon(container, av)
            kept = f"The file stopped growing after {self.seconds:.1f} s and plays up to about there." if opened else \
                "The file was not written."
            raise ForcingError(f"{self.path}: {kept} {disk_advice(self.path, error)}") from error

    def _write(self, frame: ndarray) -> None:
        if self._container is None:
            self._open(frame.shape)
        picture = pyav().VideoFrame.from_ndarray(frame, format="rgb48le" if self.format.deep else "rgb24")
        picture.pts, picture.time_base = self.frames, 1 / self.rate
        packets = self._video.encode(picture)
        self._container.mux(packets)
        self.frames, self._encoded = self.frames + 1, self._encoded + len(packets)
        self._settle(frame)
        self._hear()

    def _settle(self, frame: ndarray) -> None:
        if self._tail is not None:
            self._tail.append(frame)
            settled = self._encoded - round(SETTLED * self.rate)
            while self._tail and self.frames - len(self._tail) < settled:
                self._tail.popleft()

    def _open(self, shape: tuple[int, ...]) -> None:
        if self._shape is not None:
            raise ForcingError(f"{self.path} is closed. Open another file.")
        av, form = pyav(), self.format
        options = {"flush_packets": "1", **form.container_options}
        if form.suffix == "mp4" and av.library_versions["libavformat"] >= HYBRID:
            options["movflags"] += "+hybrid_fragmented"
        self._shape = shape
        self._container = av.open(str(self.path), "w", options=options)
        for key, value in self.metadata.items():
            self._container.metadata[key] = value if isinstance(value, str) else json.dumps(value)
        if self._note is not None:
            self._container.metadata[KEY] = self._note.text
        self._video = self._container.add_stream(form.codec, rate=self.rate, options=dict(form.options))
        self._video.height, self._video.width, self._video.pix_fmt = *shape[:2], form.pixels
        self._video.gop_size = max(1, round(self.rate))  # a fragment starts with a key frame
        self._video.codec_context.time_base = 1 / self.rate
        if self.audio is not None:
            self._sound = self._container.add_stream(form.audio, rate=_codec_rate(form.audio, self.audio.rate))
            self._sound.layout = LAYOUTS[len(self.audio.samples)]
        self._container.start_encoding()

    def _hear(self) -> None:
        """Write the sound up to the end of the pictures."""
        if self.audio is None:
            return
        end = min(self.audio.samples.shape[1], int(self.frames / self.rate * self.audio.rate))
        part = self.audio.samples[:, self._heard:end]
        if part.shape[1]:
            frame = pyav().AudioFrame.from_ndarray(part.copy(), format="fltp", layout=LAYOUTS[len(part)])
            frame.sample_rate, frame.pts = self.audio.rate, self._heard
            self._container.mux(self._sound.encode(frame))
            self._heard = end

    def _finish(self) -> None:
        self._container.mux(self._video.encode(None))
        if self._sound is not None:
            self._container.mux(self._sound.encode(None))
        self._container.close()
        self._container = None
        if self._note is not None:  # the index of an MP4 has the first one again
            self._note.write(self.path, self._note.value, finished=True)


def _codec_rate(codec: str, rate: int) -> int:
    return 48000 if codec == "libopus" else rate


def _abandon(container, av) -> None:
    """Let go of a file that cannot be written to any more."""
    try:
        if container is not None:
            container.close()
    except (OSError, av.error.FFmpegError):
        pass  # the cause is being told
