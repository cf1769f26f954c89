"""Cache policies: small objects that turn a `Call` into a `Plan`.

A policy decides which past frames a forward may attend to, where they stand in time, what is kept and what is
evicted. It sees frame numbers only, never tensors of the network, and is built per run from a frozen options
dataclass. A new policy is one file in this folder and one row in `KINDS`; `window.py` is the model to follow.
"""
from __future__ import annotations

from typing import Callable, Protocol

from ..errors import ForcingError
from ..plan import Call, Plan
from ..store import Keys
from .bounded import Bounded, BoundedOptions
from .deep_compress import DeepCompress, DeepCompressOptions
from .deep_sink import DeepSink, DeepSinkOptions
from .ema_sink import EmaSink, EmaSinkOptions
from .memflow import MemFlow, MemFlowOptions
from .merging import Merging, MergingOptions
from .per_step import PerStep, PerStepOptions
from .recency import Recency, RecencyOptions
from .recompute import Recompute, RecomputeOptions
from .reference import Reference, ReferenceOptions
from .relax import Relax, RelaxOptions
from .rolling import Rolling, RollingOptions
from .rolling_sink import RollingSink, RollingSinkOptions
from .routing import Routing, RoutingOptions
from .window import Window, WindowOptions


class Policy(Protocol):
    """`capacity`: latent frames the store must hold. `keys`: the key arrangement the store needs.

    A policy that looks at keys, or changes them, brings more: `make_pass(plan, call, store, rope)` gives the pass
    (by default `passes.Pass`), `make_store(layers, capacity, frame_tokens, keys)` the store (`store.Store`), and
    `store_bytes(layers, frame_tokens, dim, batch, element_size)` what that takes. One whose memory can be flushed at a
    change of scene has `flushed(held, last)`, the frames that stay. One that chooses by prompt has `turned()`, called when
    another prompt takes over. `replays`: latent frames that a recache is given, where they are not `capacity`.
    `lingering(evictions)`: of the frames evicted so far, a tuple for each time, those of which tokens may be left.
    """

    capacity: int
    keys: Keys

    def plan(self, call: Call) -> Plan: ...


# kind -> (options dataclass, constructor from (options, frames of the whole video))
KINDS: dict[str, tuple[type, Callable[..., Policy]]] = {
    "window": (WindowOptions, Window),
    "rolling": (RollingOptions, Rolling),
    "ema_sink": (EmaSinkOptions, EmaSink),
    "deep_sink": (DeepSinkOptions, DeepSink),
    "deep_compress": (DeepCompressOptions, DeepCompress),
    "bounded": (BoundedOptions, Bounded),
    "routing": (RoutingOptions, Routing),
    "merging": (MergingOptions, Merging),
    "recency": (RecencyOptions, Recency),
    "recompute": (RecomputeOptions, Recompute),
    "rolling_sink": (RollingSinkOptions, RollingSink),
    "reference": (ReferenceOptions, Reference),
    "relax": (RelaxOptions, Relax),
    "memflow": (MemFlowOptions, MemFlow),
    "per_step": (PerStepOptions, PerStep),
}


def build(options, frames: int) -> Policy:
    """The policy for one run. `frames`: latent frames of the whole video, given ones included."""
    for kind, make in KINDS.values():
        if type(options) is kind:
            return make(options, frames)
    raise ForcingError(f"{type(options).__name__} is not the options of a known cache policy. "
                       f"Known kinds: {', '.join(KINDS)}.")


def replayed_frames(policy: Policy) -> int:
    """Newest latent frames that a recache of this memory goes over."""
    return getattr(policy, "replays", policy.capacity)
