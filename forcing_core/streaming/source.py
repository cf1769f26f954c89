"""Frames of a video file at the rate of the model: found by when they are shown, so that variable rates keep their speed.

First the times of all frames are read, which decodes nothing; then only the part that is wanted is decoded, one frame at
a time. A frame is a uint8 array [H, W, 3], RGB, turned as the file says. Times are exact fractions of seconds.
"""
from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Iterator, Sequence

from ..errors import ForcingError
from ..media import frame_rate, pyav

if TYPE_CHECKING:
    from numpy import ndarray

File = str | io.BytesIO
LOAD = "Load a video file that plays (mp4, webm, mkv, mov), or connect images."


@dataclass(frozen=True)
class Shown:
    """times: when each frame of a source appears, rising; end: when the last one disappears."""

    times: tuple[Fraction, ...]
    end: Fraction

    def part(self, start: float = 0.0, duration: float = 0.0) -> Shown:
        """What is seen from `start` on for `duration` seconds (0: to the end). Raises ForcingError for an empty part."""
        begin = self.times[0] + Fraction(start)
        end = min(self.end, begin + Fraction(duration)) if duration else self.end
        times = tuple(t for t in self.times if begin <= t < end)
        if not times:
            raise ForcingError(f"The video has no frame behind second {start:g}. Trim less of it.")
        return Shown(times, end)

    def at(self, fps: float) -> list[int]:
        """The source frame, an index of `times`, for every frame of a video of `fps` frames a second: the nearest one."""
        step, found, index = 1 / frame_rate(fps), [], 0
        now = self.times[0]
        while now + step / 4 < self.end or not found:  # a rounded end makes no frame more
            while index + 1 < len(self.times) and self.times[index + 1] - now <= now - self.times[index]:
                index += 1
            found.append(index)
            now += step
        return found


def constant(frames: int, fps: float) -> Shown:
    """`frames` frames of a constant rate; frame i is at time i / fps. Raises ForcingError for none."""
    if not frames:
        raise ForcingError(f"The video has no frames. {LOAD}")
    step = 1 / frame_rate(fps)
    return Shown(tuple(i * step for i in range(frames)), frames * step)


def shown(file: File) -> Shown:
    """When the frames of a file are shown. Raises ForcingError for what is no video."""
    with _opened(file) as (container, stream):
        times = sorted({_time(packet) for packet in container.demux(stream) if packet.size and not packet.is_discard})
        if not times:
            raise ForcingError(f"The video has no frames. {LOAD}")
        rate = stream.average_rate or stream.guessed_rate or 1
        gap = times[-1] - times[-2] if len(times) > 1 else 1 / Fraction(rate)
        return Shown(tuple(times), times[-1] + gap)


def frames(file: File, times: Sequence[Fraction]) -> Iterator[ndarray]:
    """The frames that are shown at these times (rising, repeated ones allowed). A frame that cannot be decoded is replaced
    by the one before. Raises ForcingError for what is no video, and where nothing can be decoded."""
    with _opened(file) as (container, stream):
        container.seek(int(times[0] / stream.time_base), stream=stream)
        newest, index = None, 0
        for frame in _decoded(container, stream):
            while newest is not None and index < len(times) and times[index] < _time(frame):
                yield _picture(newest)
                index += 1
            if index == len(times):
                return
            newest = frame
        if newest is None:
            raise ForcingError(f"No frame of the video can be decoded. {LOAD}")
        for _ in times[index:]:
            yield _picture(newest)


def rewound(file: File) -> File:
    """The file, to be read from its beginning."""
    if isinstance(file, io.BytesIO):
        file.seek(0)
    return file


class _opened:
    """(container, video stream) of a file, closed at the end."""

    def __init__(self, file: File):
        self.file = file

    def __enter__(self):
        av = pyav()
        try:
            self.container = av.open(rewound(self.file))
        except (OSError, av.error.FFmpegError) as error:
            raise ForcingError(f"The video cannot be opened: {error}. {LOAD}") from error
        if not self.container.streams.video:
            self.container.close()
            raise ForcingError(f"The file has no video stream, only sound or text. {LOAD}")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        return self.container, self.stream

    def __exit__(self, *_) -> None:
        self.container.close()


def _time(part) -> Fraction:
    """When a packet or a frame is shown, in seconds; raw streams without such times have decoding times."""
    stamp = part.pts if part.pts is not None else part.dts or 0
    return stamp * Fraction(part.time_base)


def _decoded(container, stream) -> Iterator:
    """Frames of the stream; broken packets are passed over."""
    broken = pyav().error.InvalidDataError
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except broken:
            continue


def _picture(frame) -> ndarray:
    import numpy

    picture = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return numpy.ascontiguousarray(numpy.rot90(picture, turns)) if turns else picture
