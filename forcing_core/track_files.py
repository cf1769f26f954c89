"""Prompt tracks from text: LongLive's JSONL and a plain form with one prompt a line.

JSONL, as the public repo NVlabs/LongLive reads it: every line is an object {"prompts": [p0, ..., pK]} and one track;
the K latent frames at which prompts change stand elsewhere ("40, 80, 120"), the same for all lines. A line may
carry them itself as "switch_frame_indices", which makes a file complete.

Plain, one track:

    0:00 a cat sits on a wall
    0:10 it jumps down                     the time and the prompt
    20 | cut | a dog in a garden           or with bars, and a transition
    25 | soft 6 | the dog runs             over 6 blocks
    120f | it sleeps                       latent frames

Empty lines and lines that begin with # are skipped. Errors name the line.
"""
from __future__ import annotations

import json
import re
from typing import Sequence

from .errors import ForcingError
from .track import KINDS, SOFT_BLOCKS, Segment, Track

SWITCHES = "switch_frame_indices"
_TIME = re.compile(r"\s*(?:(?P<frames>\d+)f|(?:(?:(?P<h>\d+):)?(?P<m>\d+):)?(?P<s>\d+(?:\.\d+)?)s?)(?=[\s|]|$)\s*")


def read_track(text: str, transition: str = "recache", blocks: int = SOFT_BLOCKS) -> Track:
    """The one track that a text holds, plain or as a JSONL line with its switch frames.

    transition, blocks: of prompts that name none. Raises ForcingError naming the line.
    """
    if text.lstrip().startswith("{"):
        tracks = read_jsonl(text, transition=transition, blocks=blocks)
        if len(tracks) > 1:
            raise ForcingError(f"The text holds {len(tracks)} JSON lines, and each is a video of its own. Leave one of them.")
        return tracks[0]
    return read_script(text, transition, blocks)


def read_script(text: str, transition: str = "recache", blocks: int = SOFT_BLOCKS) -> Track:
    """The track of the plain form. transition, blocks: of lines that name none."""
    track = None
    for number, line in _lines(text):
        if line.startswith("#"):
            continue
        with _Line(number):
            segment = _segment(line, transition, blocks)
            track = Track((segment,)) if track is None else track.then(segment)
    if track is None:
        raise ForcingError("The prompt script is empty. Write one line a prompt: 0 | a red ball rolls along a floor.")
    return track


def read_jsonl(text: str, switch_frames: str | int | Sequence[int] | None = None, transition: str = "recache",
               blocks: int = SOFT_BLOCKS) -> list[Track]:
    """The tracks of LongLive's form, one a line, all with the same number of prompts.

    switch_frames: latent frames of the changes, as numbers or as "40, 80"; lines with some of their own go before.
    """
    tracks: list[Track] = []
    for number, line in _lines(text):
        with _Line(number):
            track = _json_track(line, switch_frames, transition, blocks)
            if tracks and len(track.segments) != len(tracks[0].segments):
                raise ForcingError(f"{len(track.segments)} prompts, but the first line has {len(tracks[0].segments)}. Give "
                                   "all lines the same number.")
            tracks.append(track)
    if not tracks:
        raise ForcingError('The file of prompts is empty. Write one line a video: {"prompts": ["first", "second"]}.')
    return tracks


class _Line:
    """Puts the number of the line in front of every ForcingError."""

    def __init__(self, number: int):
        self.number = number

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, ForcingError):
            raise ForcingError(f"Line {self.number}: {error}") from error


def _lines(text: str) -> list[tuple[int, str]]:
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _segment(line: str, transition: str, blocks: int) -> Segment:
    found = _TIME.match(line)
    if found is None:
        raise ForcingError(f"'{_short(line)}' does not begin with a time. Write for example 5 | {_short(line)}, "
                           "and a long prompt in one line.")
    parts = [part.strip() for part in line[found.end():].removeprefix("|").split("|")]
    if len(parts) > 2:
        raise ForcingError("More than a time, a transition and a prompt. Remove the | inside the prompt.")
    if len(parts) == 2:
        transition, blocks = _transition(parts[0], blocks)
    if not parts[-1]:
        raise ForcingError("There is no prompt behind the time. Write one, or remove the line.")
    frames = found["frames"]
    return Segment(float(frames) if frames else _seconds(found), parts[-1], transition, blocks, bool(frames))


def _seconds(found: re.Match) -> float:
    minutes = int(found["m"] or 0)
    seconds = float(found["s"])
    if (found["m"] and seconds >= 60) or (found["h"] and minutes >= 60):
        raise ForcingError(f"'{found.group().strip()}' is not a time. Write minutes:seconds below 60, or seconds alone.")
    return 3600 * int(found["h"] or 0) + 60 * minutes + seconds


def _transition(words: str, blocks: int) -> tuple[str, int]:
    """("soft", 6) of "soft 6"."""
    name, _, count = words.lower().partition(" ")
    if name not in KINDS or (count and not (name == "soft" and count.strip().isdigit())):
        raise ForcingError(f"'{_short(words)}' is not a transition. Use one of {', '.join(KINDS)}, or soft with a number of "
                           "blocks (soft 6).")
    return name, int(count) if count else blocks


def _json_track(line: str, switch_frames, transition: str, blocks: int) -> Track:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ForcingError(f'This is not JSON ({error.msg} at column {error.colno}). Write {{"prompts": ["first", '
                           '"second"]} in one line.') from error
    prompts = data.get("prompts") if isinstance(data, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ForcingError('There is no list of prompts. Write {"prompts": ["first", "second"]}.')
    frames = _frames(data.get(SWITCHES, switch_frames))
    if len(frames) != len(prompts) - 1:
        raise ForcingError(f"{len(prompts)} prompts need {len(prompts) - 1} switch frames, not {len(frames)}. Give one latent "
                           "frame for every prompt but the first.")
    starts = (0, *frames)
    return Track(tuple(Segment(start, prompt, transition, blocks, frames=True)
                       for start, prompt in zip(starts, prompts, strict=True)))


def _frames(given: str | int | Sequence[int] | None) -> list[int]:
    words = [] if given is None else given.replace(",", " ").split() if isinstance(given, str) else given
    words = [words] if isinstance(words, int) else words
    try:
        return [int(word) for word in words]
    except (TypeError, ValueError) as error:
        raise ForcingError(f"The switch frames {given!r} are not whole numbers. Write for example 40, 80, 120.") from error


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
