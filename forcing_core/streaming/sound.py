"""The sound of a video file, laid on the clock of its pictures."""
from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from ..errors import ForcingError
from ..media import pyav
from .sink import LAYOUTS, Audio
from .source import LOAD, File, rewound

if TYPE_CHECKING:
    from numpy import ndarray


def sound_of(file: File, begin: Fraction, duration: Fraction) -> Audio | None:
    """What is heard while the pictures from `begin` on are shown, exactly so long, with silence where the file has none;
    None for a file without sound. begin, duration: seconds of the file's own clock (`source.Shown`)."""
    av = pyav()
    try:
        with av.open(rewound(file)) as container:
            if not container.streams.audio:
                return None
            stream = container.streams.audio[0]
            return Audio(_laid(container, stream, begin, duration), stream.rate)
    except (OSError, av.error.FFmpegError) as error:
        raise ForcingError(f"The sound of the video cannot be read: {error}. {LOAD}") from error


def _laid(container, stream, begin: Fraction, duration: Fraction) -> ndarray:
    """float32 [channels, duration * rate]."""
    import numpy

    layout = LAYOUTS[min(2, stream.channels)]
    out = numpy.zeros((min(2, stream.channels), round(duration * stream.rate)), numpy.float32)
    resampler = pyav().AudioResampler("fltp", layout, stream.rate)
    at = None
    for frame in container.decode(stream):
        if at is None:  # what comes before is cut off, what begins later is preceded by silence
            at = round((Fraction(frame.pts or 0) * frame.time_base - begin) * stream.rate)
        for part in resampler.resample(frame):
            wave = part.to_ndarray()
            first, last = max(0, at), min(out.shape[1], at + wave.shape[1])
            if first < last:
                out[:, first:last] = wave[:, first - at:last - at]
            at += wave.shape[1]
        if at >= out.shape[1]:
            break
    return out
