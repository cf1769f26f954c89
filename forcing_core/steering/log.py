"""The log of the commands that were carried out: what a replay needs, as JSON that nobody vouches for."""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Sequence

from ..errors import ForcingError
from .command import Command, read_command

LONGEST_LOG, MOST_ENTRIES = 16 << 20, 100_000  # bytes, commands
LARGEST = 1 << 40


@dataclass(frozen=True)
class Entry:
    """A command that was carried out. number: counts the commands of a run from 1. block: index of the first block it
    acted on. at_frame: number of that block's first frame of video, as a file counts them."""

    number: int
    block: int
    at_frame: int
    command: Command

    def plain(self) -> dict[str, Any]:
        return {"number": self.number, "block": self.block, "at_frame": self.at_frame, **self.command.plain()}


def pixel_frame(latent_frame: int) -> int:
    """Number of the first frame of video that a latent frame decodes to."""
    return max(0, 4 * latent_frame - 3)


def write_log(log: Sequence[Entry]) -> str:
    """JSON that `read_log` reads."""
    return json.dumps({"version": 1, "log": [entry.plain() for entry in log]})


def read_log(text: str) -> tuple[Entry, ...]:
    """A log as `write_log` writes it, or only its list of entries; nothing for an empty text. Raises ForcingError, naming
    the entry, for what is no such log."""
    if not text.strip():
        return ()
    if len(text) > LONGEST_LOG:
        raise ForcingError(f"The log is longer than {LONGEST_LOG >> 20} MB. Replay it in parts.")
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ForcingError("The log is no JSON. Paste the log of a steered stream as it is in the file or in the "
                           "panel.") from error
    return read_entries(found.get("log") if isinstance(found, dict) else found)


def read_entries(found: Any) -> tuple[Entry, ...]:
    """The entries of a list of JSON objects, checked. Raises ForcingError for anything else."""
    if not isinstance(found, list) or len(found) > MOST_ENTRIES:
        raise ForcingError(f"The log is no list of at most {MOST_ENTRIES} commands. Paste the log of a steered stream.")
    entries = tuple(_entry(value, place) for place, value in enumerate(found, 1))
    if any(one.block > other.block for one, other in zip(entries, entries[1:])):
        raise ForcingError("The commands of the log are not in the order of their blocks. Sort them.")
    return entries


def _entry(value: Any, place: int) -> Entry:
    try:
        if not isinstance(value, dict):
            raise ForcingError("It is no JSON object.")
        numbers = [value.get(name) for name in ("number", "block", "at_frame")]
        if any(type(n) is not int or not 0 <= n < LARGEST for n in numbers):
            raise ForcingError("It needs number, block and at_frame, whole numbers from 0 on.")
        return Entry(*numbers, read_command({k: v for k, v in value.items() if k not in ("number", "block", "at_frame")}))
    except ForcingError as error:
        raise ForcingError(f"Command {place} of the log cannot be replayed: {error}") from error


def _refuse(constant: str) -> None:
    raise ValueError(constant)
