"""Frames to files: an MP4 writer and a contact sheet. Both take frames one at a time and hold no video.

A frame is a uint8 array [H, W, 3], RGB. PyAV and Pillow are imported when they are needed, so that the rest
of the core works without them.
"""
from __future__ import annotations

import errno
import importlib
import os
import uuid
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator

from .errors import ForcingError

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image

CRF = 18  # x264 quality at which compression is not seen
WRITERS = {"numpy": "numpy", "pillow": "PIL", "av": "av"}  # package -> module
PAPER, INK = (250, 250, 248), (40, 40, 44)


def pyav():
    """The module av; ForcingError where PyAV is not installed."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ForcingError("Writing an MP4 needs PyAV. Install it with 'pip install av'.") from error
    return av


def pillow():
    """(Image, ImageDraw, ImageFont) of Pillow; ForcingError where it is not installed."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ModuleNotFoundError as error:
        raise ForcingError("Drawing pictures needs Pillow. Install it with 'pip install pillow'.") from error
    return Image, ImageDraw, ImageFont


def check_writers() -> None:
    """Raise ForcingError, before long work begins, where something is not installed that its pictures and videos need."""
    missing = [name for name, module in WRITERS.items() if not _installed(module)]
    if missing:
        raise ForcingError(f"Writing pictures and videos needs {' and '.join(missing)}. Install what is missing with "
                           f"'pip install {' '.join(missing)}', or the pack with 'pip install \".[demo]\"'.")


def _installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return True


def font(size: int):
    """Pillow's built-in scalable font, so that no font file has to be found."""
    _, _, fonts = pillow()
    try:
        return fonts.load_default(size)
    except (TypeError, ImportError) as error:  # before 10.1 it took no size; without FreeType it has none
        raise ForcingError("This Pillow has no scalable font. Update it with 'pip install -U pillow'.") from error


def write_mp4(path: str | Path, frames: Iterable[ndarray], fps: float = 16, *, crf: int = CRF) -> int:
    """Encode frames (uint8 [H, W, 3], even H and W) as H.264 yuv420p at a constant rate; returns their number.

    The file appears only when it is complete: it is written beside its place and then moved there. What a
    failing or interrupted `frames` raises passes through and leaves nothing behind. Raises ForcingError for no
    frames, odd or changing sizes, a full disk, a folder that is missing or read-only, and without PyAV.
    """
    path, frames = Path(path), iter(frames)
    first = _first(frames, path)
    av = pyav()
    temporary = _temporary(path)
    try:
        try:
            count = _encode(av, temporary, chain([first], frames), first.shape, frame_rate(fps), crf)
            os.replace(temporary, path)
        except OSError as error:
            raise _trouble(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _first(frames: Iterator[ndarray], path: Path) -> ndarray:
    first = next(frames, None)
    if first is None:
        raise ForcingError(f"There are no frames to write to {path.name}. Make at least one.")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise ForcingError(f"A video of {width}x{height} pixels cannot be stored with halved colour resolution. "
                           "Use an even width and height.")
    return first


def frame_rate(fps: float) -> Fraction:
    """Frames a second as the fraction that a container stores; ForcingError outside of 0..1000."""
    if not 0 < fps <= 1000:
        raise ForcingError(f"A frame rate of {fps} makes no sense. Use a number between 1 and 1000; Wan has 16.")
    return Fraction(fps).limit_denominator(1001)


def _temporary(path: Path) -> Path:
    """A new empty file in the target's folder: a move inside one file system is atomic."""
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.open("xb").close()
    except OSError as error:
        raise _trouble(path, error) from error
    return temporary


def disk_advice(path: Path, error: OSError) -> str:
    """What went wrong with a file and what to do about it, in two sentences."""
    fixes = {
        errno.ENOSPC: "The disk is full. Free some space or choose another place.",
        errno.EDQUOT: "The disk quota is used up. Free some space or choose another place.",
        errno.EFBIG: "Files on this disk may not be larger. Choose another place.",
        errno.ENOENT: f"The folder {path.parent} does not exist. Make it or choose another one.",
        errno.ENOTDIR: f"{path.parent} is not a folder. Choose another place.",
        errno.EISDIR: "There is a folder of that name. Choose another name.",
        errno.EACCES: f"The folder {path.parent} may not be written to. Choose another one.",
        errno.EROFS: f"The folder {path.parent} may not be written to. Choose another one.",
    }
    return fixes.get(error.errno, f"{error.strerror or error}. Check the place or choose another one.")


def _trouble(path: Path, error: OSError) -> ForcingError:
    return ForcingError(f"{path} was not written. {disk_advice(path, error)}")


def _encode(av, path: Path, frames: Iterable[ndarray], shape: tuple[int, ...], rate: Fraction, crf: int) -> int:
    height, width = shape[:2]
    count = 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("h264", rate=rate, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = 1 / rate
        for array in frames:
            if array.shape != shape:
                raise ForcingError(f"Frame {count} is {array.shape[1]}x{array.shape[0]}, the first one was "
                                   f"{width}x{height}. Give frames of one size.")
            picture = av.VideoFrame.from_ndarray(array, format="rgb24")
            picture.pts, picture.time_base = count, 1 / rate
            container.mux(stream.encode(picture))
            count += 1
        container.mux(stream.encode(None))
    return count


class ContactSheet:
    """Collects evenly spaced frames of a video whose length need not be known, as small pictures.

    Every `stride`-th frame is kept; when there are more than `cells`, every other one is dropped and the
    stride doubles. So between half of the cells and all of them are filled.
    """

    def __init__(self, columns: int = 4, cells: int = 12, *, fps: float = 16, width: int = 240):
        """width: pixels a picture. Raises ForcingError for less than one column or cell."""
        if columns < 1 or cells < 1 or width < 1:
            raise ForcingError(f"A sheet of {cells} pictures in {columns} columns, {width} pixels wide, is empty. "
                               "Use at least 1 of each.")
        self.columns, self.cells, self.fps, self.width = columns, cells, fps, width
        self.seen, self.stride = 0, 1
        self._kept: list[tuple[int, Image]] = []

    def add(self, frame: ndarray) -> None:
        """Show the sheet the next frame, uint8 [H, W, 3]."""
        if self.seen % self.stride == 0:
            height = max(1, round(self.width * frame.shape[0] / frame.shape[1]))
            self._kept.append((self.seen, pillow()[0].fromarray(frame).resize((self.width, height))))
        self.seen += 1
        if len(self._kept) > self.cells:
            self._kept = self._kept[::2]
            self.stride *= 2

    def image(self) -> Image:
        """The sheet, RGB, with the time of every picture under it. Raises ForcingError before the first frame."""
        if not self._kept:
            raise ForcingError("There are no frames for a contact sheet. Make at least one.")
        image, draw, _ = pillow()
        height = max(picture.height for _, picture in self._kept)
        columns = min(self.columns, len(self._kept))
        rows, gap, line, text = -(-len(self._kept) // columns), 8, 20, font(13)
        sheet = image.new("RGB", (columns * (self.width + gap) + gap, rows * (height + gap + line) + gap), PAPER)
        pen = draw.Draw(sheet)
        for place, (number, picture) in enumerate(self._kept):
            x = gap + place % columns * (self.width + gap)
            y = gap + place // columns * (height + gap + line)
            sheet.paste(picture, (x, y))
            pen.text((x, y + height + 3), f"{number / self.fps:.2f} s   frame {number}", INK, font=text)
        return sheet


def contact_sheet(frames: Iterable[ndarray], columns: int = 4, cells: int = 12, *, fps: float = 16,
                  width: int = 240) -> Image:
    """A sheet of at most `cells` evenly spaced frames (uint8 [H, W, 3]) with their times, as a Pillow image."""
    sheet = ContactSheet(columns, cells, fps=fps, width=width)
    for frame in frames:
        sheet.add(frame)
    return sheet.image()


def save_png(image: Image, path: str | Path) -> None:
    """Save a picture as PNG, complete or not at all. Raises ForcingError like `write_mp4`."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        try:
            image.save(temporary, format="PNG")
            os.replace(temporary, path)
        except OSError as error:
            raise _trouble(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
