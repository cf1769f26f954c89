"""What one condition remembers: its policy and its store. How a layer meets them is `passes.py`."""
from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from .errors import ForcingError
from .passes import Pass
from .plan import REFERENCE, Call, Phase, Plan
from .policies import Policy, build
from .policies.base import storage_of
from .rope import Rope
from .saved import Saved, Tree
from .sparse import Sparse, Sparsity, Video
from .store import PLAIN, Keys, Storage, Store, store_bytes, store_host_bytes


@dataclass
class Memory:
    """Store and policy of one condition; CFG has two of them.

    Built per run and dropped with it. `begin` makes the pass for the next forward.
    """

    policy: Policy
    store: Store
    rope: Rope
    jumps: dict[int, int] = field(default_factory=dict)  # first frame of a call -> temporal positions further away
    ahead: int = 0  # newest frames of every noisy pass that belong to the next block: attended to, never stored
    sparse: Sparsity | None = None  # attention to a part of what is read

    def begin(self, first: int, frames: int, phase: Phase, sigma: float = 0.0) -> Pass:
        beyond = self.ahead if phase == "noisy" else 0
        call = Call(first, frames - beyond, phase, self.store.frames, sigma, self.ahead)
        make = getattr(self.policy, "make_pass", Pass)
        plan = self.policy.plan(call)
        if beyond:
            plan, call = _beyond(plan, call, beyond), replace(call, frames=frames)
        if first in self.jumps and phase != "recache":
            plan = _jumped(plan, call.span, self.jumps[first])
        now = make(plan, call, self.store, self.rope)
        return now if self.sparse is None else self.sparse.around(now)

    def forget(self) -> None:
        """Drop every frame but a reference (a recache that also renews the sink starts with this)."""
        kept = [frame for frame in self.store.frames if frame >= REFERENCE]
        if kept:
            self.store.keep(kept)
        else:
            self.store.clear()

    def flush(self, last: int) -> None:
        """Drop every frame but the sink and the newest `last` ones (KV flush of arXiv 2511.20649)."""
        can_flush(self.policy)
        self.store.keep(self.policy.flushed(self.store.frames, last))

    def jump(self, first: int, distance: int) -> None:
        """Let the block that starts at frame `first`, and it alone, stand `distance` positions behind its place
        (RoPE cut of arXiv 2511.20649). The blocks after it find it where it belongs."""
        can_jump(self.policy)
        self.jumps[first] = distance

    def turned(self) -> None:
        """Another prompt rules from the next pass on: word for a policy that chooses by prompt."""
        if hasattr(self.policy, "turned"):
            self.policy.turned()

    def free(self) -> None:
        self.store.free()

    def state(self) -> Tree:
        """What a fresh memory of the same options needs to go on after the last pass."""
        policy = self.policy.state() if hasattr(self.policy, "state") else {}
        sparse = {} if self.sparse is None else {"sparse": self.sparse.state()}
        return {"store": self.store.state(), "policy": policy, "jumps": sorted(map(list, self.jumps.items())), **sparse}

    def load(self, saved: Saved, like: Tensor) -> None:
        """Become the memory that was saved. like: [B, 0, H, D] in the compute dtype, on the device of the run. Raises
        ForcingError for one that does not fit."""
        self.store.load(saved.part("store"), like)
        if hasattr(self.policy, "load"):
            self.policy.load(saved.part("policy"))
        self.jumps = saved.pairs("jumps")
        if self.sparse is not None and "sparse" in saved:  # a snapshot of a dense run leaves the heads to be looked at
            self.sparse.load(saved.part("sparse"), like.shape[2])


def _beyond(plan: Plan, call: Call, frames: int) -> Plan:
    """The same plan with so many frames behind the call's own ones, which are attended to without being stored."""
    own = tuple(range(call.first + call.frames, call.first + call.frames + frames))
    return replace(plan, own=plan.own + own, query=plan.query + tuple(plan.query[-1] + 1 + i for i in range(frames)))


def _jumped(plan: Plan, span: tuple[int, ...], distance: int) -> Plan:
    """The same plan with the call's own frames, and a reference, `distance` positions later."""
    moved = tuple(p + distance * (frame in span or frame >= REFERENCE) for frame, p in zip(plan.read, plan.positions))
    return replace(plan, positions=moved, query=tuple(p + distance for p in plan.query))


def can_flush(policy: Policy) -> None:
    """Raise ForcingError for a policy that cannot say what a flush leaves."""
    if not hasattr(policy, "flushed"):
        raise ForcingError(f"The memory of {type(policy).__name__} cannot be flushed: it holds more than frames. Use the "
                           "transition recache, keep or cut, or a plain window (Forcing Cache).")


def can_jump(policy: Policy) -> None:
    """Raise ForcingError for a policy whose keys cannot be moved in time afterwards."""
    if policy.keys is Keys.ROPED:
        raise ForcingError("A jump in time needs keys that can be moved, which absolute positions and videos that fit "
                           "into the window do not have. Set positions to 'relative' with a window shorter than the "
                           "video, or use the transition flush or cut.")


def make_memory(options, frames: int, *, layers: int, grid: tuple[int, int], head_dim: int, device,
                heads: int | None = None, ahead: int = 0, matrices: bool = False,
                sparse: Sparse | None = None) -> Memory:
    """An empty memory for one condition of a video of `frames` latent frames.

    options: those of a cache policy; grid: (rows, columns) of tokens in a latent frame. heads: of the network, only
    wanted where their positions differ. ahead: latent frames of a knot. matrices: as in `Rope`. sparse: attention to a
    part of what is read. Raises ForcingError for a kind of store, or a sparse kernel, that the device cannot do.
    """
    policy, storage = build(options, frames), storage_of(options)
    storage.coder.check(device)
    make = getattr(policy, "make_store", Store)
    variant = {} if storage == PLAIN else {"storage": storage}
    return Memory(policy, make(layers, policy.capacity, grid[0] * grid[1], policy.keys, **variant),
                  Rope(grid, head_dim, device, _bases(policy, heads), matrices), ahead=ahead,
                  sparse=_sparsity(sparse, device, Video(frames, options.block, policy.capacity, grid[0] * grid[1], layers)))


def _sparsity(sparse: Sparse | None, device, video: Video) -> Sparsity | None:
    if not sparse:
        return None
    sparse.check(device)
    return Sparsity(sparse, video)


def _bases(policy: Policy, heads: int | None) -> tuple[float, ...]:
    bases = policy.bases(heads or 1) if hasattr(policy, "bases") else ()
    if bases and heads is None:
        raise ForcingError("Positions that differ from head to head need the number of heads. Pass heads to make_memory, or "
                           "set jitter to 0.")
    return bases


def memory_bytes(policy: Policy, storage: Storage = PLAIN, **sizes: int) -> int:
    """Exact bytes of the device that the memory of one condition will take; sizes as `store.store_bytes` names them
    (layers, frame_tokens, dim, batch, element_size; heads have 128 channels)."""
    count = getattr(policy, "store_bytes", None)
    return count(**sizes) if count else store_bytes(capacity=policy.capacity, keys=policy.keys, storage=storage, **sizes)


def memory_host_bytes(policy: Policy, storage: Storage = PLAIN, **sizes: int) -> int:
    """Exact bytes of host memory that it will take beside them: none unless it is offloaded."""
    if not storage.offload:
        return 0
    count = getattr(policy, "store_host_bytes", None)
    return count(**sizes) if count else store_host_bytes(capacity=policy.capacity, keys=policy.keys, storage=storage, **sizes)
