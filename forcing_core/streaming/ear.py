"""A voice that arrives in pieces while a stream runs: it moves what is driven by it, and is heard in the file.

Pieces wait until the frames come to which they are given, one after the other: a stream that is slower than life falls
behind its speaker, and one that is faster gets silence in between. What a frame was given stays its own, so a pass that
goes back, and the file, find the same again.
"""
from __future__ import annotations

import io
import threading
import wave
from typing import TYPE_CHECKING

from ..errors import ForcingError
from ..steering import Refused

if TYPE_CHECKING:
    from numpy import ndarray

RATE = 16000  # samples a second
MOST = 10 * RATE  # samples that may wait
KEPT = 120 * RATE  # samples that are remembered behind the newest ones
LOUD = 0.1  # RMS of an open mouth, until something louder was heard
FADE = 0.998  # what is left of the loudest after a frame
SMOOTH = 5  # frames over which loudness is taken
SPEEDS = (8000, 48000)


def pcm_of(body: bytes, rate: int = RATE) -> ndarray:
    """float32 [n] at RATE of a WAV file, or of plain 16-bit little-endian mono samples at `rate`. Raises ForcingError for
    what is neither."""
    import numpy

    channels = 1
    if body[:4] == b"RIFF":
        try:
            with wave.open(io.BytesIO(body)) as file:
                channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
                body = file.readframes(file.getnframes())
        except (wave.Error, EOFError) as error:
            raise ForcingError(f"This WAV cannot be read ({error}). Send 16-bit PCM.") from error
        if width != 2:
            raise ForcingError(f"This WAV has {8 * width} bits a sample. Send 16-bit PCM.")
    if not SPEEDS[0] <= rate <= SPEEDS[1]:
        raise ForcingError(f"{rate} samples a second are not taken. Send {SPEEDS[0]} to {SPEEDS[1]}, best {RATE}.")
    if len(body) % (2 * channels):
        raise ForcingError("The samples end in the middle of one. Send whole 16-bit samples.")
    samples = numpy.frombuffer(body, "<i2").reshape(-1, channels).mean(1, dtype=numpy.float32) / 32768
    if rate == RATE or not len(samples):
        return samples
    places = numpy.arange(round(len(samples) * RATE / rate)) * (rate / RATE)
    return numpy.interp(places, numpy.arange(len(samples)), samples).astype(numpy.float32)


class Full(Refused):
    """Too much waits: the same piece may be sent again later."""


class Ear:
    """The voice of one stream. fps: its frames a second. As `samples` of an `Audio` it is what the frames were given.

    From any thread. Raises Refused where nothing is taken any more, or not now.
    """

    def __init__(self, fps: float):
        import numpy

        self.fps, self.shape = fps, (1, 1 << 62)
        self._waiting = numpy.zeros(0, numpy.float32)
        self._given = numpy.zeros(0, numpy.float32)  # the newest samples that frames were given
        self._opening: list[float] = []  # of their frames
        self._frames, self._dropped, self._loudest, self._ended = 0, 0, LOUD, False
        self._lock = threading.Lock()

    def push(self, samples: ndarray, end: bool = False) -> dict:
        """The next piece, float32 [n] at RATE in -1..1; end: the last one. Returns {"waiting": seconds that wait}."""
        import numpy

        with self._lock:
            if self._ended:
                raise Refused("This voice has ended. Start the stream again to speak to it.")
            if len(self._waiting) + len(samples) > MOST:
                raise Full(f"{len(self._waiting) / RATE:.1f} s of sound wait already, and at most {MOST // RATE} s may. "
                           "Send the piece again when the stream has come to them, or a smaller one.")
            self._waiting = numpy.concatenate([self._waiting, samples])
            self._ended = end
            return {"waiting": round(len(self._waiting) / RATE, 3)}

    def close(self) -> None:
        """The stream is over."""
        with self._lock:
            self._ended, self._waiting = True, self._waiting[:0]

    def opening(self, first: int, frames: int) -> list[float]:
        """How far a mouth is open, 0 .. 1, in frames first .. of the video. New frames are given what waits."""
        with self._lock:
            while self._frames < first + frames:
                self._give()
            gone = self._frames - len(self._opening)
            return [self._opening[frame - gone] if frame >= gone else 0.0 for frame in range(first, first + frames)]

    def _give(self) -> None:
        import numpy

        self._frames += 1
        count = self._at(self._frames) - self._at(self._frames - 1)
        part, self._waiting = self._waiting[:count], self._waiting[count:]
        part = numpy.pad(part, (0, count - len(part)))
        self._given = numpy.concatenate([self._given, part])
        power = float(numpy.sqrt(numpy.square(self._given[-SMOOTH * count:]).mean()))
        self._loudest = max(LOUD, self._loudest * FADE, power)
        self._opening.append(power / self._loudest)
        if len(self._given) > KEPT + RATE:  # a second at a time
            self._dropped += len(self._given) - KEPT
            self._given, self._opening = self._given[-KEPT:], self._opening[-int(KEPT / RATE * self.fps):]

    def _at(self, frame: int) -> int:
        """The first sample of a frame."""
        return int(frame * RATE / self.fps)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: tuple[slice, slice]) -> ndarray:
        """[1, n]: samples start .. stop of the video, silence where no frame was given any."""
        import numpy

        start, stop = place[1].start or 0, place[1].stop
        with self._lock:
            out = numpy.zeros((1, stop - start), numpy.float32)
            first, last = max(start, self._dropped), min(stop, self._dropped + len(self._given))
            if first < last:
                out[0, first - start:last - start] = self._given[first - self._dropped:last - self._dropped]
        return out
