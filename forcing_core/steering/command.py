"""What a running rollout can be told, and how a command from outside is checked."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable

from ..errors import ForcingError
from ..track import KINDS, SOFT_BLOCKS

LONGEST_TEXT, LONGEST_NAME = 20_000, 200  # characters


class Refused(ForcingError):
    """A command that makes sense, but not for this run, or not now."""


@dataclass(frozen=True)
class Command:
    """kind: key of FIELDS, which says what of the rest belongs to it. text, transition, blocks: the new prompt and how it
    takes over (blocks: of a soft transition). seed: of the coming blocks. strength, name: of a LoRA that the model has.
    held: actions that drive a world from now on, as a line of an action track has them; an empty text lets go of all.
    client: who sent it. Raises ForcingError for values that cannot be meant."""

    kind: str
    text: str = ""
    transition: str = "recache"
    blocks: int = SOFT_BLOCKS
    seed: int = 0
    strength: float = 1.0
    name: str | None = None
    held: str = ""
    client: str = ""

    def __post_init__(self):
        if self.kind not in FIELDS:
            raise ForcingError(f"There is no command {shown(self.kind)}. Use one of {', '.join(FIELDS)}.")
        for name in (*FIELDS[self.kind], "client"):
            CHECKS[name](getattr(self, name))

    def plain(self) -> dict[str, Any]:
        """What JSON can hold, and `read_command` reads."""
        names = [name for name in (*FIELDS[self.kind], "client") if getattr(self, name) not in (None, "")]
        return {"kind": self.kind, **{name: getattr(self, name) for name in names}}


def _text(value: Any, name: str, longest: int) -> None:
    if type(value) is not str or len(value) > longest:
        raise ForcingError(f"{name} has to be a text of at most {longest} characters.")
    if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in value):
        raise ForcingError(f"{name} holds characters that are none. Send plain UTF-8.")


def _prompt(value: Any) -> None:
    _text(value, "text", LONGEST_TEXT)
    if not value.strip():
        raise ForcingError("The prompt is empty. Write what is to be seen from now on.")


def _transition(value: Any) -> None:
    if type(value) is not str or value not in KINDS:
        raise ForcingError(f"{shown(value)} is not a transition. Use one of {', '.join(KINDS)}.")


def _number(name: str, low: int, high: int) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise ForcingError(f"{name} has to be a whole number from {low} to {high}.")
    return check


def _strength(value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) <= 100 or not math.isfinite(value):
        raise ForcingError("strength has to be a number from -100 to 100.")


# kind -> names of what belongs to it; name -> its check
FIELDS: dict[str, tuple[str, ...]] = {"prompt": ("text", "transition", "blocks"), "seed": ("seed",),
                                      "lora": ("strength", "name"), "drive": ("held",),
                                      "pause": (), "resume": (), "stop": ()}
REQUIRED = {"text", "seed", "strength"}
CHECKS: dict[str, Callable[[Any], None]] = {
    "text": _prompt, "transition": _transition, "blocks": _number("blocks", 2, 1000),
    "seed": _number("seed", 0, (1 << 64) - 1), "strength": _strength,
    "name": lambda value: value is None or _text(value, "name", LONGEST_NAME),
    "held": lambda value: _text(value, "held", LONGEST_NAME),
    "client": lambda value: _text(value, "client", LONGEST_NAME)}


def read_command(value: Any) -> Command:
    """The command of a JSON object that nobody vouches for. Raises ForcingError, naming the fix, for everything else."""
    if type(value) is not dict or type(value.get("kind")) is not str or value["kind"] not in FIELDS:
        raise ForcingError(f"A command is a JSON object with a kind: one of {', '.join(FIELDS)}.")
    names = FIELDS[value["kind"]]
    extra = [name for name in value if name not in (*names, "kind", "client")]
    if extra:
        raise ForcingError(f"A command of the kind {value['kind']} has no {shown(extra[0])}. Leave it out.")
    missing = [name for name in names if name in REQUIRED and name not in value]
    if missing:
        raise ForcingError(f"A command of the kind {value['kind']} needs {missing[0]}. Add it.")
    return Command(**value)


def shown(value: Any) -> str:
    return repr(value if len(repr(value)) <= 60 else repr(value)[:60] + "...")
