"""CUDA graphs of forwards: a pass that comes back is replayed in one launch instead of some thousand.

Which pass is the same as an earlier one is known before it starts: sizes, silent or not, and the layout of the store - which
slots it writes and reads, how their keys are turned. Under a full window the slots go round, so every layout comes back after
a few blocks; one that was met in another block before is recorded, others (a window that still fills) run as always. What
differs between two passes with the same layout goes into tensors of the recording: latents, timesteps, and the rotation of the
block's own frames, so positions that grow without end are replayed too.

A recording is about the addresses of weights, buffers and the prompt's keys: those of another prompt, other weights or
operations are dropped. What the host does by itself during a forward (move weights, apply a LoRA to them) cannot be recorded.
The bookkeeping here knows nothing of CUDA; a `Recorder` does.
"""
from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple, Protocol, Sequence

import torch
from torch import Tensor

from .passes import Exchange, Pass
from .rope import HeadTable, Rope
from .store import Store
from .wan import Ops, TextState, forward
from .wan.times import Embedded

LAYOUTS = 1024  # remembered of one memory; where they never come back there is nothing to gain
MOST = 64  # recordings of one memory; a window of 21 frames with a sink of 3 has 18 layouts

Work = Callable[[], Tensor | None]


class Recorder(Protocol):
    """record(work): (replay, out) - what does the same to the same tensors again, and where its result lies, None for silent
    work. It need not have run it already. Raises RuntimeError for work that cannot be recorded."""

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor | None]: ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they run one after the other, and what they answer is copied."""

    def __init__(self):
        self._pool = None

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor | None]:
        graph = torch.cuda.CUDAGraph()
        # other threads of the host (previews, downloads) may use the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = work()
        self._pool = graph.pool()
        return graph.replay, out


class _Tables:
    """The rotations that a pass asked for, kept: building one copies from the host, which cannot be recorded."""

    def __init__(self, rope: Rope):
        self._rope: Rope | None = rope
        self._kept: dict[tuple, Tensor | HeadTable] = {}

    def table(self, positions: Sequence[float]) -> Tensor | HeadTable:
        key = tuple(positions)
        if key not in self._kept:
            if self._rope is None:
                raise RuntimeError("a recorded pass wants another rotation than the one before it")
            self._kept[key] = self._rope.table(positions)
        return self._kept[key]

    def close(self) -> None:
        self._rope = None


class _Recording(NamedTuple):
    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    out: Tensor | None
    kept: tuple  # what the recorded addresses belong to

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        for mine, new in zip(self.inputs, inputs):
            mine.copy_(new)
        self.replay()
        return None if self.out is None else self.out.clone()


@dataclass
class _Owner:
    """What the recordings of one store hold for. first: layout -> first frame of the pass that had it first."""

    store: Store
    text: TextState
    under: Any
    addresses: tuple[int, ...]
    first: dict[tuple, int] = field(default_factory=dict)
    recordings: OrderedDict[tuple, _Recording] = field(default_factory=OrderedDict)

    def holds(self, text: TextState, under: Any, addresses: tuple[int, ...]) -> bool:
        return self.text is text and self.under == under and self.addresses == addresses


@dataclass
class Graphs:
    """Stands for `wan.forward`, whose arguments it takes. off: why nothing is recorded any more, or nothing.
    recorded, replayed: how many forwards were.

    under: with other operations or whatever else a recording depends on, recordings are dropped; the `ops` where it is None.
    """

    recorder: Recorder
    run: Callable[..., Tensor | None] = forward
    off: str = ""
    recorded: int = 0
    replayed: int = 0
    _owners: dict[int, _Owner] = field(default_factory=dict)

    def __call__(self, net: Any, x: Tensor, timesteps: Tensor, text: TextState, memory: Exchange, ops: Ops,
                 beside: Any = None, under: Any = None) -> Tensor | None:
        if self.off or beside is not None or not can_record(memory):
            return self.run(net, x, timesteps, text, memory, ops, beside)
        owner = self._owner(net, text, memory.store, ops if under is None else under)
        alike = text.times.of(timesteps).alike
        key = memory.silent, alike, x.shape, x.dtype, timesteps.shape, memory.store.layout(memory.plan)
        if key in owner.recordings:
            owner.recordings.move_to_end(key)
            out = owner.recordings[key](x, timesteps, memory.turn)
            memory.store.settle(memory.plan)
            self.replayed += 1
            return out
        call = memory.call
        if len(owner.first) >= LAYOUTS:
            owner.first.clear()
        if owner.first.setdefault(key, call.first) == call.first:
            return self.run(net, x, timesteps, text, memory, ops)
        return self._record(owner, key, net, x, timesteps, text, memory, ops)

    def free(self) -> None:
        """Drop every recording."""
        self._owners.clear()

    def _owner(self, net: Any, text: TextState, store: Store, under: Any) -> _Owner:
        addresses = tuple(t.data_ptr() for t in (*net.parameters(), *net.buffers(), *store.tensors()))
        owner = self._owners.get(id(store))
        if owner is None or owner.store is not store or not owner.holds(text, under, addresses):
            owner = self._owners[id(store)] = _Owner(store, text, under, addresses)
        return owner

    def _record(self, owner: _Owner, key: tuple, net: Any, x: Tensor, timesteps: Tensor, text: TextState, memory: Pass,
                ops: Ops) -> Tensor | None:
        """Run it once more as always, which makes whatever is made at its first use, then record it for the next time."""
        before, tables = memory.store.held(), _Tables(memory.rope)
        memory.rope = tables
        out = self.run(net, x, timesteps, text, memory, ops)
        tables.close()
        inputs, alike = (x.clone(), timesteps.clone(), memory.turn.clone()), text.times.of(timesteps).alike

        def work() -> Tensor | None:
            again = memory.over(before.held(), tables, inputs[2])
            return self.run(net, inputs[0], Embedded(inputs[1], alike), text, again, ops)

        try:
            replay, result = self.recorder.record(work)
        except RuntimeError as error:
            self.off = f"{type(error).__name__}: {error}"
            self.free()
            return out
        if len(owner.recordings) >= MOST:
            owner.recordings.popitem(last=False)
        owner.recordings[key] = _Recording(inputs, replay, result, (net, text, before, tables))
        self.recorded += 1
        return out


def can_record(memory: Exchange) -> bool:
    """Whether a pass is one whose work its layout decides: the ordinary one, over an ordinary store that stays on the device,
    of which it writes all frames or none."""
    if type(memory) is not Pass or "exchange" in vars(memory) or type(memory.store) is not Store:
        return False
    storage, plan = memory.store.storage, memory.plan
    whole = plan.write in ((), memory.call.span) and not plan.own
    return whole and not storage.offload and not storage.dense and isinstance(memory.turn, Tensor)


def graphs_for(device: torch.device | str) -> Graphs | None:
    """Graphs on an NVIDIA card, None elsewhere."""
    able = torch.device(device).type == "cuda" and torch.version.hip is None
    return Graphs(CudaRecorder()) if able else None
