"""How a sparse method gets between a pass and its attention: a pass around the memory's own one, for every policy alike.

What the memory would hand to the attention is handed to a selection of it. A policy with an attention of its own (key
biases, routed frames) keeps it and finds the sparse one inside.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable

from torch import Tensor

from ..errors import ForcingError
from ..passes import Pass
from ..saved import Saved, Tree
from . import ann, cross, dummy, light
from .kernels import AUTO, KERNELS, check
from .selection import Selection
from .view import Heads, Video, View, places

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Choose = Callable[[Any, View, Tensor, Tensor], Selection | None]

# name -> (options, choose(options, view, q, k)): for keys of the video, q [B, n, H, D] and k [B, m, H, D] rotated
SPARSE: dict[str, tuple[type, Choose]] = {
    "light": (light.LightOptions, light.choose),
    "ann": (ann.AnnOptions, ann.choose),
    "dummy": (dummy.DummyOptions, dummy.choose),
}
# the same for keys of the prompt
PROMPT: dict[str, tuple[type, Choose]] = {
    "ann_cross": (cross.CrossOptions, cross.choose),
}


@dataclass(frozen=True)
class Sparse:
    """video: options of a method of SPARSE for self-attention, prompt: of PROMPT for cross-attention; None is dense. kernel:
    key of `kernels.KERNELS`. Raises ForcingError for what is none of these."""

    video: Any = None
    prompt: Any = None
    kernel: str = AUTO

    def __post_init__(self):
        for options, known in ((self.video, SPARSE), (self.prompt, PROMPT)):
            if options is not None and not isinstance(options, tuple(kind for kind, _ in known.values())):
                raise ForcingError(f"{type(options).__name__} are no options of a sparse method for this attention. Use "
                                   f"{' or '.join(kind.__name__ for kind, _ in known.values())}.")
        if self.kernel not in KERNELS:
            raise ForcingError(f"The sparse kernel {self.kernel!r} is not known. Use one of {', '.join(KERNELS)}.")

    def __bool__(self) -> bool:
        return self.video is not None or self.prompt is not None

    def check(self, device) -> None:
        """Raise ForcingError where a device cannot run the kernel."""
        check(self.kernel, device)


@dataclass
class Sparsity:
    """Sparse attention of one memory. It counts the steps of a block, and knows the heads once they were looked at."""

    options: Sparse
    video: Video
    heads: Heads = field(default_factory=Heads)
    _block: int | None = None  # first frame of the newest block that was denoised
    _steps: int = 0  # noisy passes over it

    def around(self, inner: Pass) -> SparsePass:
        """The pass to hand to the network in place of the memory's own."""
        return SparsePass(inner, self, self._step(inner))

    def _step(self, inner: Pass) -> int | None:
        call = inner.call
        if call.phase != "noisy" or call.frames - call.ahead > self.video.block:
            return None
        self._steps = self._steps + 1 if call.first == self._block else 0
        self._block = call.first
        return self._steps

    def state(self) -> Tree:
        return {"heads": [list(row) for row in self.heads.kinds]}

    def load(self, saved: Saved, heads: int) -> None:
        """Raises ForcingError where the heads are those of another network."""
        rows = saved.anything("heads")
        known = range(len(dummy.KINDS))
        fits = isinstance(rows, list) and len(rows) in (0, self.video.layers) and all(
            isinstance(row, list) and len(row) == heads and all(type(kind) is int and kind in known for kind in row)
            for row in rows)
        self.heads.kinds = tuple(map(tuple, rows)) if fits else saved.fail("heads", "does not fit this network")


class SparsePass:
    """An `Exchange` around another one, which sees nothing of it. step: as in `View`."""

    def __init__(self, inner: Pass, sparsity: Sparsity, step: int | None):
        self.inner, self.sparsity, self.step = inner, sparsity, step

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        sparse = partial(self._chosen, layer, attention, self.sparsity.options.video, SPARSE)
        own = getattr(self.inner, "attend", None)
        return own(layer, q, keys, values, sparse) if own else sparse(q, keys, values)

    def attend_prompt(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        return self._chosen(layer, attention, self.sparsity.options.prompt, PROMPT, q, keys, values)

    def view(self, layer: int, queries: int, keys: int) -> View:
        """What a method is told of an attention with so many tokens."""
        video, call = self.sparsity.video, self.inner.call
        frames, own = places(keys, video.tokens, queries, getattr(self.inner, "order", None), call.span)
        return View(video, call, layer, self.step, frames, own, self.sparsity.heads)

    def _chosen(self, layer: int, attention: Attention, options: Any, methods: dict, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        selection = None
        if options is not None:
            selection = methods[options.name][1](options, self.view(layer, q.shape[1], k.shape[1]), q, k)
        return attention(q, k, v) if selection is None else KERNELS[self.sparsity.options.kernel](q, k, v, selection)
