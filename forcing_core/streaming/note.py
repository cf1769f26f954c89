"""A text in a video file that may still change while the file grows: what was done to a stream, in its metadata.

A container's metadata is written before the first frame, when nothing is known yet. So a note is a text of a fixed length
among it - JSON, padded with spaces - and is written over in place, in the file's first megabytes whenever something
happens, and in the index that an MP4 gets at its end. Players see an ordinary piece of metadata.
"""
from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any, BinaryIO, Iterator

from ..media import pyav

KEY = "forcing"
ROOM = 1 << 16  # bytes of a note
HEAD = 16 << 20  # where in a file the metadata are that come before the first frame
STEP = 1 << 20


class Note:
    """The note of one file, which says `value`."""

    def __init__(self, value: dict[str, Any]):
        """value: what it says at first."""
        self.mark = uuid.uuid4().hex
        self.value, self._place = value, None

    @property
    def text(self) -> str:
        """What is to be stored as the file's metadata KEY."""
        return self._padded(self.value)

    def fits(self, value: dict[str, Any]) -> bool:
        return len(self._padded(value)) <= ROOM

    def write(self, path: Path, value: dict[str, Any], finished: bool = False) -> bool:
        """Replace it in a file that has been begun. finished: nobody writes to the file any more. False where it is too long,
        is not on the disk yet, or the file cannot be changed; what the file said stays then."""
        if not self.fits(value):
            return False
        self.value, places = value, []
        try:
            with open(path, "r+b") as file:
                for place in self._places(file, finished):
                    places.append(place)
                    file.seek(place)
                    file.write(self.text.encode())
        except OSError:
            return False
        return bool(places)

    def _padded(self, value: dict[str, Any]) -> str:
        text = json.dumps({"mark": self.mark, **value})
        return text[:-1] + " " * (ROOM - len(text)) + "}"

    def _places(self, file: BinaryIO, finished: bool) -> Iterator[int]:
        if self._place is None:
            self._place = _find(file, self._start, 0, HEAD)
        if self._place is not None:
            yield self._place
        if finished:
            for begin, end in _indices(file):
                place = _find(file, self._start, begin, end)
                if place not in (None, self._place):
                    yield place

    @property
    def _start(self) -> bytes:
        return json.dumps({"mark": self.mark})[:-1].encode()


def _find(file: BinaryIO, wanted: bytes, begin: int, end: int) -> int | None:
    """Where in a part of a file these bytes begin."""
    rest, at = b"", begin
    file.seek(begin)
    while at < end and (more := file.read(min(STEP, end - at))):
        found = (rest + more).find(wanted)
        if found >= 0:
            return at - len(rest) + found
        rest, at = (rest + more)[1 - len(wanted):], at + len(more)
    return None


def _indices(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(begin, end) of every "moov" box of an MP4; none in other files."""
    size = file.seek(0, os.SEEK_END)
    at = 0
    while at + 16 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        length = int.from_bytes(head[8:], "big") if length == 1 else length or size - at
        if length < 8 or not head[4:8].isalnum():
            return
        if head[4:8] == b"moov":
            yield at, at + length
        at += length


def read_note(path: str | Path) -> dict[str, Any]:
    """What the note of a video file says; nothing where it has none."""
    with pyav().open(str(path)) as container:
        found = {key.lower(): value for key, value in container.metadata.items()}.get(KEY)
    value = json.loads(found) if found else {}
    value.pop("mark", None)
    return value
