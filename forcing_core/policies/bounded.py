"""Context Forcing's memory: 21 frames as sink | slow context | fast local, at positions that never leave the window.

    places      0 .. 2      3 .. 14            15 .. 20
                sink        slow context       fast: newest frames, own block last

A frame's temporal position is its place. The first 21 frames of a video simply fill the places; from then on only the
fast ones slide. Where a block surprises a layer (the mean of its raw keys is unlike that of the layer's last keyframe)
its first frame is promoted: copied to the next slow place, over the old frame there, and once all are filled the oldest
promoted one is dropped. So every layer, and every sample of a batch, has frames of its own in the slow places.

Source: arXiv 2602.06028 (Context Forcing), public repo TIGER-AI-Lab/Context-Forcing. By default promotion is decided
in the clean pass, on final keys, against the last promoted block, which is what the paper's similarity is for. The
released code decides in every forward, compares with the forward before (so it mostly compares noise levels), and may
keep the keys of a noisy step: `released`.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..codecs import sample as sample_of
from ..codecs import tensors
from ..errors import ForcingError
from ..passes import Pass
from ..plan import Call, Plan
from ..rope import Rope, rotate
from ..saved import Saved, Tree
from ..store import PLAIN, Keys, Storage, Store, store_bytes
from .base import CacheOptions
from .window import Window, WindowOptions

MODES = ("surprise", "uniform")


@dataclass(frozen=True)
class BoundedOptions(CacheOptions):
    """sink, slow, fast: latent frames of the three parts; the fast ones include the current block. block: latent
    frames a block. promote: leading frames of a block that are promoted together.
    mode: "surprise" promotes where the cosine similarity is below tau; "uniform" every block that starts at a
    multiple of `interval` latent frames. released: decide as the published code does (see the module).
    compact: keep only raw keys (a third less memory, rotated at every read). store, offload, dense: as in
    `CacheOptions`; dense frames are fast ones.
    """

    sink: int = 3
    slow: int = 12
    fast: int = 6
    block: int = 3
    mode: str = "surprise"
    tau: float = 0.95
    interval: int = 6
    promote: int = 1
    released: bool = False
    compact: bool = False
    positions: ClassVar[str] = "relative"

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in MODES:
            raise ForcingError(f"mode = {self.mode!r} is not known. Use one of {', '.join(MODES)}.")
        if self.sink < 0 or self.block < 1 or self.interval < 1 or not 1 <= self.promote <= min(self.block, self.slow):
            raise ForcingError(f"sink {self.sink}, slow {self.slow}, block {self.block}, interval {self.interval}, promote "
                               f"{self.promote} make no sense. The sink needs at least 0, the others at least 1, and "
                               "promote at most as many as block and slow.")
        if self.fast < self.block:
            raise ForcingError(f"{self.fast} fast frames have no room for a block of {self.block}. Use a fast memory of at "
                               f"least {self.block} frames, or a smaller block.")

    @property
    def window(self) -> int:
        """Latent frames one pass attends to at most."""
        return self.sink + self.slow + self.fast


class Bounded:
    """Plans of the bounded memory: those of a window whose sink covers the slow places too.

    What a plan calls a frame in a slow place may have been replaced in some layers; positions and slots are the same.
    """

    def __init__(self, options: BoundedOptions, frames: int):
        self.options = options
        self._window = Window(WindowOptions(options.window, options.sink + options.slow, options.block, "relative"), frames)
        self.capacity = self._window.capacity
        # promoted keys move even where nothing else does
        self.keys = Keys.RAW if options.compact else Keys.BOTH

    def plan(self, call: Call) -> Plan:
        return self._window.plan(call)

    def make_pass(self, plan: Plan, call: Call, store: BoundedStore, rope: Rope) -> BoundedPass:
        return BoundedPass(plan, call, store, rope, self.options)

    def make_store(self, layers: int, capacity: int, frame_tokens: int, keys: Keys, **variant) -> BoundedStore:
        return BoundedStore(layers, capacity, frame_tokens, keys, sink=self.options.sink, slow=self.options.slow, **variant)

    def store_bytes(self, *, layers: int, frame_tokens: int, dim: int, batch: int, element_size: int) -> int:
        """As `store.store_bytes`, with one float32 mean key a layer where surprise decides; reached with the first
        clean pass."""
        means = layers * batch * dim * 4 if self.options.mode == "surprise" else 0
        storage = _only_fast(self.options.storage, self.capacity - self.options.sink - self.options.slow)
        return means + store_bytes(layers=layers, capacity=self.capacity, frame_tokens=frame_tokens, dim=dim, batch=batch,
                                   element_size=element_size, keys=self.keys, storage=storage)


def _only_fast(storage: Storage, fast: int) -> Storage:
    """The same, with at most so many dense frames: a slow place has other frames in other layers and samples."""
    return replace(storage, dense=min(storage.dense, max(0, fast)))


class BoundedStore(Store):
    """A store whose slow places can be overwritten for one layer and one sample at a time.

    promoted: (layer, sample) -> source frames in its leading slow places, in temporal order. keyframes: layer -> mean
    raw key [B, H * D], float32, that the next block is compared with. Up to the slow ones, slots equal places:
    the window fills them in order, and uses only those behind them again.
    """

    def __init__(self, layers: int, capacity: int, frame_tokens: int, keys: Keys, *, sink: int, slow: int,
                 storage: Storage = PLAIN):
        super().__init__(layers, capacity, frame_tokens, keys, storage=_only_fast(storage, capacity - sink - slow))
        self.sink, self.slow = sink, slow
        self.promoted: dict[tuple[int, int], tuple[int, ...]] = {}
        self.keyframes: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(mean.nbytes for mean in self.keyframes.values())

    def clear(self) -> None:
        super().clear()
        self.promoted.clear()
        self.keyframes.clear()

    def state(self) -> Tree:
        tree = super().state()
        for layer in range(self.layers):
            part = {str(sample): list(frames) for (at, sample), frames in self.promoted.items() if at == layer}
            tree[f"slow {layer}"] = part | ({"keyframe": self.keyframes[layer]} if layer in self.keyframes else {})
        return tree

    def load(self, saved: Saved, like: Tensor) -> None:
        super().load(saved, like)
        batch, _, heads, head_dim = like.shape
        for layer in range(self.layers):
            part = saved.part(f"slow {layer}")
            for sample in filter(lambda sample: str(sample) in part, range(batch)):
                self.promoted[layer, sample] = part.frames(str(sample), most=self.slow)
            if "keyframe" in part:
                self.keyframes[layer] = like.new_empty(batch, heads * head_dim, dtype=torch.float32)
                part.fill("keyframe", self.keyframes[layer])

    def renew(self, frames: tuple[int, ...]) -> None:
        """These frames are about to be written again (recache): if one of them has a slow place, all slow places get
        back the frames that they had before any promotion."""
        if any(self.sink <= self.slots.get(frame, -1) < self.sink + self.slow for frame in frames):
            self.promoted.clear()

    def sources(self, layer: int, sample: int) -> tuple[int, ...]:
        """The source frame in every used place."""
        frames = list(self.frames)
        promoted = self.promoted.get((layer, sample), ())
        frames[self.sink:self.sink + len(promoted)] = promoted
        return tuple(frames)

    def _recent(self) -> tuple[int, ...]:
        return tuple(frame for frame in self.frames if self.slots[frame] >= self.sink + self.slow)

    def promote(self, layer: int, sample: int, frames: tuple[int, ...], rope: Rope,
                fresh: tuple[Tensor, Tensor] | None = None) -> None:
        """Put frames into the next slow places, or behind the others, which move up, where all are taken. fresh: their raw
        keys and values [frames * tokens, H, D]; by default what is stored of them, which is not rounded again."""
        data, held = self._at(layer), self.promoted.get((layer, sample), ())
        over = max(0, len(held) + len(frames) - self.slow)
        start = self.sink + len(held) - over
        end = start + len(frames)
        for i, buffer in enumerate((data.raw, data.v)):
            mine = sample_of(buffer, sample)
            for t in tensors(mine):
                if over:
                    t[:, self.sink:start] = t[:, self.sink + over:start + over].clone()
                for place, frame in enumerate(() if fresh else frames, start):
                    t[:, place] = t[:, self.slots[frame]]
            if fresh:
                self._codec.write(mine, slice(start, end), fresh[i].unflatten(0, (len(frames), -1))[None])
        if data.roped is not None:
            moved = slice(self.sink if over else start, end)
            turned = rotate(data.raw[sample, moved].flatten(0, 1)[None], rope.table(range(moved.start, moved.stop)))
            data.roped[sample, moved] = turned[0].unflatten(0, (-1, self.frame_tokens))
        self.promoted[layer, sample] = (held + frames)[over:]
        self._written(layer, slice(self.sink, end))


@dataclass
class BoundedPass(Pass):
    """A pass that may promote the head of its block: at the end of a clean pass, or as the published code does it."""

    store: BoundedStore
    options: BoundedOptions

    def __post_init__(self):
        if self.call.phase == "recache":
            self.store.renew(self.plan.write)
        super().__post_init__()
        self._before = len(self.store.slots) - len(self.plan.write)  # places that lie in the past
        self._head = self.call.span[:self.options.promote]
        self._means: list[Tensor] = []
        self._alike: list[Tensor] = []

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        if self.options.released and self.call.phase != "recache":
            self._at_once(layer, k, v)
        out = super().exchange(layer, q, k, v)
        if not self.options.released and self.call.phase == "clean":
            self._means.append(k.mean(dim=1, dtype=torch.float32).flatten(1))
            self._alike.append(self._compared(layer, self._means[-1]))
            if layer == self.store.layers - 1:
                self._at_the_end()
        return out

    def _at_once(self, layer: int, k: Tensor, v: Tensor) -> None:
        """The published way: this layer decides before it reads, and compares with whatever forward was the last."""
        means = k.mean(dim=1, dtype=torch.float32).flatten(1)
        for sample, alike in enumerate(self._compared(layer, means).tolist()):
            here = slice(0, len(self._head) * self.store.frame_tokens)
            self._promote(layer, sample, alike, (k[sample, here], v[sample, here]))
        if self.options.mode == "surprise":
            self.store.keyframes[layer] = means

    def _at_the_end(self) -> None:
        """All layers decide together: what they read is in use until then, and so numbers leave the device once."""
        for layer, row in enumerate(torch.stack(self._alike).tolist()):
            for sample, alike in enumerate(row):
                promoted = self._promote(layer, sample, alike)
                if promoted and self.options.mode == "surprise":
                    self.store.keyframes[layer][sample] = self._means[layer][sample]

    def _compared(self, layer: int, means: Tensor) -> Tensor:
        """[B], promotion where it is below tau: the cosine with the keyframe, or -inf and inf where that is not asked."""
        early, keyframes = self.call.first < self.options.fast, self.store.keyframes
        if self.options.mode == "uniform":
            promotes = not early and self.call.first % self.options.interval == 0
            return means.new_full(means.shape[:1], -torch.inf if promotes else torch.inf)
        if early or layer not in keyframes:
            keyframes[layer] = means
            return means.new_full(means.shape[:1], torch.inf)
        return cosine_similarity(means, keyframes[layer])

    def _promote(self, layer: int, sample: int, alike: float, fresh: tuple[Tensor, Tensor] | None = None) -> bool:
        """Promote once a block, where there is a place in the past. Whether it was done. fresh: as in `promote`."""
        held = self.store.promoted.get((layer, sample), ())
        end = self.store.sink + min(len(held) + len(self._head), self.store.slow)
        if alike >= self.options.tau or self._head[0] in held or end > self._before:
            return False
        self.store.promote(layer, sample, self._head, self.rope, fresh)
        return True
