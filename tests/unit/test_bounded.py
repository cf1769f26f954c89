"""The bounded memory against a list of 21 places that is kept by hand, and the table of its positions."""
import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.options import cache_of
from forcing_pack.forcing_core.plan import Call, layout
from forcing_pack.forcing_core.policies import BoundedOptions, build
from forcing_pack.forcing_core.presets import get
from forcing_testkit.forcing_corekit import gap, rotated
from forcing_testkit.policykit import video

pytestmark = pytest.mark.usefixtures("one_thread")

GRID, TOKENS, HEADS, LAYERS = (1, 2), 2, 1, 2
PUBLISHED = BoundedOptions()
NOISY = 2  # noisy passes before the clean one


def memory(options, frames):
    return make_memory(options, frames, layers=LAYERS, grid=GRID, head_dim=128, device="cpu")


def vector(*seed):
    draw = torch.Generator().manual_seed(sum(number * 1009 ** i for i, number in enumerate(seed)))
    return torch.randn(HEADS, 128, generator=draw)


def scenes(layer, sample, frame, step):
    """A raw key: what it shows changes every few frames, sooner in some layers and samples than in others, and the
    noise of the step hides more of it in every second scene."""
    scene = frame // (6 + 3 * layer + 6 * sample)
    hidden = 0.0 if step == NOISY or scene % 2 else 2.0
    return vector(1, scene, layer, sample) + hidden * vector(2, frame, step) + 0.05 * vector(3, frame, layer, sample)


def one_scene(layer, sample, frame, step):
    return vector(1)


def ever_new(layer, sample, frame, step):
    return vector(1, frame // 3, layer)


def projections(show, layer, samples, first, frames, step):
    """(k, v) [B, frames * tokens, H, 128]; values are told apart by frame and step."""
    k = torch.stack([torch.stack([show(layer, s, f, step) for f in range(first, first + frames)]) for s in samples])
    v = torch.stack([torch.stack([vector(4, f, step, s) for f in range(first, first + frames)]) for s in samples])
    return tuple(t.repeat_interleave(TOKENS, dim=1) for t in (k, v))


@dataclass
class Places:
    """Places of one layer and sample as a plain list of (frame, raw key, value), and the published rules over it."""

    options: BoundedOptions
    places: list = field(default_factory=list)
    count: int = 0
    keyframe: torch.Tensor | None = None
    done: int = -1  # first frame of the block that was promoted last
    current: int = -1

    def forward(self, block, phase, k, v):
        own = [(f, k[i:i + 1], v[i:i + 1]) for i, f in enumerate(range(block.first, block.end))]
        if self.options.released:
            self.consider(block, own)
        if block.first != self.current:
            self.current = block.first
            if len(self.places) + len(own) > 21:
                del self.places[15:15 + len(own)]
            self.places += own
        self.places[-len(own):] = own
        read = list(self.places)
        if not self.options.released and phase == "clean":
            self.consider(block, own)
        return read

    def consider(self, block, own):
        mean = torch.cat([k for _, k, _ in own]).mean(dim=0).flatten()
        if self.options.mode == "uniform":
            new = block.first >= 6 and block.first % self.options.interval == 0
        elif block.first < 6:
            new, self.keyframe = False, mean
        else:
            new = bool(torch.cosine_similarity(mean, self.keyframe, dim=0) < self.options.tau)
            self.keyframe = mean if new or self.options.released else self.keyframe
        if new and self.done != block.first:
            self.done = block.first
            if self.count == 12:
                self.places[3:15] = [*self.places[4:15], own[0]]
            else:
                self.places[3 + self.count] = own[0]
                self.count += 1


def in_places(store, plan, read):
    """Keys or values with their frames by place: what the store hands out is by slot."""
    order = store.order(plan.read)
    return read.unflatten(1, (-1, TOKENS))[:, [order.index(f) for f in plan.read]].flatten(1, 2)


def check(read, keys, values, first=0):
    """That these are the listed raw keys, turned to their places from `first` on, and their values."""
    raw, expected = (torch.cat([p[i] for p in read]).repeat_interleave(TOKENS, 0)[None] for i in (1, 2))
    assert torch.equal(values, expected)
    assert gap(keys, rotated(raw, range(first, first + len(read)), GRID)) <= 1e-5


def compare(options, show, frames, samples=(0, 1)):
    """Drive both through a whole video; returns the memory and {(layer, sample): Places}."""
    held = memory(options, frames)
    lists = {(layer, s): Places(options) for layer in range(LAYERS) for s in samples}
    for block in layout(frames, 3):
        for step in range(NOISY + 1):
            phase, end = "clean" if step == NOISY else "noisy", min(block.end, 21)
            now = held.begin(block.first, block.frames, phase)
            for layer in range(LAYERS):
                k, v = projections(show, layer, samples, block.first, block.frames, step)
                q = torch.randn(k.shape, generator=torch.Generator().manual_seed(step))
                silent = phase == "clean" and layer == LAYERS - 1  # all that the network wants of such a layer
                turned, keys, values = now.exchange(layer, None if silent else q, k, v)
                for i, s in enumerate(samples):
                    read = lists[layer, s].forward(block, phase, k[i, ::TOKENS], v[i, ::TOKENS])
                    if not silent:
                        assert gap(turned, rotated(q, range(end - block.frames, end), GRID)) <= 1e-5
                        check(read, *(in_places(held.store, now.plan, t[i:i + 1]) for t in (keys, values)))
            for (layer, i), places in zip(itertools.product(range(LAYERS), range(len(samples))), lists.values()):
                assert held.store.sources(layer, i) == tuple(p[0] for p in places.places)
    return held, lists


@pytest.mark.parametrize("changes", [{}, {"released": True}, {"compact": True}, {"mode": "uniform"},
                                     {"mode": "uniform", "interval": 3, "released": True}], ids=str)
def test_every_pass_reads_the_21_places(changes):
    """Promotion into the wrong place, of the wrong pass's keys, at another time, for all layers or samples alike, or
    without turning the frames that move up: each shows in what some pass reads."""
    _, lists = compare(replace(PUBLISHED, **changes), scenes, 3 * 30)
    assert lists[0, 0].count == 12 and lists[0, 0].places[3][0] > 6, "long enough for the oldest to go"
    if "mode" not in changes:
        assert len({places.places[3][0] for places in lists.values()}) > 1, "layers and samples differ"


def test_table_of_positions_for_60_chunks():
    """Sink at 0..2, nothing past 20, the query last; natural positions until 21 frames exist."""
    policy, held = build(PUBLISHED, 180), ()
    for block in layout(180, 3):
        plan = policy.plan(Call(block.first, 3, "noisy", held))
        held = plan.read
        end = min(block.end, 21)
        assert plan.positions == tuple(range(end)) and plan.query == (end - 3, end - 2, end - 1)
        assert plan.read[:3] == (0, 1, 2) and plan.read[-3:] == (block.first, block.first + 1, block.first + 2)
        assert max(plan.read) < block.end and len(plan.read) <= 21


def promoted(show, options=PUBLISHED, frames=60):
    return compare(options, show, frames, samples=(0,))[0].store.promoted


def test_promotions():
    """None without a surprise; one a block where every block is new; then the oldest go first."""
    assert promoted(one_scene) == {}
    blocks = tuple(range(6, 60, 3))
    for layer in range(LAYERS):
        assert promoted(ever_new, frames=6 + 9)[layer, 0] == blocks[:3]
        assert promoted(ever_new)[layer, 0] == blocks[-12:]
        assert promoted(ever_new, replace(PUBLISHED, tau=-1.0)).get((layer, 0)) is None


def test_only_the_clean_pass_decides():
    """A promotion in a noisy pass would keep unfinished keys for the rest of the video."""
    held = memory(PUBLISHED, 30)
    for block in layout(12, 3):
        for phase in ("noisy", "noisy", "clean"):
            before = dict(held.store.promoted)
            replay(held, block.first, 3, phase, ever_new)
            assert (held.store.promoted == before) == (phase == "noisy" or block.first < 6)


def replay(held, first, frames, phase, show=scenes):
    now = held.begin(first, frames, phase)
    for layer in range(LAYERS):
        k, v = projections(show, layer, (0,), first, frames, 9)
        now.exchange(layer, k, k, v)
    return held.store


def test_recache():
    """A replay of the first frames gives the slow places back to them; a later one leaves sink and slow places alone;
    after `forget` the replayed frames fill all places."""
    early, late = (compare(PUBLISHED, ever_new, frames, samples=(0,))[0] for frames in (15, 48))
    assert early.store.sources(0, 0)[3:6] == (6, 9, 12)
    assert replay(early, 0, 15, "recache").sources(0, 0) == tuple(range(15))
    slow = late.store.sources(0, 0)[:15]
    store = replay(late, 27, 21, "recache")
    assert store.sources(0, 0) == (*slow, *range(42, 48)) and slow[3] == 12
    late.forget()
    assert replay(late, 27, 21, "recache").sources(0, 0) == tuple(range(27, 48))


def test_the_head_of_a_block_can_be_longer():
    options = replace(PUBLISHED, promote=2, slow=5)
    held = memory(options, 40)
    for block in layout(21, 3):
        for phase in ("noisy", "clean"):
            replay(held, block.first, 3, phase, ever_new)
    assert held.store.promoted[0, 0] == (13, 15, 16, 18, 19)
    k, v = projections(ever_new, 0, (0,), 21, 3, 9)
    _, keys, values = held.begin(21, 3, "noisy").exchange(0, k, k, v)
    frames, slow = (13, 15, 16, 18, 19), slice(3 * TOKENS, 8 * TOKENS)
    check([(f, ever_new(0, 0, f, 9)[None], vector(4, f, 9, 0)[None]) for f in frames], keys[:, slow], values[:, slow], 3)


def test_compact_and_not_are_the_same_video():
    assert gap(video(replace(PUBLISHED, compact=True), 33), video(PUBLISHED, 33)) <= 1e-5


def test_the_preset_is_the_published_cache():
    options = cache_of(get("context-forcing"))
    assert options == PUBLISHED and options.window == get("context-forcing").window == 21


@pytest.mark.parametrize("options, message", [
    ({"mode": "none"}, "surprise, uniform"), ({"fast": 2}, "at least 3 frames"), ({"promote": 4}, "make no sense"),
    ({"slow": 0}, "make no sense"), ({"sink": -1}, "make no sense")])
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ForcingError, match=message):
        BoundedOptions(**options)
