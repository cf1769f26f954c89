"""Captions as conditioning of a Wan network, without weights: fixed token ids -> fixed rows [B, rows, text_dim].

A row is a word (orthogonal rows of +-1 where text_dim is a multiple of 64) plus half a position (seeded +-1), so
every number is exact in fp16 and bf16 and equal on every machine. Rows after the caption are zero, as Wan 2.1 has
them: it attends to them and never masks. Of 512 rows 9 are words then, 2 % of what an untrained network sees, and
cross-attention costs about as much as attention to a block. With fewer rows (24 hold every caption) both shrink;
a network has to be given as many rows as it was trained on.
"""
from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from ..errors import ForcingError
from .names import IDS, VOCABULARY, words

ORDER = 64
POSITION = 0.5
_SEED = 20


def _signs(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return 2.0 * torch.randint(0, 2, (rows, columns), generator=generator) - 1


def _hadamard(order: int) -> Tensor:
    """Orthogonal rows of +-1, [order, order], order a power of two."""
    out = torch.ones(1, 1)
    while out.shape[0] < order:
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    return out


def word_rows(text_dim: int) -> Tensor:
    """[words, text_dim], row 0 zero. Orthogonal for multiples of 64, near it for other sizes above; a narrower
    network gets random signs."""
    if text_dim >= ORDER:
        repeats = -(-text_dim // ORDER)
        table = _hadamard(ORDER)[:len(VOCABULARY)].repeat(1, repeats)[:, :text_dim] * _signs(1, text_dim, _SEED)
    else:
        table = _signs(len(VOCABULARY), text_dim, _SEED)
    table[0] = 0
    return table


class TextCodec:
    """Captions -> [B, rows, text_dim] float32 on the CPU, or on the device of the ids.

    Words outside the vocabulary have no row: they are dropped, and `unknown` names them.
    """

    def __init__(self, text_dim: int, rows: int = 512):
        if text_dim < 1 or rows < 1:
            raise ForcingError("text_dim and rows must be positive.")
        self.text_dim, self.rows = text_dim, rows
        self._words = word_rows(text_dim)
        self._positions = POSITION * _signs(rows, text_dim, _SEED + 1)

    def unknown(self, caption: str) -> tuple[str, ...]:
        """Words of the caption that the network has never been shown."""
        return tuple(word for word in words(caption) if word not in IDS)

    def explain(self, caption: str) -> str:
        """A sentence for the person who typed the caption, empty if every word is known."""
        unknown = self.unknown(caption)
        if not unknown:
            return ""
        return (f"The micro model does not know these words: {', '.join(unknown)}. "
                f"Use only {', '.join(VOCABULARY[1:])}.")

    def tokens(self, captions: str | Sequence[str]) -> Tensor:
        """Token ids [B, rows], 0 after the caption; known words only, cut after `rows`."""
        captions = [captions] if isinstance(captions, str) else captions
        lists = [[IDS[word] for word in words(text) if word in IDS][:self.rows] for text in captions]
        return torch.tensor([ids + [0] * (self.rows - len(ids)) for ids in lists])

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] -> [B, rows, text_dim], zero where the id is 0; L above `rows` is cut."""
        ids = ids[:, :self.rows]
        self._words, self._positions = self._words.to(ids.device), self._positions.to(ids.device)
        out = self._words.new_zeros(ids.shape[0], self.rows, self.text_dim)
        row = self._words[ids] + self._positions[:ids.shape[1]]
        out[:, :ids.shape[1]] = row * (ids > 0).unsqueeze(-1)
        return out

    def encode(self, captions: str | Sequence[str]) -> Tensor:
        """Captions -> [B, rows, text_dim]. An empty caption is all zeros: no condition."""
        return self.embed(self.tokens(captions))
