"""Sparse attention: kernels against the dense mask, everything selected against dense attention, and what methods choose."""
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.joined import can_join
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.plan import Call, layout
from forcing_pack.forcing_core.policies import KINDS, WindowOptions
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.saved import Saved, copied, split
from forcing_pack.forcing_core.sparse import (
    KERNELS,
    AnnOptions,
    Blocks,
    CrossOptions,
    DummyOptions,
    LightOptions,
    Selection,
    Sparse,
    Video,
    View,
    ann,
    cross,
    dummy,
    kernels,
    light,
    selection,
    view,
)
from forcing_testkit import forcing_corekit as core
from forcing_testkit.policykit import GRID, LEVELS, SampleNoise, network, softmax_attention
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")
# everything is selected, and by the way that selects, not by a dense pass
EVERYTHING = {
    "light": Sparse(LightOptions(0.0, 0.0, keep=99, block=4)),
    "light in two stages": Sparse(LightOptions(0.0, 0.0, keep=99, sink=50, near=49, block=64)),
    "hashing": Sparse(AnnOptions("lsh", bits=0, density=1.0, group=4, dense_steps=0)),
    "low bits": Sparse(AnnOptions("quant", density=1.0, group=5, dense_steps=0)),
    "dummy": Sparse(DummyOptions(share=0.0, local=99)),
    "prompt, hashing": Sparse(prompt=CrossOptions("lsh", bits=0, density=1.0, dense_steps=0)),
    "prompt, low bits": Sparse(prompt=CrossOptions("quant", density=1.0, dense_steps=0)),
}
SPARSER = {
    "light": Sparse(LightOptions(0.5, 0.6, keep=3, sink=1, near=1, block=2)),
    "hashing": Sparse(AnnOptions("lsh", bits=3, tables=2, group=4, dense_steps=0)),
    "low bits": Sparse(AnnOptions("quant", density=0.3, group=4, dense_steps=0)),
    "dummy": Sparse(DummyOptions(share=0.5, local=3)),
    "prompt": Sparse(prompt=CrossOptions("quant", density=0.3, dense_steps=0)),
    "both": Sparse(LightOptions(0.5, 0.6, block=3), CrossOptions("quant", density=0.3)),
}
WINDOW = WindowOptions(window=9, sink=3, positions="relative")


def memory_of(sparse, options=WINDOW, frames=15):
    config = network().config
    return make_memory(options, frames, layers=config.layers, grid=GRID, head_dim=core.HEAD_DIM, device="cpu",
                       heads=config.heads, sparse=sparse)


def video(sparse, options=WINDOW, frames=15, noise=None, memory=None, samples=(0,)):
    memory = memory or memory_of(sparse, options, frames)
    texts = torch.cat([core.prompts(seed=sample) for sample in samples])
    denoiser = NetworkDenoiser(network(), [Condition([texts], memory)])
    parts = [x0 for _, x0 in block_rollout(denoiser, layout(frames, options.block), LEVELS,
                                           noise or SampleNoise(samples, frames), block=options.block)]
    return torch.cat(parts, dim=2)


def seen(frames, own, *, block=3, tokens=6, layer=0, step=1, length=21, window=21, first=None, layers=1):
    """A view of these source frames, of which the last `own` are the call's."""
    call = Call(frames[-own] if first is None else first, own, "noisy")
    return View(Video(length, block, window, tokens, layers), call, layer, step, tuple(frames), frozenset(frames[-own:]),
                view.Heads())


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    """Largest difference as a part of the largest number: a video is many attentions, and its numbers are not of order 1."""
    return float((a - b).abs().max() / b.abs().max())


@dataclass(frozen=True)
class Pseudo:
    """A pass that has keys of these frames."""

    order: tuple[int, ...]
    call: Call


# -- kernels ------------------------------------------------------------------------------------------------------

@st.composite
def selections(draw):
    sizes = st.integers(1, 9)
    blocks = [Blocks(draw(st.integers(1, 40)), min(size, run), run) for size, run in
              ((draw(sizes), draw(sizes)) for _ in range(2))]
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 999))
    chosen = selection.never_empty(numbers(batch, heads, *(b.count for b in blocks), seed=seed) > draw(st.floats(-1, 1.5)))
    order = numbers(batch, heads, blocks[0].tokens, seed=seed + 1).argsort(dim=-1) if draw(st.booleans()) else None
    return Selection(*blocks, chosen, order)


def tensors_for(made, width=16):
    batch, heads = made.chosen.shape[:2]
    return [numbers(batch, blocks.tokens, heads, width, seed=i)
            for i, blocks in enumerate((made.queries, made.keys, made.keys))]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(selections())
def test_the_mask_and_both_kernels_are_one_attention(made):
    """The reference is checked against a softmax written out in float64."""
    q, k, v = tensors_for(made)
    expected = torch.stack([
        torch.einsum("nm,md->nd", (q[b, :, h].double() @ k[b, :, h].double().T / 4).masked_fill(
            ~made.mask()[b, h], -torch.inf).softmax(-1), v[b, :, h].double())
        for b in range(len(q)) for h in range(q.shape[2])]).view(len(q), q.shape[2], q.shape[1], -1).transpose(1, 2).float()
    assert core.gap(kernels.masked(q, k, v, made), expected) <= 1e-6
    assert core.gap(kernels.gathered(q, k, v, made), expected) <= 1e-6


def test_flex_attention_gets_the_same_mask():
    """Uncompiled, torch computes FlexAttention anywhere; what is filled up to whole blocks takes no part."""
    queries, keys = Blocks(21, 4, 7), Blocks(33, 5, 11)
    chosen = selection.never_empty(numbers(2, 3, queries.count, keys.count) > 0.3)
    for order in (None, numbers(2, 3, 21).argsort(dim=-1)):
        made = Selection(queries, keys, chosen, order)
        q, k, v = tensors_for(made)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = kernels.flexed(q, k, v, made, compiled=False)
        assert core.gap(found, kernels.masked(q, k, v, made)) <= 1e-6
        assert torch.equal(kernels.block_mask(made).to_dense().bool(), chosen)


def test_gathering_in_many_parts(monkeypatch):
    made = Selection(Blocks(24, 4, 12), Blocks(36, 3, 12), selection.never_empty(numbers(2, 2, 6, 12) > 0.5))
    q, k, v = tensors_for(made)
    whole = kernels.gathered(q, k, v, made)
    monkeypatch.setattr(kernels, "GATHERED", 1)
    assert core.gap(kernels.gathered(q, k, v, made), whole) <= 1e-6


def test_other_values_than_chosen_ones_do_not_count():
    made = Selection(Blocks(6, 3, 6), Blocks(9, 3, 9), torch.tensor([[[[True, False, False], [False, True, True]]]]))
    q, k, v = tensors_for(made)
    for kernel in (kernels.masked, kernels.gathered):
        before, changed = kernel(q, k, v, made), v.clone()
        changed[:, 3:] += 100
        after = kernel(q, k, changed, made)
        assert torch.equal(after[:, :3], before[:, :3]) and core.gap(after[:, 3:], before[:, 3:]) > 1
    assert core.gap(kernels.gathered(q[:, 3:], k[:, 3:], v[:, 3:], Selection(Blocks(3, 3, 3), Blocks(6, 3, 6), torch.ones(
        1, 1, 1, 2, dtype=torch.bool))), softmax_attention(q[:, 3:], k[:, 3:], v[:, 3:])) <= 1e-6


def test_ragged_blocks_are_told_apart():
    """Two whole frames of 5 tokens and the beginning of a third, in blocks of 2: nothing crosses a frame's edge."""
    blocks = Blocks(13, 2, 5)
    assert blocks.of("cpu").tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7] and blocks.count == 8
    assert blocks.table("cpu").tolist()[2:] == [[4, 13], [5, 6], [7, 8], [9, 13], [10, 11], [12, 13]]
    t = numbers(1, 13, 1, 4)
    assert core.gap(blocks.mean(t)[0, 0, 2:4], torch.stack([t[0, 4, 0], t[0, 5:7, 0].mean(0)])) <= 1e-6


def test_a_card_that_cannot_is_told():
    with pytest.raises(ForcingError, match="'flex' cannot run here: the device is cpu.*'auto' or 'gather'"):
        memory_of(Sparse(LightOptions(), kernel="flex"))
    assert [name for name in KERNELS if name != "flex"] == ["auto", "gather", "mask"]
    made = Selection(Blocks(6, 3, 6), Blocks(9, 1, 9), torch.ones(1, 1, 2, 9, dtype=torch.bool))
    with pytest.raises(ForcingError, match="blocks of 3 queries and 1 keys"):
        KERNELS["flex"](*tensors_for(made), made)


def test_older_cards_are_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert kernels.why_not_flex("cuda") == "Tesla T4 has compute capability 7.5, and 8.0 is needed"


# -- everything selected is dense attention -------------------------------------------------------------------------

@pytest.mark.parametrize("name", EVERYTHING)
def test_everything_selected_is_dense(name, monkeypatch):
    asked, plain = [], kernels.gathered
    monkeypatch.setitem(KERNELS, "gather", lambda *a: asked.append(a[3].chosen.all()) or plain(*a))
    made, dense = video(replace(EVERYTHING[name], kernel="gather"), samples=(0, 1)), video(None, samples=(0, 1))
    assert relative(made, dense) <= 1e-6 and asked and (all(asked) or name == "dummy")


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "dummy"])
def test_everything_selected_is_dense_in_one_attention(name):
    """The numbers of a softmax in float64, by what the network calls. Heads have to be looked at first, see above."""
    now = memory_of(replace(EVERYTHING[name], kernel="gather")).begin(0, 3, "clean")
    q, k, v = (numbers(2, count * 6, 2, core.HEAD_DIM, seed=count) for count in (3, 9, 9))
    now.inner = Pseudo((0, 1, 2, 3, 4, 5, 6, 7, 8), Call(6, 3, "clean"))
    attend = now.attend_prompt if name.startswith("prompt") else now.attend
    assert core.gap(attend(0, q, k, v, None), softmax_attention(q, k, v)) <= 1e-6


# settings under which a short video forgets
SMALL = {"window": {"window": 9, "sink": 3, "positions": "relative"}, "merging": {"budget": 4, "recent": 1, "sink": 1},
         "deep_compress": {"window": 9, "sink": 3, "recent": 3, "budget": 7}, "deep_sink": {"window": 9, "sink": 4},
         "ema_sink": {"window": 9}, "routing": {"top_k": 2, "recent": 1}, "recency": {"window": 10, "sink": 3, "recent": 3}}


@pytest.mark.parametrize("policy", [name for name, (kind, _) in KINDS.items() if kind.rollout == "block"])
def test_everything_selected_is_dense_in_every_memory(policy):
    """Over memories of tokens, of groups with biases, of routed frames."""
    options = KINDS[policy][0](**SMALL.get(policy, {}))
    assert relative(video(EVERYTHING["light"], options, 12), video(None, options, 12)) <= 1e-6


@pytest.mark.parametrize("name", SPARSER)
def test_less_selected_is_something_else(name):
    """Another video than the dense one, the same under the mask and the fast kernel."""
    made = video(SPARSER[name], frames=18)
    assert core.gap(made, video(replace(SPARSER[name], kernel="mask"), frames=18)) <= 1e-5
    assert core.gap(made, video(None, frames=18)) > 1e-4


@pytest.mark.parametrize("name", SPARSER)
def test_later_noise_changes_nothing_before(name):
    """Blocks 0 to 3 of five: causal, and none of them depends on what is chosen afterwards."""
    other = SampleNoise((0,), 15)
    other.draws[:, 12:] += 1
    before, after = video(SPARSER[name]), video(SPARSER[name], noise=other)
    assert torch.equal(before[:, :, :12], after[:, :, :12]) and core.gap(before[:, :, 12:], after[:, :, 12:]) > 1e-3


def test_nothing_sparse_is_the_plain_pass():
    assert memory_of(Sparse()).sparse is None and memory_of(None).sparse is None
    plain = memory_of(Sparse(LightOptions()))
    assert not can_join(plain)


# -- Light Forcing --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings_, published", [
    ((0.88, 0.98, 21, 3, 21), [0, .827, .855, .872, .883, .892, .898]),
    ((0.80, 0.90, 21, 3, 21), [0, .747, .775, .792, .803, .812, .818]),
    ((0.85, 0.95, 63, 3, 12), [0, .734, .774, .798, .814, .826, .835, .842, .848, .854, .858, .862, .865, .869, .871, .874,
                              .876, .878, .880, .882, .883])])
def test_growth_as_published(settings_, published):
    made = light.growth(*settings_)
    assert [round(s, 3) for s in made] == published
    seen_ = [min(3 * (i + 1), settings_[4]) for i in range(1, len(made))]
    assert sum(s * n for s, n in zip(made[1:], seen_)) / sum(seen_) == pytest.approx(settings_[0])


def test_streams_without_end_have_a_plan():
    assert len(light.growth(0.88, 0.98, 1 << 30, 3, 12)) == 341


def test_light_takes_frames_first():
    """By hand: of past frames 0 to 5 the oldest, the newest and the one with the mean key most like the query; own always."""
    options = LightOptions(0.0, 0.0, keep=3, sink=1, near=1, block=2)
    now = seen(range(7), 1, tokens=2, block=1, length=7)
    k = torch.zeros(1, 14, 1, 4)
    k[0, 6:8, 0, 0], k[0, 4:6, 0, 1] = 3.0, 3.0
    q = torch.zeros(1, 2, 1, 4)
    q[..., 0] = 1.0
    assert light.choose(options, now, q, k).chosen[0, 0, 0].nonzero()[:, 0].tolist() == [0, 3, 5, 6]


def test_light_takes_the_best_blocks_of_those():
    """Half of 10 blocks at most, and of the eligible ones alone: fewer where there are no more."""
    k, q = numbers(1, 20, 2, 8), numbers(1, 4, 2, 8, seed=1)
    now = seen(range(5), 1, tokens=4, block=1, length=5)
    options = LightOptions(0.5, 0.5, keep=4, sink=0, near=0, block=2)
    made = light.choose(options, now, q, k)
    scores = torch.einsum("qhd,khd->hqk", q[0].view(2, 2, 2, 8).mean(1), k[0].view(10, 2, 2, 8).mean(1))
    assert torch.equal(made.chosen[0], selection.top(scores, 5))
    few = light.choose(replace(options, sparsity=0.1, base=0.1, keep=1), now, q, k).chosen
    assert few.sum(-1).unique().tolist() == [4] and few[..., 8:].all()


def test_light_is_dense_without_a_past():
    assert light.choose(LightOptions(), seen(range(3), 3), numbers(1, 18, 2, 8), numbers(1, 18, 2, 8)) is None


# -- AnnSA, AnnCA -----------------------------------------------------------------------------------------------------

def test_hashing_finds_who_shares_a_bucket():
    """Against the rule written out for every query and key; groups attend to what one of them finds."""
    q, k = numbers(2, 12, 2, 8), numbers(2, 18, 2, 8, seed=1)
    options = AnnOptions("lsh", bits=3, tables=2, density=1.0, group=1, dense_steps=0)
    made = ann.choose(options, seen(range(3), 2), q, k)
    asked, keys = ann.codes(q, 3, 2, 0), ann.codes(k - k.mean(1, keepdim=True), 3, 2, 0)
    wanted = (asked[:, :, :, None] == keys[:, :, None]).any(-1)
    assert torch.equal(made.mask(), selection.never_empty(wanted)) and 0.1 < wanted.float().mean() < 0.5
    grouped = ann.choose(replace(options, group=4), seen(range(3), 2), q, k).mask()
    assert bool((grouped | ~wanted).all()) and grouped.float().mean() < 1
    capped = ann.choose(replace(options, density=0.2), seen(range(3), 2), q, k).mask()
    counts = (asked[:, :, :, None] == keys[:, :, None]).sum(-1)
    few = wanted.sum(-1) <= 3
    assert torch.equal(capped[few], selection.never_empty(wanted)[few]) and (capped[~few].sum(-1) == 3).all() and (~few).any()
    assert torch.equal((counts * capped)[~few].sum(-1), counts.topk(3).values.sum(-1)[~few])


def test_hashing_does_not_see_what_changes_no_attention():
    """A vector added to all keys, and channels of zeros behind the others, as key biases bring."""
    q, k = numbers(1, 6, 2, 8), numbers(1, 18, 2, 8, seed=1)
    options, now = AnnOptions("lsh", bits=3, tables=2, dense_steps=0), seen(range(3), 1)
    made = ann.choose(options, now, q, k).mask()
    wide = [torch.nn.functional.pad(t, (0, 8)) for t in (q, k + 5 * numbers(2, 8, seed=9))]
    assert torch.equal(ann.choose(options, now, *wide).mask(), made)


def test_low_bits_find_the_most_alike():
    q, k = numbers(1, 6, 2, 32), numbers(1, 30, 2, 32, seed=1)
    made = ann.choose(AnnOptions("quant", density=0.2, group=1, dense_steps=0), seen(range(5), 1), q, k).mask()
    exact = selection.top(torch.einsum("bnhd,bmhd->bhnm", q, k), 6)
    assert made.sum(-1).unique().tolist() == [6] and (made & exact).sum() / exact.sum() > 0.95
    rough = ann.choose(AnnOptions("quant", 2, density=0.2, group=1, dense_steps=0), seen(range(5), 1), q, k).mask()
    assert (rough & exact).sum() < (made & exact).sum()


def test_first_steps_and_named_layers_are_dense():
    q, k = numbers(1, 6, 2, 8), numbers(1, 18, 2, 8)
    options = AnnOptions(dense_steps=2, dense_layers=(3,))
    chosen = {(layer, step): ann.choose(options, seen(range(3), 1, layer=layer, step=step), q, k) is not None
              for layer in (0, 3) for step in (0, 1, 2, None)}
    assert [at for at, sparse in chosen.items() if sparse] == [(0, 2), (0, None)]


def test_steps_are_counted_for_every_block():
    memory, steps = memory_of(Sparse(AnnOptions())), []
    for first in (0, 3):
        steps += [memory.begin(first, 3, phase).step for phase in ("noisy", "noisy", "clean")]
    assert steps == [0, 1, None] * 2


@pytest.mark.parametrize("search", ["lsh", "quant"])
def test_a_frame_keeps_of_the_prompt_what_one_of_its_queries_finds(search):
    q, k = numbers(1, 12, 2, 16), numbers(1, 20, 2, 16, seed=1)
    made = cross.choose(CrossOptions(search, bits=4, density=0.25, dense_steps=0), seen(range(5), 2), q, k)
    if search == "lsh":
        asked, keys = ann.codes(q, 4, 1, 0), ann.codes(k - k.mean(1, keepdim=True), 4, 1, 0)
        counts = (asked[:, :, :, None] == keys[:, :, None]).sum(-1).unflatten(2, (2, 6)).sum(3)
        wanted = selection.never_empty((counts > 0) & selection.top(counts.int(), 5))
    else:
        products = torch.einsum("bnhd,bmhd->bhnm", ann.rounded(q, 4), ann.rounded(k, 4))
        wanted = selection.top(products.unflatten(2, (2, 6)).amax(3), 5)
    assert torch.equal(made.mask(), wanted.repeat_interleave(6, 2)) and not wanted.all()


# -- Dummy Forcing ----------------------------------------------------------------------------------------------------

def test_heads_are_told_apart():
    """Two layers of two heads: the ones with the most mass on the current block are dummies, over all layers."""
    mass = {0: torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]), 1: torch.tensor([[0.2, 0.6, 0.2], [0.1, 0.1, 0.8]])}
    assert dummy.compared(mass, 0.5) == ((dummy.DUMMY, dummy.SINK), (dummy.LOCAL, dummy.DUMMY))
    assert dummy.compared(mass, 0.0) == ((dummy.LOCAL, dummy.SINK), (dummy.LOCAL, dummy.SINK))


def test_every_kind_of_head_sees_its_frames():
    """By hand: keys of frames 0-8 in the order of a store that reused slots; blocks of 2, the call's frames 7 and 8."""
    frames = (0, 1, 6, 7, 8, 3, 4, 5, 2)
    now = replace(seen(range(9), 2, block=2, tokens=1), frames=frames)
    now.heads.kinds = ((dummy.DUMMY, dummy.SINK, dummy.LOCAL),)
    made = dummy.choose(DummyOptions(local=3), now, numbers(1, 2, 3, 8), numbers(1, 9, 3, 8))
    found = [sorted(frames[i] for i in row.nonzero()[:, 0].tolist()) for row in made.chosen[0, :, 0]]
    assert found == [[5, 6, 7, 8], [0, 1, 7, 8], [4, 5, 6, 7, 8]]


def test_heads_are_looked_at_once_a_middle_is_there():
    """At the first step of the third block; from its second step on they are sparse."""
    memory, known = memory_of(Sparse(DummyOptions())), []
    texts = core.prompts()
    denoiser = NetworkDenoiser(network(), [Condition([texts], memory)])
    for _ in block_rollout(denoiser, layout(12, 3), LEVELS, SampleNoise((0,), 12), block=3):
        known.append(len(memory.sparse.heads.kinds))
    layers = network().config.layers
    assert known == [0, 0, layers, layers]


def test_a_snapshot_knows_the_heads():
    memory = memory_of(Sparse(DummyOptions()))
    video(None, memory=memory)
    tree = copied(memory.state())
    plain, tensors = split(tree)
    config, fresh = network().config, memory_of(Sparse(DummyOptions()))
    fresh.load(Saved(plain, tensors), torch.empty(1, 0, config.heads, core.HEAD_DIM))
    assert fresh.sparse.heads.kinds == memory.sparse.heads.kinds != ()
    plain["sparse"]["heads"][0][0] = 7
    with pytest.raises(ForcingError, match="heads.*does not fit this network"):
        fresh.load(Saved(plain, tensors), torch.empty(1, 0, config.heads, core.HEAD_DIM))


def test_masses_are_those_of_dense_attention():
    q, k = numbers(1, 6, 2, 8), numbers(1, 18, 2, 8)
    now = seen(range(9), 3, tokens=2, layers=2, step=0)
    assert dummy.choose(DummyOptions(), now, q, k) is None
    weights = (torch.einsum("nhd,mhd->hnm", q[0], k[0]) * 8 ** -0.5).softmax(-1).mean(1)
    assert core.gap(now.heads.mass[0], weights.unflatten(1, (3, 6)).sum(2)) <= 1e-6


# -- what a pass tells, and settings ------------------------------------------------------------------------------------

def test_places_of_keys():
    assert view.places(12, 3, 6, (0, 4, 5, 3), (4, 5)) == ((0, 4, 5, 3), {4, 5})
    assert view.places(14, 3, 6, None, (4, 5)) == ((0, 1, 2, 3, 4), {3, 4})  # tokens: the newest are the call's own
    now = seen((1 << 39, 2, 1, 7), 1)
    assert now.past == (0, 2, 1)  # a reference counts as the oldest


@pytest.mark.parametrize("make, match", [
    (lambda: LightOptions(0.9, 0.8), "0 <= sparsity <= base < 1"),
    (lambda: LightOptions(keep=2, sink=1, near=2), "Keep at least 1 frame"),
    (lambda: LightOptions(block=0), "blocks of 1 or more"),
    (lambda: AnnOptions("tree"), "Use one of lsh, quant"),
    (lambda: AnnOptions("quant", bits=1), "2 to 8 bits"),
    (lambda: AnnOptions(bits=13), "0 to 12 bits"),
    (lambda: AnnOptions(tables=0), "1 to 64 tables"),
    (lambda: AnnOptions(density=0.0), "above 0 and at most 1"),
    (lambda: AnnOptions(group=0), "at least 1"),
    (lambda: AnnOptions(dense_steps=-1), "from 0 on"),
    (lambda: CrossOptions(density=1.5), "above 0 and at most 1"),
    (lambda: DummyOptions(share=1.5), "share of 0 to 1"),
    (lambda: Sparse(CrossOptions()), "Use LightOptions or AnnOptions or DummyOptions"),
    (lambda: Sparse(prompt=LightOptions()), "Use CrossOptions"),
    (lambda: Sparse(LightOptions(), kernel="fast"), "Use one of auto, gather, flex, mask"),
])
def test_bad_settings_are_refused(make, match):
    with pytest.raises(ForcingError, match=match):
        make()
