"""A prompt track: which prompt rules when, and how one takes over from the other.

A track is data that knows nothing of networks: its prompts are whatever the caller puts in (text, embeddings, numbers).
`schedule` lays one or more tracks (of the positive and the negative condition, say) over the blocks of a rollout.

Times: latent frame 0 is shown at 0 s, frame f > 0 from pixel frame 1 + 4 * (f - 1) on, at 16 frames a second. A prompt
rules from the first block that starts at its time or later, as in LongLive (arXiv 2509.22622); a block never changes
its prompt. Times count from the start of the whole video, given frames included.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Sequence

from .errors import ForcingError
from .plan import Block, context_chunks
from .rollout.transitions import TRANSITIONS, Switch

FPS = 16
SOFT_BLOCKS = 4
KINDS = tuple(TRANSITIONS)  # `rollout/transitions.py` says what each does
_ROUNDING = 1e-6  # of a frame: 0.1 s and the like are not exact


def frame_at(seconds: float) -> int:
    """First latent frame that is shown at `seconds` or later."""
    return 0 if seconds <= 0 else math.ceil((FPS * seconds + 3) / 4 - _ROUNDING)


def start_seconds(frame: int) -> float:
    """When a latent frame begins in the video."""
    return 0.0 if frame <= 0 else (1 + 4 * (frame - 1)) / FPS


@dataclass(frozen=True)
class Segment:
    """One prompt. start: in seconds, or in latent frames where `frames` is true. prompt: anything.
    transition: one of KINDS, not used for the first prompt. blocks: of a soft transition, at least 2; the i-th of
    n blocks takes i / n of the new prompt. text: what the prompt was made of, where that is known; only to be shown.
    """

    start: float
    prompt: Any
    transition: str = "recache"
    blocks: int = SOFT_BLOCKS
    frames: bool = False
    text: str = ""

    def __post_init__(self):
        if self.transition not in KINDS:
            raise ForcingError(f"{self.transition!r} is not a transition. Use one of {', '.join(KINDS)}.")
        if not math.isfinite(self.start) or self.start < 0 or (self.frames and self.start != int(self.start)):
            raise ForcingError(f"A prompt cannot start at {self.start}. Use seconds from 0 on, or a whole latent frame.")
        if self.transition == "soft" and self.blocks < 2:
            raise ForcingError(f"A soft transition over {self.blocks} blocks has nothing between the prompts. Use at least "
                               "2 blocks, or the transition keep.")

    @property
    def frame(self) -> int:
        """First latent frame at its time or later, before the rounding to a block."""
        return int(self.start) if self.frames else frame_at(self.start)

    @property
    def seconds(self) -> float:
        return start_seconds(int(self.start)) if self.frames else self.start

    @property
    def time(self) -> str:
        return f"latent frame {int(self.start)}" if self.frames else f"{self.start:g} s"


@dataclass(frozen=True)
class Track:
    """Prompts in the order of time, the first one at 0. Raises ForcingError for any other order."""

    segments: tuple[Segment, ...]

    def __post_init__(self):
        if not self.segments:
            raise ForcingError("A prompt track needs at least one prompt. Add one that starts at 0.")
        if self.segments[0].seconds != 0:
            raise ForcingError(f"The first prompt starts at {self.segments[0].time}, so nothing is said about the time "
                               "before. Let it start at 0.")
        for number, (one, other) in enumerate(zip(self.segments, self.segments[1:]), 2):
            if other.seconds == one.seconds:
                raise ForcingError(f"Prompts {number - 1} and {number} both start at {other.time}. Remove one of them, or "
                                   "change its time.")
            if other.seconds < one.seconds:
                raise ForcingError(f"Prompt {number} starts at {other.time}, before prompt {number - 1} ({one.time}). Put "
                                   "the prompts in the order of their times.")

    @property
    def prompts(self) -> tuple[Any, ...]:
        return tuple(segment.prompt for segment in self.segments)

    def then(self, segment: Segment) -> "Track":
        """This track with one more prompt at its end."""
        return Track((*self.segments, segment))


@dataclass(frozen=True)
class Schedule:
    """Tracks laid over the blocks of one rollout.

    rows: for every segment number of the rollout, the number of the segment that rules in each track. The rollout
    starts with row 0. switches: for `block_rollout` and its like.
    """

    rows: tuple[tuple[int, ...], ...]
    switches: tuple[Switch, ...]

    def prompts(self, index: int, track: Track) -> tuple[Any, ...]:
        """The prompts of the index-th track, one for every segment number."""
        return tuple(track.segments[row[index]].prompt for row in self.rows)


def schedule(tracks: Sequence[Track], blocks: Sequence[Block], *, block: int = 3,
             independent_first: bool = False) -> Schedule:
    """Lay tracks over `blocks`, the ones to be generated; what lies before them is given, in chunks of `block`.

    Changes inside given frames are over: the rollout starts with the prompt that ruled there last. A change exactly
    where the new frames begin is carried out. Raises ForcingError for prompts that start past the end, for two of
    a track in one block, for transitions longer than there is time for, and where two tracks change at the same
    block in different ways ("keep" gives way to any other).
    """
    given, end = blocks[0].first, blocks[-1].end
    edges = [first for first, _ in context_chunks(given, block, independent_first)] + [b.first for b in blocks]
    changes: dict[int, dict[int, int]] = {}
    for index, track in enumerate(tracks):
        for edge, number in _placed(track, edges, end):
            changes.setdefault(edge, {})[index] = number
    rows, switches = [(0,) * len(tracks)], []
    for edge in sorted(changes):
        row = tuple(changes[edge].get(index, old) for index, old in enumerate(rows[-1]))
        if edge == 0 or edge < given:
            rows = [row]
            continue
        rows.append(row)
        chosen = _agreed([tracks[index].segments[number] for index, number in changes[edge].items()])
        later = min((e for e in changes if e > edge), default=end)
        switches += _switches(chosen, edge, len(rows) - 1, [b for b in blocks if edge <= b.first < later])
    return Schedule(tuple(rows), tuple(switches))


def _placed(track: Track, edges: Sequence[int], end: int) -> list[tuple[int, int]]:
    """(first frame of a block, number of the segment that rules from there on)."""
    placed: list[tuple[int, int]] = []
    for number, segment in enumerate(track.segments):
        edge = next((e for e in edges if e >= segment.frame), None)
        if edge is None:
            raise ForcingError(f"Prompt {number + 1} starts at {segment.time}, after the last block of the video has begun "
                               f"({_shown(edges[-1])} s, latent frame {edges[-1]} of {end}). Let it start at "
                               "that time at the latest, or make the video longer.")
        if placed and placed[-1][0] == edge:
            following = next((e for e in edges if e > edge), None)
            way = "" if following is None else f"Let the second one start at {_shown(following)} s, or remove one."
            raise ForcingError(f"Prompts {number} and {number + 1} start in the same block (latent frame {edge}), and a block "
                               f"has one prompt. {way or 'Remove one of them.'}")
        placed.append((edge, number))
    return placed


def _shown(frame: int) -> str:
    """When a frame begins, rounded down: a prompt at this time still comes with that frame."""
    return f"{math.floor(100 * start_seconds(frame)) / 100:g}"


def _agreed(segments: Sequence[Segment]) -> Segment:
    """The segment whose transition is carried out where several tracks change at the same block."""
    strong = [s for s in segments if s.transition != "keep"]
    kinds = {(s.transition, s.blocks if s.transition == "soft" else 0) for s in strong}
    if len(kinds) > 1:
        names = " and ".join(sorted(kind for kind, _ in kinds))
        raise ForcingError(f"Two prompt tracks change at {strong[0].time} in different ways ({names}), but they share "
                           "one memory each block. Give both the same transition, or one of them keep.")
    return strong[0] if strong else segments[0]


def _switches(segment: Segment, edge: int, number: int, blocks: Sequence[Block]) -> list[Switch]:
    """The switches of one change of prompt; `blocks`: those until the next change."""
    if segment.transition != "soft":
        return [Switch(edge, number, transition=segment.transition)]
    count = segment.blocks
    if count > len(blocks):
        way = f"at most {len(blocks)} blocks" if len(blocks) > 1 else "the transition keep"
        raise ForcingError(f"The soft transition to the prompt at {segment.time} takes {count} blocks, but only {len(blocks)} "
                           f"come before the next prompt or the end. Use {way}, or move the next prompt.")
    mixed = [Switch(b.first, number, transition="soft", previous=number - 1, weight=i / count)
             for i, b in enumerate(blocks[:count - 1], 1)]
    return [*mixed, Switch(blocks[count - 1].first, number, transition="keep")]
