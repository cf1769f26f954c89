"""Plans of the window policy, as properties over all of its settings. Frame numbers only: no tensors."""
import pytest
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.plan import Call, context_chunks, layout
from forcing_pack.forcing_core.policies import WindowOptions, build
from forcing_pack.forcing_core.store import Keys
from forcing_testkit.forcing_corekit import visible
from hypothesis import assume, given, settings
from hypothesis import strategies as st


def play(options, frames, start=0, independent=False):
    """Every call of a rollout as (call, plan), holding what the plans say, given frames first."""
    policy, held = build(options, frames), ()
    spans = [(first, n, ("clean",)) for first, n in context_chunks(start, options.block, independent)]
    spans += [(b.first, b.frames, ("noisy", "noisy", "clean"))
              for b in layout(frames - start, options.block, given=start, independent_first=independent)]
    for first, n, phases in spans:
        for phase in phases:
            call = Call(first, n, phase, held)
            plan = policy.plan(call)
            held = tuple(sorted({*held, *plan.write} - {*plan.evict}))
            yield call, plan


@st.composite
def runs(draw, positions=("absolute", "relative", "rebased"), bounded=False):
    """(options, frames, given frames, independent first frame)"""
    block, sink = draw(st.integers(1, 4)), draw(st.integers(0, 7))
    room = draw(st.integers(0, 6) if bounded else st.none() | st.integers(0, 6))
    window = None if room is None else sink + block + room
    kind = draw(st.sampled_from(positions))
    limit = 1024 if kind != "rebased" else (window or block) + draw(st.integers(0, 8))
    frames = draw(st.integers(1, 36))
    start = draw(st.integers(0, min(frames - 1, 9)))
    if window is None:  # without a window there is nothing to slide: every distance stays
        limit = max(limit, block, frames)
    return WindowOptions(window, sink, block, kind, limit, draw(st.booleans())), frames, start, draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(runs())
def test_reads_what_the_mask_rule_says(run):
    """Core rule: a block ending at E reads j < E with j < S or j >= E - (W - S). The future, a lost sink, a window
    one frame too wide or too narrow: each breaks one of the lines."""
    options, frames, start, independent = run
    for call, plan in play(options, frames, start, independent):
        end = call.first + call.frames
        assert list(plan.read) == visible(end, options.window, options.sink)
        assert max(plan.read) < end
        assert {*call.span} <= {*plan.read} and plan.write == call.span
        assert {*range(min(options.sink, end))} <= {*plan.read}
        assert options.window is None or len(plan.read) <= options.window


@settings(max_examples=100, deadline=None)
@given(runs(bounded=True))
def test_evicts_the_oldest_and_only_as_many_as_needed(run):
    """An eviction of whole blocks, or one at every pass instead of every block, drops frames that fit."""
    options, frames, start, independent = run
    capacity = min(options.window, frames)
    assert build(options, frames).capacity == capacity
    for call, plan in play(options, frames, start, independent):
        incoming = [f for f in call.span if f not in call.held]
        needed = max(0, len(call.held) + len(incoming) - capacity)
        assert plan.evict == tuple(f for f in call.held if f >= options.sink)[:needed]


@settings(max_examples=100, deadline=None)
@given(runs())
def test_a_repeated_call_evicts_nothing_and_reads_the_same(run):
    """The later steps of a block and its clean pass must see exactly what its first step saw."""
    options, frames, start, independent = run
    previous = None
    for call, plan in play(options, frames, start, independent):
        if previous is not None and previous[0].first == call.first:
            assert plan.evict == ()
            assert (plan.read, plan.positions, plan.query) == previous[1]
        previous = call, (plan.read, plan.positions, plan.query)


@settings(max_examples=200, deadline=None)
@given(runs())
def test_positions(run):
    """Written frames stand where their queries stand (else their keys are rotated twice), positions rise strictly
    (else two frames are one) and stay below the limit (else the table ends)."""
    options, frames, start, independent = run
    policy = build(options, frames)
    limit = policy.capacity if options.positions == "relative" else options.limit
    for call, plan in play(options, frames, start, independent):
        at = dict(zip(plan.read, plan.positions))
        assert len(plan.positions) == len(plan.read) and len(plan.query) == call.frames
        assert tuple(at[f] for f in call.span) == plan.query
        assert all(a < b for a, b in zip(plan.positions, plan.positions[1:]))
        assert plan.positions[0] >= 0 and plan.positions[-1] < limit


@settings(max_examples=200, deadline=None)
@given(runs(bounded=True), st.integers(1, 12), st.booleans())
def test_positions_after_a_recache(run, at, renew):
    """A renewed sink does not start at frame 0: at its own frame numbers it would stand among the window or past the
    limit. Every frame that a replay keeps must stand where its query does."""
    options, frames, _, _ = run
    policy, held, blocks = build(options, frames), (), layout(frames, options.block)
    limit = policy.capacity if options.positions == "relative" else options.limit
    calls = [(b.first, b.frames, "noisy") for b in blocks]
    if at < len(blocks):
        edge = blocks[at].first
        replayed = min(options.window, edge)
        calls.insert(at, (edge - replayed, replayed, "recache"))
    for first, n, phase in calls:
        held = () if phase == "recache" and renew else held
        plan = policy.plan(Call(first, n, phase, held))
        stands = dict(zip(plan.read, plan.positions))
        query = dict(zip(range(first, first + n), plan.query))
        assert all(stands[f] == query[f] for f in plan.write)
        assert all(a < b for a, b in zip(plan.positions, plan.positions[1:]))
        assert plan.positions[0] >= 0 and max(*plan.positions, *plan.query) < limit
        held = tuple(sorted({*held, *plan.write} - {*plan.evict}))
        assert held == plan.read and len(held) <= options.window


@settings(max_examples=100, deadline=None)
@given(runs(positions=("relative", "rebased"), bounded=True))
def test_moving_positions_are_absolute_until_they_must_move(run):
    """Relative equals absolute while nothing was evicted, rebased until its limit: bit-exact, as published."""
    options, frames, start, independent = run
    still = min(options.window, frames) if options.positions == "relative" else options.limit
    for call, plan in play(options, frames, start, independent):
        if call.first + call.frames <= still:
            assert plan.positions == plan.read and plan.query == call.span


@settings(max_examples=60, deadline=None)
@given(runs(positions=("relative",), bounded=True))
def test_relative_is_the_slot_number_once_full(run):
    """LongLive's infinity model: keys count 0..W-1 by their place in the window, the query has the last ones."""
    options, frames, start, independent = run
    assume(frames > options.window)
    for call, plan in play(options, frames, start, independent):
        if call.first + call.frames >= options.window:
            assert plan.positions == tuple(range(options.window))
            assert plan.query == plan.positions[-call.frames:]


def test_a_block_inside_the_sink_stands_at_its_own_positions():
    """Regression: with a sink as long as the first block the keys got positions before zero (-2, -1 for a block of
    2), one block away from their queries."""
    for positions, limit in (("relative", 1024), ("rebased", 9)):
        policy = build(WindowOptions(7, 3, 2, positions, limit), 30)
        plan = policy.plan(Call(0, 2, "noisy", ()))
        assert (plan.read, plan.positions, plan.query) == ((0, 1), (0, 1), (0, 1))


def test_rebased_slides_everything_but_the_sink():
    """By hand: W 6, S 2, block 2, limit 10, frames 12 and 13: the newest stands at 9, the sink where it was."""
    policy = build(WindowOptions(6, 2, 2, "rebased", 10), 30)
    plan = policy.plan(Call(12, 2, "noisy", (0, 1, 8, 9, 10, 11)))
    assert plan.evict == (8, 9) and plan.read == (0, 1, 10, 11, 12, 13)
    assert plan.positions == (0, 1, 6, 7, 8, 9) and plan.query == (8, 9)
    tight = build(WindowOptions(6, 2, 2, "rebased", 6), 30)
    assert tight.plan(Call(12, 2, "noisy", (0, 1, 8, 9, 10, 11))).positions == (0, 1, 2, 3, 4, 5)


# A sink of 3 in a window of 9 (LongLive's test configuration), twelve frames generated.
HELD = (0, 1, 2, 6, 7, 8, 9, 10, 11)


def test_recache_with_a_global_sink_keeps_it():
    """The sink's old keys stay and frames that left the window only query: rewriting the sink, or storing frames
    3..5, is what global_sink = false would be."""
    plan = build(WindowOptions(9, 3, 3), 27).plan(Call(3, 9, "recache", HELD))
    assert plan.evict == () and plan.write == (6, 7, 8, 9, 10, 11)
    assert plan.read == plan.positions == HELD
    assert plan.query == tuple(range(3, 12))


def test_recache_with_a_renewed_sink_rewrites_the_window():
    """After `forget` the last W frames fill the store, the first S of them are the new sink and stay so."""
    policy = build(WindowOptions(9, 3, 3), 27)
    plan = policy.plan(Call(3, 9, "recache", ()))
    assert plan.write == plan.read == plan.positions == plan.query == tuple(range(3, 12)) and plan.evict == ()
    following = policy.plan(Call(12, 3, "noisy", plan.write))
    assert following.evict == (6, 7, 8) and following.read == (3, 4, 5, 9, 10, 11, 12, 13, 14)


@pytest.mark.parametrize("frames", [3, 6, 9])
def test_recache_of_a_window_that_is_not_over_yet_rewrites_all(frames):
    """p <= W: the sink is among the replayed frames, so it is rewritten even where it is global."""
    span = tuple(range(frames))
    plan = build(WindowOptions(9, 3, 3), 27).plan(Call(0, frames, "recache", span))
    assert plan.write == plan.read == plan.query == span and plan.evict == ()


@pytest.mark.parametrize("written", [7, 8])
def test_recache_that_starts_inside_the_sink(written):
    """W < p < W + S: some of the replayed frames are sink frames; their old keys must stay all the same."""
    held = (0, 1, 2, *range(written - 3, written))
    plan = build(WindowOptions(6, 3, 1), 27).plan(Call(written - 6, 6, "recache", held))
    assert plan.evict == () and plan.read == held
    assert plan.write == tuple(range(written - 3, written))
    assert plan.query == tuple(range(written - 6, written))


def test_recache_in_relative_positions():
    """Queries of a replay count 0..W-1 like the slots; absolute ones would be far off the window."""
    plan = build(WindowOptions(9, 3, 3, "relative"), 27).plan(Call(3, 9, "recache", HELD))
    assert plan.positions == plan.query == tuple(range(9))


def test_keys_follow_the_need():
    """Raw keys cost a third more memory: kept only where a position can change at all."""
    assert build(WindowOptions(6, 1, 3), 500).keys is Keys.ROPED
    assert build(WindowOptions(6, 1, 3, "relative"), 6).keys is Keys.ROPED
    assert build(WindowOptions(6, 1, 3, "relative"), 7).keys is Keys.BOTH
    assert build(WindowOptions(6, 1, 3, "relative", compact=True), 7).keys is Keys.RAW
    assert build(WindowOptions(6, 1, 3, "rebased", 20), 20).keys is Keys.ROPED
    assert build(WindowOptions(6, 1, 3, "rebased", 20), 21).keys is Keys.BOTH


@pytest.mark.parametrize("options, message", [
    ({"positions": "slots"}, "Use one of absolute, "),
    ({"sink": -1}, "make no sense"),
    ({"block": 0}, "make no sense"),
    ({"window": 0}, "make no sense"),
    ({"window": 5, "sink": 3, "block": 3}, "window of at least 6 frames"),
    ({"window": 12, "limit": 11}, "limit of at least 12"),
    ({"block": 4, "limit": 3}, "limit of at least 4"),
])
def test_options_that_cannot_work_are_refused(options, message):
    """The message names the smallest setting that works."""
    with pytest.raises(ForcingError, match=message):
        WindowOptions(**options)


def test_absolute_positions_end_with_the_table():
    """Past 1024 frames the published table ends: refused before the run, and the other kinds go on."""
    assert build(WindowOptions(12, 3, 3), 1024)
    with pytest.raises(ForcingError, match="'relative' or 'rebased'"):
        build(WindowOptions(12, 3, 3), 1025)
    for positions in ("relative", "rebased"):
        policy = build(WindowOptions(12, 3, 3, positions), 3000)
        assert policy.capacity == 12
        held = (0, 1, 2, *range(2988, 2997))
        assert policy.plan(Call(2997, 3, "noisy", held)).query[-1] == (11 if positions == "relative" else 1023)


def test_unknown_options_are_refused():
    with pytest.raises(ForcingError, match="Known kinds: .*window"):
        build(object(), 9)
