"""The rolling rollout: what its passes see, which of them run, and that the result is that of the published loop.

`Everything` knows nothing of stores and policies: it keeps all keys unrotated for ever and puts together what the paper
says a pass sees. `published` is the loop as published, with all of its clean passes.
"""
import itertools

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import Call, context_chunks, layout
from forcing_pack.forcing_core.plan_view import StoreShape, announce, draw, simulate
from forcing_pack.forcing_core.policies import RollingOptions, WindowOptions, build
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.rollout import ROLLOUTS, Switch, calls, most_frames, rolling_rollout
from forcing_pack.forcing_core.schedule import CLEAN, levels, x0_from_velocity
from forcing_pack.forcing_core.solvers import unipc
from forcing_pack.forcing_core.standalone import make_denoiser, preset_rollout, window_options
from forcing_pack.forcing_core.store import Keys
from forcing_pack.forcing_core.wan import Ops, TextState, forward
from forcing_testkit.forcing_corekit import CHANNELS, FakeDenoiser, Recorder, gap, latents, network, prompts, rotated
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, GRID = (4, 6), (2, 3)
THREE = levels((1000, 700, 300), 5.0)
SMALL = RollingOptions(window=9, sink=2, block=2)  # three blocks of 2 and the sink leave room for one stored frame
RUNS = {"long": (16, 0), "as many blocks as steps": (6, 0), "fewer blocks than steps": (4, 0), "one block": (2, 0),
        "a shorter last block": (13, 0), "one given frame": (11, 1), "given frames past the sink": (13, 5),
        "more given frames than the store holds": (20, 14)}
runs = pytest.mark.parametrize("run", RUNS)


@pytest.fixture(scope="module")
def net():
    return network()


def noise(seed=3):
    return BlockNoise(seed, (1, CHANNELS), SIZE)


def denoiser(net, frames, options=SMALL, texts=None):
    return make_denoiser(net, options, frames, SIZE, texts or [prompts()])


def roll(inner, frames, start=0, **more):
    """x0 of all new frames, with the first `start` frames given."""
    context = latents(start) if start else None
    made = rolling_rollout(inner, layout(frames - start, 2, given=start), THREE, noise(), context=context, block=2, **more)
    return torch.cat([x0 for _, x0 in made], dim=2)


class Everything:
    """A denoiser, and the exchange of its passes, that keeps all clean keys raw and all values."""

    silent = False

    def __init__(self, net, options, shift=0):
        self.net, self.options, self.shift, self.kept = net, options, shift, {}

    @torch.no_grad()
    def __call__(self, x, steps, first, phase):
        self.span, self.clean = range(first, first + x.shape[2]), phase == "clean"
        timesteps = torch.tensor([[step.timestep for step in steps]])
        velocity = forward(self.net, x, timesteps, TextState(prompts()), self, Ops())
        return x0_from_velocity(x, velocity, [step.sigma for step in steps])

    def exchange(self, layer, q, k, v):
        own = list(zip(self.span, *(t.chunk(len(self.span), dim=1) for t in (k, v))))
        window, sink, first = self.options.window, self.options.sink, self.span[0]
        if self.clean:
            self.kept.update({(layer, frame): (key, value) for frame, key, value in own})
            seen = {f: f for f in range(max(0, self.span[-1] + 1 - window), self.span[-1] + 1)}
        else:
            working = min(window - sink - len(self.span), max(0, first - sink))
            seen = {f: first - working - min(sink, first) + f - self.shift for f in range(min(sink, first))}
            seen.update((f, f) for f in range(first - working, first))
        where = {self.kept[layer, f]: p for f, p in seen.items()}
        if not self.clean:
            where.update({(key, value): frame for frame, key, value in own})
        keys, values = (torch.cat(t, dim=1) for t in zip(*where))
        return rotated(q, self.span, GRID), rotated(keys, list(where.values()), GRID), values


def published(inner, frames, start=0):
    """The published loop: after each window a clean pass of its first block, final or not."""
    blocks, made, x = layout(frames - start, 2, given=start), {}, {}
    for first, n in context_chunks(start, 2):
        inner(latents(start)[:, :, first:first + n], (CLEAN,) * n, first, "clean")
    for window in range(len(blocks) + len(THREE) - 1):
        inside = {b: window - b.index for b in blocks if 0 <= window - b.index < len(THREE)}
        x.update({b: noise().initial(b) for b, level in inside.items() if level == 0})
        first = next(iter(inside))
        out = inner(torch.cat([x[b] for b in inside], 2), [THREE[i] for b, i in inside.items() for _ in range(b.frames)],
                    first.first, "noisy")
        for b, level in inside.items():
            made[b] = out[:, :, b.first - first.first:b.end - first.first]
            if level + 1 < len(THREE):
                sigma = torch.tensor(THREE[level + 1].sigma)
                x[b] = (1 - sigma) * made[b] + sigma * noise().renoise(b, level)
        inner(made[first], (CLEAN,) * first.frames, first.first, "clean")
    return torch.cat([made[b] for b in blocks], 2)


# -- the result -----------------------------------------------------------------------------------------------

@runs
def test_the_result_is_that_of_the_published_rules(net, run):
    """Attention over everything ever stored, put together by hand, against store, eviction, raw sink and plans."""
    frames, start = RUNS[run]
    assert gap(roll(denoiser(net, frames), frames, start), published(Everything(net, SMALL), frames, start)) <= 2e-5


def test_the_comparison_sees_a_wrong_sink(net):
    """The sink one position off must show, or the test above says nothing about where it stands."""
    off, right = (published(Everything(net, SMALL, shift), 16) for shift in (1, 0))
    assert gap(off, right) > 1e-3


@runs
def test_skipped_clean_passes_change_nothing(net, run):
    """Bit for bit: those of the first block while it is noisy, and the last one."""
    frames, start = RUNS[run]
    assert torch.equal(roll(denoiser(net, frames), frames, start), published(denoiser(net, frames), frames, start))


def test_a_longer_video_starts_like_a_shorter_one(net):
    """Up to the first window that the end of the shorter one cuts: block b meets the blocks up to b + steps - 1."""
    short, long = (roll(denoiser(net, frames), frames) for frames in (12, 18))
    same = 2 * (12 // 2 - len(THREE) + 1)
    assert torch.equal(short[:, :, :same], long[:, :, :same])
    assert gap(short[:, :, same:same + 2], long[:, :, same:same + 2]) > 1e-3


@pytest.mark.parametrize("limit", [9, 11])
def test_rebased_positions_change_nothing_but_digits(net, limit):
    options = RollingOptions(9, 2, 2, "rebased", limit)
    assert gap(roll(denoiser(net, 24, options), 24), roll(denoiser(net, 24), 24)) <= 2e-5


def test_the_sink_is_kept_raw_in_every_kind_of_store(net):
    """An int8 store that keeps as many newest frames dense as it has slots is exact; without them it is close."""
    exact = roll(denoiser(net, 16), 16)
    dense, coarse = (RollingOptions(9, 2, 2, store="int8", dense=n) for n in (11, 0))
    assert gap(roll(denoiser(net, 16, dense), 16), exact) <= 1e-6
    assert 1e-4 < gap(roll(denoiser(net, 16, coarse), 16), exact) < 0.3


# -- plans ----------------------------------------------------------------------------------------------------

def play(options, frames, steps, start=0):
    """Every call of a rollout as (call, plan, frames held afterwards)."""
    policy, held = build(options, frames), ()
    blocks = layout(frames - start, options.block, given=start)
    for call in calls("rolling", blocks, steps, given=start, block=options.block):
        call = Call(call.first, call.frames, call.phase, held)
        plan = policy.plan(call)
        held = tuple(sorted({*held, *plan.write} - {*plan.evict}))
        yield call, plan, held


def test_the_published_trace():
    """14 blocks in five steps: first frame of the call: positions of the first and the last key, as recorded."""
    seen = {"noisy": [], "clean": []}
    for call, plan, _ in play(RollingOptions(), 42, 5):
        places = plan.positions + (plan.query if plan.own else ())
        assert places == tuple(range(places[0], places[-1] + 1))
        seen[call.phase].append((call.first, places[0], places[-1]))
    assert seen["noisy"] == [
        (0, 0, 2), (0, 0, 5), (0, 0, 8), (0, 0, 11), (0, 0, 14), (3, 0, 17), (6, 0, 20), (9, 3, 23), (12, 6, 26),
        (15, 9, 29), (18, 12, 32), (21, 15, 35), (24, 18, 38), (27, 21, 41), (30, 21, 41), (33, 21, 41), (36, 21, 41),
        (39, 21, 41)]
    assert seen["clean"] == [(cs, max(0, cs - 18), cs + 2) for cs in range(0, 39, 3)]


def test_the_sink_moves_in_joint_passes_only():
    """By hand, at block 9: keys 0..2 stand at 21..23 before frames 24..26; the clean pass of block 9 does not see them."""
    trace = [(call, plan) for call, plan, _ in play(RollingOptions(), 60, 5) if call.first == 27]
    (_, joint), (_, update) = trace
    assert joint.read == (0, 1, 2, 24, 25, 26) and joint.positions == (21, 22, 23, 24, 25, 26)
    assert joint.own == joint.query == tuple(range(27, 42)) and joint.write == joint.evict == ()
    assert update.read == update.positions == tuple(range(9, 30)) and update.own == ()
    assert update.write == update.query == (27, 28, 29) and update.evict == (6, 7, 8)


@st.composite
def settings_of_runs(draw):
    """(options, frames, steps, given frames)"""
    block, steps, sink = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(0, 4))
    window = sink + block * steps + draw(st.integers(0, 7))
    frames = draw(st.integers(1, 50))
    rebased = draw(st.booleans())
    limit = window + draw(st.integers(0, 9)) if rebased else 1024
    options = RollingOptions(window, sink, block, "rebased" if rebased else "absolute", limit)
    return options, frames, steps, draw(st.integers(0, min(frames - 1, 9)))


@settings(max_examples=120, deadline=None)
@given(settings_of_runs())
def test_plans(run):
    """No pass sees the future or more than its window; joint passes store nothing and see an unbroken stretch that the
    sink begins; clean passes see the newest stored frames where they are; the store never overflows."""
    options, frames, steps, start = run
    policy = build(options, frames)
    for call, plan, held in play(options, frames, steps, start):
        offset = call.first - plan.query[0]
        assert plan.query == tuple(f - offset for f in call.span) and offset >= 0
        places = plan.positions + plan.query
        assert max(places) < options.limit and min(places) >= 0
        assert len(plan.read) + len(plan.own) <= options.window and len(held) <= policy.capacity
        if call.phase == "noisy":
            assert plan.own == call.span and not plan.write and not plan.evict
            assert all(f < call.first for f in plan.read) and {*range(min(options.sink, call.first))} <= {*plan.read}
            others = plan.read[min(options.sink, call.first):]
            assert others == tuple(range(call.first - len(others), call.first))
            room = options.window - options.sink - call.frames
            assert len(others) == min(room, max(0, call.first - options.sink))
            assert plan.positions == tuple(range(plan.query[0] - len(plan.read), plan.query[0]))
        else:
            end = call.first + call.frames
            assert plan.write == call.span and not plan.own
            assert plan.read == tuple(range(max(0, end - options.window), end))
            assert plan.positions == tuple(f - offset for f in plan.read)


def test_keys_are_raw_only_where_positions_move():
    assert build(RollingOptions(), 1024).keys is Keys.ROPED
    assert build(RollingOptions(positions="rebased"), 1024).keys is Keys.ROPED
    assert build(RollingOptions(positions="rebased"), 1025).keys is Keys.RAW
    assert build(RollingOptions(), 600).capacity == 24 and build(RollingOptions(), 12).capacity == 12


@pytest.mark.parametrize("frames", [30, 90])
@pytest.mark.parametrize("options", [SMALL, RollingOptions(9, 2, 2, "rebased", 20)])
def test_bytes_are_constant_and_as_announced(net, options, frames):
    """A joint pass that stored its frames, or a raw sink beside the rotated one, would take more."""
    inner = denoiser(net, frames, options)
    with torch.no_grad():
        for first in range(0, 24, 2):
            inner(latents(2), (CLEAN,) * 2, first, "clean")
            inner(latents(6), (THREE[0],) * 6, first + 2, "noisy")
    shape = StoreShape(layers=3, dim=256, height=SIZE[0], width=SIZE[1], element_size=4)
    assert inner.conditions[0].memory.store.nbytes == announce(options, frames, shape).bytes == 3 * 2 * 11 * 6 * 256 * 4


# -- order of forwards ----------------------------------------------------------------------------------------

def test_order_of_forwards():
    """Four blocks in three steps: a clean pass only behind a window that ends with a final block, none at the end."""
    inner = Recorder(FakeDenoiser())
    roll(inner, 8)
    assert inner.events == [("noisy", 0, 2), ("noisy", 0, 4), ("noisy", 0, 6), ("clean", 0, 2), ("noisy", 2, 6),
                            ("clean", 2, 2), ("noisy", 4, 4), ("clean", 4, 2), ("noisy", 6, 2)]
    told = [call.timesteps for call in inner.calls if call.phase == "noisy"]
    high, middle, low = (level.timestep for level in THREE)
    assert told[2] == (low, low, middle, middle, high, high) and told[-2] == (low, low, middle, middle)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(ROLLOUTS.keys() & {"block", "rolling"})), st.integers(1, 3), st.integers(1, 12),
       st.integers(0, 5), st.integers(1, 4), st.booleans())
def test_announced_calls_are_those_that_run(name, block, new, start, steps, independent):
    """Progress bars and plan views count on it."""
    blocks = layout(new, block, given=start, independent_first=independent)
    inner, few = Recorder(FakeDenoiser()), levels(range(1000, 1000 - 100 * steps, -100), 5.0)
    list(ROLLOUTS[name](inner, blocks, few, noise(), context=latents(start) if start else None, block=block,
                        independent_first=independent))
    expected = calls(name, blocks, steps, given=start, block=block, independent_first=independent)
    assert inner.events == [(call.phase, call.first, call.frames) for call in expected]


def test_the_largest_forward():
    assert most_frames("rolling", 3, 5) == 15 and most_frames("block", 3, 5) == 3


class Counted:
    """Noise that notes what it was asked for."""

    def __init__(self):
        self.asked, self.inner = [], noise()

    def initial(self, block):
        self.asked.append((block.index, "initial"))
        return self.inner.initial(block)

    def renoise(self, block, step):
        self.asked.append((block.index, step))
        return self.inner.renoise(block, step)


def test_noise_is_drawn_once_and_only_where_it_is_used():
    """The published loop draws a whole window for every block of it."""
    drawn = Counted()
    list(rolling_rollout(FakeDenoiser(), layout(10, 2), THREE, drawn, block=2))
    assert sorted(drawn.asked, key=str) == sorted(itertools.product(range(5), ("initial", 0, 1)), key=str)


def test_nothing_runs_ahead_of_the_consumer():
    """A consumer that stops after a block pays neither for its clean pass nor for the next window; what it keeps is
    the block, not the window that it was made in."""
    inner = Recorder(FakeDenoiser())
    made = rolling_rollout(inner, layout(12, 2), THREE, noise(), block=2)
    block, x0 = next(made)
    assert (block.first, len(inner.calls)) == (0, 3)
    assert x0.untyped_storage().nbytes() == x0.nbytes
    made.close()
    assert len(inner.calls) == 3


def test_clean_passes_are_told_the_context_timestep():
    """Given frames are always at 0; the passes see what was yielded."""
    inner, context = Recorder(FakeDenoiser()), latents(3)
    made = [x0 for _, x0 in rolling_rollout(inner, layout(6, 2, given=3), THREE, noise(), context=context, block=2,
                                            context_timestep=100.0)]
    clean = [call for call in inner.calls if call.phase == "clean"]
    assert [(c.first, c.frames, set(c.timesteps)) for c in clean] == [
        (0, 2, {0.0}), (2, 1, {0.0}), (3, 2, {100.0}), (5, 2, {100.0})]
    assert torch.equal(clean[2].x, made[0]) and torch.equal(clean[1].x, context[:, :, 2:])


# -- prompts --------------------------------------------------------------------------------------------------

def test_a_prompt_switch_waits_for_the_block_and_recaches_nothing():
    """Frame 5 lies in block 2, so block 3 is the first one that the switch rules entirely."""
    inner = Recorder(FakeDenoiser())
    roll(inner, 12, switches=[Switch(5, 1, transition="keep")])
    at = inner.events.index(("text", 1))
    assert inner.events[at - 1:at + 2] == [("clean", 0, 2), ("text", 1), ("noisy", 2, 6)]
    assert [e[0] for e in inner.events].count("recache") == 0 and len(inner.events) == 8 + 5 + 1


def test_a_transition_takes_as_many_blocks_as_steps(net):
    """Blocks that were final before the switch keep their picture; those in work are finished under the new prompt."""
    texts = [prompts(), prompts(seed=1)]
    plain, changed = (Recorder(denoiser(net, 12)) for _ in range(2))
    changed.inner.conditions[0].prompts = texts
    before, after = roll(plain, 12), roll(changed, 12, switches=[Switch(6, 1, transition="keep")])
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert all(gap(before[:, :, f], after[:, :, f]) > 1e-4 for f in range(2, 12))


# -- what cannot be done --------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, match", [
    ({"solver": unipc}, "few-step solver"),
    ({"first_levels": THREE}, "first block"),
    ({"switches": [Switch(4, 1, renew_sink=True)]}, "Set every transition to keep"),
], ids=["solver", "first levels", "renewed sink"])
def test_what_does_not_roll_is_refused(more, match):
    inner = Recorder(FakeDenoiser())
    with pytest.raises(ForcingError, match=match):
        roll(inner, 8, **more)
    assert not inner.calls


@pytest.mark.parametrize("change, match", [
    ({"positions": "relative"}, "absolute, rebased"), ({"window": 5}, "at least 6"), ({"sink": -1}, "at least 3"),
    ({"window": None}, "at least 6"), ({"limit": 20}, "at least 21")])
def test_options_that_make_no_sense(change, match):
    with pytest.raises(ForcingError, match=match):
        RollingOptions(**change)


def test_too_many_steps_for_the_window(net):
    with pytest.raises(ForcingError, match="at least 8"):
        roll(denoiser(net, 12, RollingOptions(7, 2, 2)), 12)


def test_absolute_positions_end():
    with pytest.raises(ForcingError, match="'rebased'.*at most 1024"):
        build(RollingOptions(), 1025)
    assert build(RollingOptions(), 1024)


# -- presets and pictures -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, steps", [("rolling-forcing", 5), ("causal-forcing-longvideo", 4)])
def test_presets_roll(name, steps):
    preset, inner = get(name), Recorder(FakeDenoiser())
    assert preset.available and window_options(preset) == RollingOptions(21, 3, 3, "rebased")
    assert build(window_options(preset), 5000)
    list(preset_rollout(preset, inner, 24, noise()))
    assert max(frames for _, _, frames in inner.events) == 3 * steps
    assert len(inner.events) == (8 + steps - 1) + 7


def test_a_plan_view_draws_windows():
    """Rows are joint passes with their own frames; what the store holds besides is drawn, and neither is the future."""
    table = simulate(RollingOptions(), 42, steps=5)
    assert table.unit == "window" and len(table.rows) == 14 + 4
    row = table.rows[8]
    assert row.read == (0, 1, 2, 9, 10, 11, *range(12, 27)) and row.sink == (0, 1, 2) and row.kept == tuple(range(3, 9))
    assert row.distances == tuple(range(-6, 15))
    assert sum(len(row.evicted) for row in table.rows) == 15
    assert len(simulate(RollingOptions(), 42, steps=4).rows) == 14 + 3
    picture = draw(simulate(RollingOptions(), 400))
    assert picture.shape[2] == 1200 and picture.shape[1] <= 760
    assert simulate(WindowOptions(), 9).unit == "block" and not any(r.kept for r in simulate(WindowOptions(9, 3), 30).rows)
