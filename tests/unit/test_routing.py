"""Routed history against choices and softmaxes made one head and one query at a time."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.options import cache_of
from forcing_pack.forcing_core.policies import RoutingOptions, WindowOptions
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.rope import rotate
from forcing_testkit.forcing_corekit import Ops, gap, rotated
from forcing_testkit.policykit import attended, video

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, BATCH = 2, 2


def drive(options, frames, grid=(1, 2), kernel=None):
    """Write `frames` frames one by one, with other keys in their noisy pass; then one noisy pass over a block.

    Returns (output, q, [(clean k, v) of every frame], own (k, v), the pass)."""
    held = make_memory(options, frames + options.block, layers=1, grid=grid, head_dim=128, device="cpu")
    draw, past, tokens = torch.Generator().manual_seed(5), [], grid[0] * grid[1]
    for frame in range(frames):
        for phase in ("noisy", "clean"):
            q, k, v = torch.randn(3, BATCH, tokens, HEADS, 128, generator=draw)
            k = k + 2 * torch.randn(BATCH, 1, HEADS, 128, generator=draw)
            attended(held.begin(frame, 1, phase), 0, q, k, v)
        past.append((k, v))
    q, k, v = torch.randn(3, BATCH, options.block * tokens, HEADS, 128, generator=draw)
    now = held.begin(frames, options.block, "noisy")
    return attended(now, 0, q, k, v, kernel), q, past, (k, v), now


def branch(q, k, v):
    """(output, log of the sum of weights) of one query [128] over keys [m, 128]."""
    logits = k.double() @ q.double() / 128 ** 0.5
    return logits.softmax(0) @ v.double(), logits.logsumexp(0)


def routed(options, q, past, own, groups, grid):
    """Attention by the rule: choose for each head and group of queries, attend to history and own frames apart, and
    merge the two by their sums of weights."""
    out, means = torch.empty_like(q), torch.stack([k.mean(dim=1) for k, _ in past], dim=1)
    count = min(len(past), options.chosen)
    always = {*range(options.sink), *range(len(past) - options.recent, len(past))}
    turned = rotated(q, range(count, count + options.block), grid)
    own_k = rotated(own[0], range(count, count + options.block), grid)
    for b in range(q.shape[0]):
        for h in range(HEADS):
            for group in groups:
                score = means[b, :, h] @ q[b, group, h].mean(dim=0)
                rest = sorted(set(range(len(past))) - always, key=lambda j: -float(score[j]))
                picked = sorted([*always, *rest][:count] if len(always) < count else range(count))
                keys = rotated(torch.cat([past[j][0] for j in picked], dim=1), range(count), grid)
                values = torch.cat([past[j][1] for j in picked], dim=1)
                for i in group:
                    o1, l1 = branch(turned[b, i, h], keys[b, :, h], values[b, :, h])
                    o2, l2 = branch(turned[b, i, h], own_k[b, :, h], own[1][b, :, h])
                    top = torch.maximum(l1, l2)
                    w1, w2 = (l1 - top).exp(), (l2 - top).exp()
                    out[b, i, h] = ((o1 * w1 + o2 * w2) / (w1 + w2)).float()
    return out


SIZES = {"token": 1, "block": 128, "head": 10 ** 6}


@pytest.mark.parametrize("group, grid", [("token", (1, 2)), ("head", (1, 2)), ("block", (6, 8))])
@pytest.mark.parametrize("sink, recent", [(1, 2), (0, 0)])
def test_equals_the_rule(group, grid, sink, recent):
    """Scores of rotated keys, of noisy ones, of another head; a choice not in temporal order; positions that are not
    packed; own frames left out: each gives other numbers. Choosing per head is one merged softmax of two branches."""
    options = RoutingOptions(top_k=2, sink=sink, recent=recent, group=group, block=3)
    out, q, past, own, _ = drive(options, 8, grid)
    n = q.shape[1]
    groups = [list(range(start, min(start + SIZES[group], n))) for start in range(0, n, SIZES[group])]
    assert len(groups) == {"token": 6, "head": 1, "block": 2}[group]
    assert gap(out, routed(options, q, past, own, groups, grid)) <= 1e-5


@pytest.mark.parametrize("group", SIZES)
@pytest.mark.parametrize("extra", [0, 3])
def test_choosing_all_is_dense(group, extra):
    """k = everything: one softmax over all frames at their own positions. At exactly as many frames as are chosen, and
    below."""
    options = RoutingOptions(top_k=6 + extra, sink=1, recent=1, group=group, block=2)
    out, q, past, own, now = drive(options, 8)
    keys, values = (torch.cat([*(pair[i] for pair in past), own[i]], dim=1) for i in range(2))
    dense = Ops().attention(*(rotate(t, now.rope.table(places)) for t, places in ((q, (8, 9)), (keys, range(10)))), values)
    assert gap(out, dense) <= 1e-6


@pytest.mark.parametrize("group", SIZES)
def test_a_forced_choice_of_all_but_one_goes_through_the_groups(group):
    """Routing at work, with an outcome known without scores: the only frame that can be left out is the least liked."""
    options = RoutingOptions(top_k=1, sink=3, recent=3, group=group, block=1)
    out, q, past, own, now = drive(options, 8)
    q, own = q[:, :2], own  # one frame
    tokens = [[i] for i in range(2)] if group == "token" else [[0, 1]]
    assert now.past == list(range(8)) and options.chosen == 7
    assert gap(out, routed(options, q, past, own, tokens, (1, 2))) <= 1e-5


@pytest.mark.parametrize("group", SIZES)
def test_a_video_with_all_frames_chosen_is_the_dense_video(group):
    dense = video(WindowOptions(None, 0, 3), 15)
    assert gap(video(RoutingOptions(top_k=12, sink=0, recent=0, group=group), 15), dense) <= 1e-5
    assert gap(video(RoutingOptions(top_k=1, sink=0, recent=0, group=group), 15), dense) > 1e-3


@pytest.mark.parametrize("group, calls", [("head", 1), ("block", 2), ("token", 0)])
def test_calls_of_the_kernel(group, calls):
    """The grouped forms run on whatever kernel the host has; each call gets only what was chosen."""
    seen = []

    def kernel(q, k, v):
        seen.append((q.shape[1], k.shape[1]))
        return Ops().attention(q, k, v)

    drive(RoutingOptions(top_k=2, sink=1, recent=1, group=group, block=3), 8, (6, 8), kernel)
    assert len(seen) == calls and sum(n for n, _ in seen) in (0, 144)
    assert {m for _, m in seen} <= {48 * (4 + 3)}


def test_descriptions_come_from_the_clean_pass():
    """A noisy pass would describe a frame by keys that nobody will attend to; they are made once."""
    options = RoutingOptions(block=1)
    held = make_memory(options, 4, layers=1, grid=(1, 2), head_dim=128, device="cpu")
    draw, seen = torch.Generator().manual_seed(1), []
    for phase in ("noisy", "noisy", "clean"):
        q, k, v = torch.randn(3, 1, 2, HEADS, 128, generator=draw)
        held.begin(0, 1, phase).exchange(0, q, k, v)
        seen.append(held.store.means[0][0, 0].clone())
    assert float(seen[0].abs().max()) == 0 and torch.equal(seen[0], seen[1])
    assert gap(seen[2], k[0].mean(dim=0)) <= 1e-6


def test_plans():
    """Own frames stand right behind the chosen ones, the window drops candidates, and nothing lies in the future."""
    options = RoutingOptions(top_k=2, sink=1, recent=1, window=9, block=3)
    *_, now = drive(options, 20)
    assert now.past == [0, 15, 16, 17, 18, 19] and now.plan.write == (20, 21, 22) == now.order
    assert now.plan.query == (4, 5, 6) and max(now.plan.read) == 22
    assert all(0 <= p < 4 for f, p in zip(now.plan.read, now.plan.positions) if f < 20)


def test_recache_rewrites_and_describes_anew():
    options = RoutingOptions(top_k=1, sink=1, recent=1, block=3)
    *_, now = drive(options, 8)
    store, before = now.store, now.store.means[0].clone()
    held = make_memory(options, 11, layers=1, grid=(1, 2), head_dim=128, device="cpu")
    held.store = store
    q, k, v = torch.randn(3, BATCH, 22, HEADS, 128, generator=torch.Generator().manual_seed(8))
    replay = held.begin(0, 11, "recache")
    assert attended(replay, 0, q, k, v).isfinite().all() and replay.plan.query == tuple(range(11))
    assert gap(store.means[0][:, store.slots[4]], k[:, 8:10].mean(dim=1)) <= 1e-6
    assert gap(store.means[0], before) > 0.1


def test_the_preset():
    options = cache_of(get("resampling-forcing"))
    assert (options.top_k, options.sink, options.window) == (5, 1, None)
    assert get("resampling-forcing").available


@pytest.mark.parametrize("options, message", [
    ({"group": "layer"}, "head, block, token"), ({"top_k": -1}, "make no sense"),
    ({"top_k": 0, "sink": 0, "recent": 0}, "at least 1 frame"), ({"window": 3}, "at least 4 frames")])
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ForcingError, match=message):
        RoutingOptions(**options)
