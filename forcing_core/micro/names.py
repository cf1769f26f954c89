"""The closed vocabulary of the micro world and what each word means. Colours are RGB in [0, 1].

Tables are append-only: the position of a word is its index in every attribute tensor and its token id.
"""
from __future__ import annotations

import torch
from torch import Tensor

COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.80, 0.20),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "magenta": (0.85, 0.20, 0.85),
    "cyan": (0.10, 0.80, 0.90),
}
BACKGROUNDS = {"dark": (0.08, 0.08, 0.08), "light": (0.92, 0.92, 0.92), "gray": (0.48, 0.48, 0.48)}
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "big")
LAWS = ("moving", "speeding", "circling", "swinging")

_D = 0.5 ** 0.5
# x to the right, y down.
DIRECTIONS = {
    "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0),
    "up left": (-_D, -_D), "up right": (_D, -_D), "down left": (-_D, _D), "down right": (_D, _D),
}

# Token id = position; 0 is "no word". At most 63 words: see text.py.
VOCABULARY = ("", "a", "on", "background", "in", "front", "of", *COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, *LAWS,
              "left", "right", "up", "down")
IDS = {word: index for index, word in enumerate(VOCABULARY)}

# What people write instead; only for captions typed by hand.
ALIASES = {
    "an": "a", "the": "a", "grey": "gray", "black": "dark", "white": "light", "bright": "light", "purple": "magenta",
    "pink": "magenta", "turquoise": "cyan", "disc": "circle", "ball": "circle", "box": "square", "large": "big",
    "leftward": "left", "rightward": "right", "upward": "up", "downward": "down", "upwards": "up",
    "downwards": "down", "accelerating": "speeding", "orbiting": "circling",
}


def rgb(table: dict[str, tuple[float, float, float]], device: torch.device | str = "cpu") -> Tensor:
    """The colours of a table, [n, 3] in [0, 1]."""
    return torch.tensor(list(table.values()), device=device)


def words(text: str) -> list[str]:
    """Lower-case words of a caption, aliases replaced, punctuation dropped."""
    letters = "".join(c if c.isalnum() else " " for c in text.lower())
    return [ALIASES.get(word, word) for word in letters.split()]
