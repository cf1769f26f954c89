"""What an object needs to go on later, as a tree of plain numbers and tensors, and how one is read that nobody vouches for.

An object that remembers things has `state() -> Tree`, and `load(saved)`, which a fresh one of the same settings calls
with what came back. Nothing in a file chooses a type, a size or a name: `load` asks for what it needs, and whatever does
not fit raises ForcingError.
"""
from __future__ import annotations

from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor

from .errors import ForcingError

Tree = dict[str, Any]  # name -> Tree, Tensor, or what JSON can hold
OTHER_LENGTH = "Videos of other lengths keep their memory in other ways: take a latent as long as that of the first run."
LARGEST = 1 << 40  # integers beyond are no frame numbers


def split(tree: Tree, path: str = "") -> tuple[Tree, dict[str, Tensor]]:
    """The plain part of a tree, and its tensors by their path."""
    plain, tensors = {}, {}
    for name, value in tree.items():
        where = f"{path}/{name}" if path else name
        if isinstance(value, Tensor):
            tensors[where] = value
        elif isinstance(value, dict):
            plain[name], inner = split(value, where)
            tensors.update(inner)
        else:
            plain[name] = value
    return plain, tensors


def copied(tree: Tree) -> Tree:
    """The same tree with copies of its tensors in host memory."""
    return {name: copied(value) if isinstance(value, dict) else
            value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value for name, value in tree.items()}


class Saved:
    """A part of a tree that was read from a file. Every method raises ForcingError where the tree is not as asked for."""

    def __init__(self, plain: Any, tensors: dict[str, Tensor], path: str = ""):
        self._plain = plain if isinstance(plain, dict) else self._fail(path, "is missing")
        self._tensors, self._path = tensors, path

    def __contains__(self, name: str) -> bool:
        return name in self._plain or self._where(name) in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Names of plain values and of parts."""
        return iter(self._plain)

    def only(self, names: Iterable[str]) -> None:
        """The parts have to be these."""
        found, wanted = [*self._plain], [*names]
        if sorted(found) != sorted(wanted):
            raise ForcingError(f"The snapshot holds {len(found)} conditions, this run has {len(wanted)}. Use the cfg and as "
                               "many prompts as in the first run.")

    def part(self, name: str) -> Saved:
        return Saved(self._plain.get(name), self._tensors, self._where(name))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Saved:
        """The same part with what `change` makes of its tensors."""
        mine = {name: change(t) for name, t in self._tensors.items() if name.startswith(f"{self._path}/")}
        return Saved(self._plain, mine, self._path)

    def same(self, name: str, wanted: Any, fix: str) -> None:
        """The value has to be this one; `fix` says what to do where it is not."""
        found = self._plain.get(name)
        if found != wanted:
            raise ForcingError(f"The snapshot has {name} {found!r}, but this run has {wanted!r}. {fix}")

    def text(self, name: str) -> str:
        value = self._plain.get(name)
        return value if isinstance(value, str) else self._fail(self._where(name), "is no text")

    def texts(self, name: str, count: int) -> tuple[str | None, ...]:
        """So many texts, None among them."""
        values = self._plain.get(name)
        fits = isinstance(values, list) and len(values) == count and all(v is None or isinstance(v, str) for v in values)
        return tuple(values) if fits else self.fail(name, f"is no list of {count} words")

    def anything(self, name: str) -> Any:
        """A plain value that whoever asks for it checks."""
        return self._plain.get(name)

    def fail(self, name: str, problem: str) -> Any:
        """Raise ForcingError about one of its values."""
        return self._fail(self._where(name), problem)

    def integer(self, name: str, low: int, high: int) -> int:
        return self._integer(self._plain.get(name), low, high, name)

    def optional(self, name: str, low: int, high: int) -> int | None:
        return None if self._plain.get(name) is None else self.integer(name, low, high)

    def integers(self, name: str, low: int = 0, high: int = LARGEST) -> tuple[int, ...]:
        values = self._plain.get(name)
        if not isinstance(values, list):
            self._fail(self._where(name), "is no list")
        return tuple(self._integer(value, low, high, name) for value in values)

    def frames(self, name: str, most: int = LARGEST) -> tuple[int, ...]:
        """At most so many rising frame numbers."""
        values = self.integers(name)
        fits = len(values) <= most and list(values) == sorted({*values})
        return values if fits else self._fail(self._where(name), "is too long or not in order")

    def pairs(self, name: str, low: int = 0, high: int = LARGEST, empty: bool = False) -> dict[int, int | None]:
        """Integers from 0 on -> integers; `empty` allows None among those."""
        values = self._plain.get(name)
        if not isinstance(values, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in values):
            self._fail(self._where(name), "is no list of pairs")
        return {self._integer(key, 0, LARGEST, name):
                None if empty and value is None else self._integer(value, low, high, name) for key, value in values}

    def tensor(self, name: str, shape: Iterable[int | None], dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape, None standing for any size, and of this dtype, or of any floating one; all finite."""
        found, where = self._tensors.get(self._where(name)), self._where(name)
        if found is None:
            self._fail(where, "is missing")
        wanted = tuple(shape)
        if found.ndim != len(wanted) or any(b not in (None, a) for a, b in zip(found.shape, wanted)):
            self._fail(where, f"has the shape {list(found.shape)} instead of {list(wanted)}")
        if found.dtype != dtype if dtype else not found.is_floating_point():
            self._fail(where, f"is {found.dtype} instead of {dtype or 'a floating type'}")
        if found.is_floating_point() and not _finite(found):
            self._fail(where, "holds NaN or infinite numbers")
        return found

    def fill(self, name: str, target: Tensor, low: int | None = None, high: int = LARGEST) -> None:
        """Copy a tensor over `target`, like which it has to be; with all its integers in low..high where asked."""
        if not target.numel():  # such tensors are not written
            return
        found = self.tensor(name, target.shape, target.dtype)
        if low is not None and not low <= int(found.min()) <= int(found.max()) <= high:
            self._fail(self._where(name), f"holds numbers outside of {low} to {high}")
        target.copy_(found)

    def _integer(self, value: Any, low: int, high: int, name: str) -> int:
        # a JSON true would pass for 1
        return value if type(value) is int and low <= value < high else self._fail(self._where(name), "is out of range")

    def _where(self, name: str) -> str:
        return f"{self._path}/{name}" if self._path else name

    @staticmethod
    def _fail(where: str, problem: str) -> Any:
        raise ForcingError(f"The snapshot cannot be used: its part '{where}' {problem}. Take an earlier or another snapshot.")


def _finite(t: Tensor) -> bool:
    # float8 knows neither isfinite nor infinities
    parts = t.flatten().split(1 << 24)
    return all(bool(torch.isfinite(part.float() if part.element_size() == 1 else part).all()) for part in parts)
