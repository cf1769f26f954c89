"""The store: slots, bytes, and the three arrangements of keys."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import Memory
from forcing_pack.forcing_core.plan import Plan
from forcing_pack.forcing_core.policies import WindowOptions, build
from forcing_pack.forcing_core.rope import Rope
from forcing_pack.forcing_core.store import Keys, Store, store_bytes
from forcing_testkit.forcing_corekit import gap, rotated

GRID, TOKENS, HEADS, LAYERS = (2, 3), 6, 2, 2
ROPE = Rope(GRID, 128)


def projections(frame_numbers, layer=0, batch=1, dtype=torch.float32):
    """(q, k, v) of whole frames; the numbers are a function of frame and layer alone."""
    def draw(frame, what):
        generator = torch.Generator().manual_seed(1 + 1000 * frame + 10 * layer + what)
        return torch.randn(batch, TOKENS, HEADS, 128, generator=generator)

    return [torch.cat([draw(f, what) for f in frame_numbers], dim=1).to(dtype) for what in range(3)]


def make(capacity=4, keys=Keys.ROPED):
    return Store(LAYERS, capacity, TOKENS, keys)


def run(memory, first, frames, phase="noisy", batch=1, dtype=torch.float32):
    """One pass through all layers; returns the plan and copies of the (keys, values) read by each layer."""
    now = memory.begin(first, frames, phase)
    span = range(first, first + frames)
    read = [now.exchange(layer, *projections(span, layer, batch, dtype))[1:] for layer in range(LAYERS)]
    return now.plan, [(keys.clone(), values.clone()) for keys, values in read]


def memory(options, frames):
    policy = build(options, frames)
    return Memory(policy, Store(LAYERS, policy.capacity, TOKENS, policy.keys), ROPE)


@pytest.mark.parametrize("keys", Keys)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_bytes_are_what_was_announced(keys, dtype, batch):
    """What a node reserves before the run must be what the run takes, however long the video."""
    positions = {"positions": "absolute"} if keys is Keys.ROPED else {"positions": "relative"}
    held = memory(WindowOptions(window=5, sink=1, block=2, compact=keys is Keys.RAW, **positions), 40)
    assert held.store.keys is keys and held.store.nbytes == 0
    announced = store_bytes(layers=LAYERS, capacity=5, frame_tokens=TOKENS, dim=HEADS * 128, batch=batch,
                            element_size=dtype.itemsize, keys=keys)
    seen = []
    for first in range(0, 40, 2):
        run(held, first, 2, batch=batch, dtype=dtype)
        seen.append(held.store.nbytes)
    assert set(seen) == {announced}
    held.free()
    assert held.store.nbytes == 0 and held.store.frames == ()


def test_slots_are_reused_and_nothing_moves():
    """A store that shifts frames copies a whole window a block; a slot that is not freed overflows."""
    held = memory(WindowOptions(window=4, sink=1, block=1), 12)
    slots = {}
    for frame in range(12):
        run(held, frame, 1)
        for f, slot in held.store.slots.items():
            assert slots.setdefault(f, slot) == slot
        assert len(set(held.store.slots.values())) == len(held.store.slots) <= 4
        assert max(held.store.slots.values()) < 4
    assert held.store.frames == (0, 9, 10, 11)


def test_a_repeated_pass_overwrites_in_place():
    store = make()
    for value in (1.0, 2.0):
        store.place(Plan((), (0, 1), (0, 1), (0, 1), (0, 1)))
        for layer in range(LAYERS):
            store.write(layer, (0, 1), *[torch.full((1, 2 * TOKENS, HEADS, 128), value)] * 3)
    assert store.slots == {0: 0, 1: 1}
    plan = Plan((), (), (0, 1), (0, 1), (0, 1))
    assert all(torch.equal(t, torch.full_like(t, 2.0)) for t in store.read(0, plan, ROPE))


def test_layers_are_apart():
    store = make()
    store.place(Plan((), (0,), (0,), (0,), (0,)))
    for layer in range(LAYERS):
        store.write(layer, (0,), *[torch.full((1, TOKENS, HEADS, 128), float(layer))] * 3)
    plan = Plan((), (), (0,), (0,), (0,))
    assert [float(store.read(layer, plan, ROPE)[1].max()) for layer in range(LAYERS)] == [0.0, 1.0]


def test_overflow_is_refused_by_name():
    """Silently overwriting a frame that is still read would corrupt the video without a word."""
    store = make(capacity=2)
    store.place(Plan((), (0, 1), (0, 1), (0, 1), (0, 1)))
    with pytest.raises(ForcingError, match="no room for frame 2"):
        store.place(Plan((), (2,), (0, 1, 2), (0, 1, 2), (2,)))


def test_clear_keeps_the_buffers():
    store = make()
    store.place(Plan((), (0,), (0,), (0,), (0,)))
    store.write(0, (0,), *projections([0]))
    taken = store.nbytes
    store.clear()
    assert store.frames == () and store.positions == {} and store.nbytes == taken > 0


VIDEOS = [
    ("relative", {"window": 6, "sink": 2, "positions": "relative"}, 2, 24),
    ("relative_ones", {"window": 5, "sink": 2, "positions": "relative"}, 1, 16),
    ("relative_no_sink", {"window": 5, "sink": 0, "positions": "relative"}, 2, 16),
    ("relative_sink_over_block", {"window": 9, "sink": 5, "positions": "relative"}, 3, 24),
    ("relative_sink_of_two_blocks", {"window": 9, "sink": 6, "positions": "relative"}, 3, 24),
    ("rebased", {"window": 6, "sink": 2, "positions": "rebased", "limit": 13}, 2, 30),
    ("rebased_sink_over_block", {"window": 8, "sink": 4, "positions": "rebased", "limit": 10}, 2, 20),
]


@pytest.mark.parametrize("compact", [False, True], ids=["both", "raw"])
@pytest.mark.parametrize("name, options, block, frames", VIDEOS, ids=[v[0] for v in VIDEOS])
def test_moved_keys_equal_raw_keys_rotated_once(name, options, block, frames, compact):
    """After many moves a key must be what the raw key rotated straight to its position is: re-rotating a rotated key
    drifts, forgetting a move leaves it behind, and a wrong position record moves the wrong key."""
    held = memory(WindowOptions(block=block, compact=compact, **options), frames)
    assert held.store.keys is (Keys.RAW if compact else Keys.BOTH)
    for first in range(0, frames, block):
        for phase in ("noisy", "noisy", "clean"):
            plan, read = run(held, first, block, phase)
            order = sorted(plan.read, key=held.store.slots.__getitem__)
            where = dict(zip(plan.read, plan.positions))
            where.update(zip(range(first, first + block), plan.query))  # a block stands where its queries stand
            for layer, (keys, values) in enumerate(read):
                _, raw, v = projections(order, layer)
                assert gap(keys, rotated(raw, [where[f] for f in order], GRID)) <= 2e-6
                assert torch.equal(values, v)
    assert set(held.store.frames) < set(range(frames))


def test_raw_and_both_agree_when_the_first_block_is_shorter():
    """Regression: a position record made up for frames inside the sink rotates them wrongly in the next block."""
    reads = []
    for compact in (False, True):
        held = memory(WindowOptions(window=7, sink=4, block=3, positions="relative", compact=compact), 13)
        reads.append([run(held, first, n)[1] for first, n in ((0, 1), (1, 3), (4, 3), (7, 3), (10, 3))])
    for both, raw in zip(*reads):
        for (k1, v1), (k2, v2) in zip(both, raw):
            assert gap(k1, k2) <= 2e-6 and torch.equal(v1, v2)
    _, raw, _ = projections(range(4))
    assert gap(reads[0][1][0][0], rotated(raw, range(4), GRID)) <= 2e-6


def test_a_silent_last_layer_stores_without_reading():
    held = memory(WindowOptions(window=None, block=2), 4)
    now = held.begin(0, 2, "clean")
    assert now.silent
    _, k, v = projections((0, 1))
    now.exchange(0, k, k, v)
    assert now.exchange(1, None, k, v)[0] is None
    assert held.store.frames == (0, 1)
    plan = Plan((), (), (0, 1), (0, 1), (0, 1))
    assert gap(held.store.read(1, plan, ROPE)[0], rotated(k, [0, 1], GRID)) <= 2e-6


def test_values_are_not_rotated():
    held = memory(WindowOptions(window=None, block=2), 4)
    _, read = run(held, 0, 2)
    _, k, v = projections((0, 1))
    assert torch.equal(read[0][1], v) and gap(read[0][0], k) > 0.1
