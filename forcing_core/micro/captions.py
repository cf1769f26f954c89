"""Captions of the micro world: attributes -> token ids -> text, and back.

    a red circle moving left on a dark background
    a small red circle moving left in front of a big blue square moving up right on a light background
"""
from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ForcingError
from .names import BACKGROUNDS, COLOURS, DIRECTIONS, IDS, LAWS, SHAPES, SIZES, VOCABULARY, words

LENGTH = 24  # tokens of the longest caption, rounded up
_SLOTS = {"size": SIZES, "colour": tuple(COLOURS), "shape": SHAPES, "law": LAWS, "direction": tuple(DIRECTIONS)}
_THING = (r"(?:a )?(?:(?P<size>{size}) )?(?P<colour>{colour}) (?P<shape>{shape})"
          r"(?: (?P<law>{law}))?(?: (?P<direction>{direction}))?")


@dataclass(frozen=True)
class Noun:
    """One captioned thing: indices into the tables of names.py, -1 where the caption does not say."""

    colour: int
    shape: int
    size: int = -1
    law: int = -1
    direction: int = -1


@dataclass(frozen=True)
class Caption:
    """What a caption says. things: front to back."""

    things: tuple[Noun, ...]
    background: int = -1


def _pattern(name: str) -> str:
    return "|".join(sorted(_SLOTS[name], key=len, reverse=True))


_PATTERN = re.compile(_THING.format(**{name: _pattern(name) for name in _SLOTS}))
_BACKGROUND = re.compile(r"(.*?)(?: on (?:a )?(?P<background>" + "|".join(BACKGROUNDS) + r")(?: background)?)?")


def parse(caption: str) -> Caption:
    """What a caption says; size, motion and background may be left out. ForcingError for anything else."""
    match = _BACKGROUND.fullmatch(" ".join(words(caption)))
    nouns = [_PATTERN.fullmatch(part) for part in match[1].split(" in front of ")]
    if not all(nouns):
        raise ForcingError(f"'{caption}' is not a caption of the micro world. Write for example "
                           f"'a red circle moving left on a dark background', with colours {', '.join(COLOURS)} "
                           f"and shapes {', '.join(SHAPES)}.")
    things = [Noun(**{name: table.index(noun[name]) if noun[name] else -1 for name, table in _SLOTS.items()})
              for noun in nouns]
    background = match["background"]
    return Caption(tuple(things), list(BACKGROUNDS).index(background) if background else -1)


def _column(value: Tensor, names: tuple[str, ...], part: int) -> Tensor:
    """Token id of word `part` of each name, 0 for index -1 or a name with fewer words. [B] -> [B]."""
    split = [name.split() for name in names]
    table = [0] + [IDS[parts[part]] if part < len(parts) else 0 for parts in split]
    return torch.tensor(table, device=value.device)[value + 1]


def tokens(attributes: dict[str, Tensor]) -> Tensor:
    """Token ids [B, LENGTH], 0 after the caption, of the attributes that `world.draw` makes."""
    background = attributes["background"]

    def fixed(word: str, shown: Tensor | bool = True) -> Tensor:
        return torch.full_like(background, IDS[word]) * shown

    columns = []
    for k in range(attributes["colour"].shape[1]):
        shown = attributes["things"] > k
        columns += [fixed(word, shown) for word in ("in", "front", "of")] if k else []
        columns += [fixed("a", shown)]
        for name, table in _SLOTS.items():
            parts = max(len(entry.split()) for entry in table)
            columns += [_column(attributes[name][:, k], table, part) * shown for part in range(parts)]
    columns += [fixed("on"), fixed("a"), _column(background, tuple(BACKGROUNDS), 0), fixed("background")]
    ids = torch.stack(columns, 1)
    ids = ids.gather(1, (ids == 0).byte().argsort(dim=1, stable=True))[:, :LENGTH]
    return torch.nn.functional.pad(ids, (0, LENGTH - ids.shape[1]))


def text(ids: Tensor) -> list[str]:
    """Token ids [B, L] -> captions."""
    return [" ".join(VOCABULARY[i] for i in row if i) for row in ids.tolist()]
