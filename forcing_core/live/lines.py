"""Lines `frame: word word`: how keyframes and actions are written."""
from __future__ import annotations

from ..errors import ForcingError


def entries(text: str, length: int) -> list[tuple[int, list[str]]]:
    """(frame, words) of lines `frame: word word`, '#' starting a comment. Frames have to rise and lie in the video."""
    found: list[tuple[int, list[str]]] = []
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        head, colon, rest = line.partition(":")
        if not colon or not head.strip().isdigit():
            raise ForcingError(f"The line '{line}' does not begin with a frame. Write it like '16: forward' or "
                               "'16: 0 0 1 30 0 0'.")
        frame = int(head)
        if found and frame <= found[-1][0]:
            raise ForcingError(f"Frame {frame} comes after frame {found[-1][0]}. Put the lines in the order of their frames, "
                               "each frame once.")
        if frame >= length:
            raise ForcingError(f"Frame {frame} lies behind the end of a video of {length} frames. Use 0 to {length - 1}, or "
                               "make the video longer.")
        found.append((frame, rest.replace(",", " ").split()))
    return found
