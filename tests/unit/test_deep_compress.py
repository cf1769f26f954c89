"""Participative compression: what every pass gets, against a direct computation over plain lists of tokens.

`Tokens` is one sample of one layer as the paper tells it: single tokens with a source frame, a place and a count; all
queries of the newest frames are kept, not their sums.
"""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forcing_pack.forcing_core import token_store
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.parity import load_network, read_case, run, run_case
from forcing_pack.forcing_core.plan import Call
from forcing_pack.forcing_core.plan_view import draw, simulate
from forcing_pack.forcing_core.policies import DeepCompressOptions, build
from forcing_pack.forcing_core.store import Store
from forcing_testkit.forcing_corekit import gap
from forcing_testkit.passkit import TOKENS, memory, play, script
from safetensors import safe_open

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
PUBLISHED = DeepCompressOptions()
SMALL = DeepCompressOptions(window=10, sink=3, block=2, budget=8, recent=3, reuse_cap=2)
SHAPES = {
    "small": SMALL, "compact": replace(SMALL, compact=True), "no cap": replace(SMALL, reuse_cap=None),
    "aligned": replace(SMALL, aligned=True), "paper": replace(SMALL, aligned=True, hole=False, reuse_cap=None),
    "paper compact": replace(SMALL, aligned=True, hole=False, compact=True),
    "no room": replace(SMALL, budget=6), "every block": replace(SMALL, budget=10, reuse_cap=None),
    "recent is the block": replace(SMALL, recent=2),
    "too few left": DeepCompressOptions(window=9, sink=1, block=1, budget=8, recent=1, reuse_cap=1),
    "rebased": replace(SMALL, positions="rebased", limit=13),
    "rebased compact": replace(SMALL, positions="rebased", limit=13, compact=True),
    "rebased aligned": replace(SMALL, positions="rebased", limit=13, aligned=True)}
by_shape = pytest.mark.parametrize("shape", SHAPES)


def turned(x, positions, cells):
    """Rotate single tokens x [n, H, 128] in float64. The picture has one row, so a cell is its column."""
    zero = torch.zeros(len(positions), dtype=torch.float64)
    axes = (torch.as_tensor(positions).double(), zero, torch.as_tensor(cells).double())
    angle = torch.cat([at[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
                       for at, dim in zip(axes, (44, 42, 42))], dim=1)
    pairs = torch.view_as_complex(x.double().unflatten(2, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(2).to(x.dtype)


class Tokens:
    """frame, cell, count, k, v of every token, in order: sink, chosen, others. sink_at: where the sink starts."""

    def __init__(self, options):
        self.o, self.rows, self.queries, self.sink_at, self.chosen = options, [], [], 0, None

    def take(self, call, opens, q, k, v):
        """(keys, values) that a pass over q, k, v [n, H, D] must get."""
        o, span = self.o, call.span
        where, cells = [f for f in span for _ in range(TOKENS)], list(range(TOKENS)) * len(span)
        self.queries = (self.queries + list(turned(q, where, cells)))[-o.recent * TOKENS:]
        if opens and self._frames() + len(span) > o.window:
            self._compress(call)
        self.rows = [row for row in self.rows if row[0] not in span or row[2]]
        self.rows += [[f, c, 0, *kv] for f, c, *kv in zip(where, cells, k, v)]
        over = max(0, call.first + call.frames - o.limit)
        return (turned(torch.stack([row[3] for row in self.rows]), torch.tensor(self._positions()) - over,
                       [row[1] for row in self.rows]), torch.stack([row[4] for row in self.rows]))

    def _frames(self):
        """Frames held, the chosen tokens counted as many as there is room for."""
        whole = len(self.rows) - (self.chosen or 0)
        return whole // TOKENS + (0 if self.chosen is None else self.o.budget - self.o.sink - self.o.recent)

    def _positions(self):
        sink, chosen = self.o.sink * TOKENS, self.chosen or 0
        at = [self.sink_at + i // TOKENS for i in range(min(sink, len(self.rows)))]
        for i, row in enumerate(self.rows[sink:]):
            at.append(self.sink_at + self.o.sink + i // TOKENS if self.o.aligned and i < chosen else row[0])
        return at

    def _compress(self, call):
        o, sink = self.o, self.o.sink * TOKENS
        stay = len(self.rows) - (o.recent - call.frames) * TOKENS
        keys = turned(torch.stack([row[3] for row in self.rows]), self._positions(), [row[1] for row in self.rows])
        asked = torch.stack(self.queries).sum(0)
        ranked = sorted((i for i in range(sink, stay) if o.reuse_cap is None or self.rows[i][2] < o.reuse_cap),
                        key=lambda i: -float((asked * keys[i]).sum()))
        best = sorted(ranked[:(o.budget - o.sink - o.recent) * TOKENS])
        for i in best:
            self.rows[i][2] += 1
        self.rows = self.rows[:sink] + [self.rows[i] for i in best] + self.rows[stay:]
        self.chosen = len(best)
        self.sink_at = call.first - o.budget + (0 if o.hole else call.frames)


@by_shape
@pytest.mark.parametrize("given", [0, 5])
def test_every_pass_gets_what_the_paper_says(shape, given):
    """Two layers and two samples choose for themselves. Another score, window of queries, cap, order of work, place of
    a token or of the sink, and tokens of the newest frames given away, all give other keys."""
    options, frames = SHAPES[shape], 27
    wanted = {(layer, sample): Tokens(options) for layer in range(2) for sample in range(2)}
    seen, compressions = play(options, frames, given=given, batch=2), 0
    for one in seen:
        for sample in range(2):
            keys, values = wanted[one.layer, sample].take(one.call, one.opens, one.q[sample], one.k[sample], one.v[sample])
            assert keys.shape == one.keys[sample].shape
            assert gap(one.keys[sample], keys) <= 2e-5 and gap(one.values[sample], values) == 0
        compressions += bool(one.plan.evict)
    assert compressions >= 2 * 3
    chosen = {tuple((frame, cell) for frame, cell, *_ in tokens.rows[options.sink * TOKENS:][:tokens.chosen])
              for tokens in wanted.values()}
    assert len(chosen) >= 2 or shape in ("no room", "too few left"), "layers and samples should differ"


def test_few_tokens_are_never_padded():
    """With a cap of 1 only tokens that were never chosen are left: two frames' worth instead of six."""
    lengths = {one.keys.shape[1] for one in play(SHAPES["too few left"], 27) if one.plan.evict}
    assert min(lengths) == (1 + 2 + 1) * TOKENS and max(lengths) == 8 * TOKENS


def test_a_batch_keeps_as_many_tokens_of_each_sample():
    """Where the cap leaves fewer of one sample than of another, the shorter one rules: padding would be attended to."""
    options = replace(SMALL, budget=10)
    alone = [{one.keys.shape[1] for one in play(options, 40, seed=seed) if one.plan.evict} for seed in range(3)]
    assert min(map(min, alone)) < max(map(max, alone))
    store = memory(options, 40).store
    free = torch.ones(2, 12, dtype=torch.bool)
    free[1, :7] = False
    assert store._count(free) == 5


def opening(options, frames):
    policy, held = build(options, frames), ()
    for first, count, phase in script(options, frames):
        call = Call(first, count, phase, held)
        plan = policy.plan(call)
        if first not in held:
            yield plan
        held = tuple(sorted({*held, *plan.write} - {*plan.evict}))


def span(first, last):
    return tuple(range(first, last + 1))


def test_the_published_trace():
    """Blocks 6 to 11: [5..14 | tokens | 20..23], then the next block joins, then [11..20 | tokens | 26..29] ..."""
    made = list(opening(PUBLISHED, 36))
    assert [plan.positions for plan in made[6:]] == [
        span(0, 20), span(5, 14) + span(20, 23), span(5, 14) + span(20, 26), span(11, 20) + span(26, 29),
        span(11, 20) + span(26, 32), span(17, 26) + span(32, 35)]
    assert [plan.evict for plan in made[6:]] == [(), span(10, 19), (), span(20, 25), (), span(26, 31)]
    assert [plan.query for plan in made[7:9]] == [span(21, 23), span(24, 26)]


def test_the_papers_positions_follow_each_other():
    """Sink, tokens and newest frames without a hole: 8..17, tokens at 18 and 19, 20..23."""
    options = replace(PUBLISHED, hole=False, aligned=True)
    plan = list(opening(options, 24))[7]
    assert plan.positions == span(8, 17) + span(20, 23)
    now = memory(options, 24)
    play(options, 24, into=now)
    assert now.store._stand == token_store.Stand(0, 18)


def test_the_recorded_choices(monkeypatch):
    """The tokens that the published code chose, by layer and compression, with its cap of 7 at work."""
    path, chosen, best = GOLDENS / "deep_pc_long.safetensors", [], token_store._best
    with safe_open(path, "pt") as file:
        recorded = json.loads(file.metadata()["topc"])
    monkeypatch.setattr(token_store, "_best", lambda *a: chosen.append((best(*a), a[1])) or chosen[-1][0])
    assert run_case(read_case(path), load_network(GOLDENS)).passed
    sink = 10 * 24  # recorded places count from the first token of the sink
    assert [(ours[0] + sink).tolist() for ours, _ in chosen] == [row["selected"] for row in recorded]
    excluded = [int((~free).sum()) for _, free in chosen]
    assert excluded == [row["n_excluded_by_reuse"] for row in recorded] and max(excluded) > 0


@pytest.mark.parametrize("changes", [{}, {"recent": 3}, {"aligned": True}, {"hole": False}], ids=str)
def test_a_wrong_setting_fails(changes, monkeypatch):
    """Negative controls on the first 27 frames of the recorded run."""
    case, frames = read_case(GOLDENS / "deep_pc_long.safetensors"), 27
    tensors = {**case.tensors, **{name: case.tensors[name][:, :frames] for name in ("noise", "latents")}}
    settings = {**case.settings, "policy": "changed", "frames_generated": frames}
    monkeypatch.setitem(run.POLICIES, "changed", lambda settings: replace(PUBLISHED, **changes))
    report = run_case(replace(case, tensors=tensors, settings=settings), load_network(GOLDENS))
    assert report.rel_l2 <= 2e-5 if not changes else report.rel_l2 > 1e-4


def test_equal_scores_go_by_age():
    """Without a rule the choice would depend on the machine."""
    scores, free = torch.tensor([[1.0, 2.0, 2.0, 2.0, 3.0]]), torch.tensor([[True, True, False, True, True]])
    assert token_store._best(scores, free, 2).tolist() == [[1, 4]]
    assert token_store._best(scores, free, 4).tolist() == [[0, 1, 3, 4]]


def test_a_cleared_store_forgets_queries_tokens_and_counts():
    """Upstream's second video in one process starts with the state of the first."""
    now = memory(SMALL, 27)
    play(SMALL, 27, into=now)
    now.forget()
    assert now.store.frames == ()
    for one, other in zip(play(SMALL, 27, seed=4, into=now), play(SMALL, 27, seed=4), strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_a_replay_leaves_sink_and_tokens():
    """A recache rewrites the whole frames that are held; sink and tokens keep what they had."""
    now = memory(SMALL, 27)
    play(SMALL, 27, passes=script(SMALL, 14), into=now)
    held = now.store.frames
    before, after = play(SMALL, 27, passes=[(12, 2, "clean"), (4, 10, "recache")], into=now, seed=3)[::2]
    assert held == (0, 1, 2, 9, 10, 11, 12, 13) and after.plan.read == held and after.plan.write == held[3:]
    edge = (3 + 2) * TOKENS
    assert torch.equal(before.values[:, :edge], after.values[:, :edge])
    assert torch.equal(before.keys[:, :edge], after.keys[:, :edge])
    assert gap(before.values[:, edge:], after.values[:, edge:]) > 0.1


def test_a_video_that_fits_has_a_plain_store():
    fits, longer = memory(PUBLISHED, 21).store, memory(PUBLISHED, 22).store
    assert type(fits) is Store and type(longer) is token_store.TokenStore
    assert build(PUBLISHED, 21).store_bytes(layers=2, frame_tokens=2, dim=256, batch=1, element_size=4) == (
        2 * 21 * 2 * 256 * 4 * 2)


def test_a_plan_that_does_not_fit_is_refused():
    store = memory(SMALL, 27).store
    plan = build(SMALL, 27).plan(Call(0, 2, "noisy"))
    with pytest.raises(ForcingError, match="holds 10 frames"):
        store.place(replace(plan, write=span(0, 10)))


def test_the_plan_view_names_single_tokens():
    """Frames of which tokens may be left are drawn as such, until the cap must have sent them away."""
    table = simulate(SMALL, 40)
    first = next(row for row in table.rows if row.evicted)
    assert first.tokens == first.evicted == (3, 4, 5, 6, 7, 8)[:len(first.evicted)]
    last = table.rows[-1]
    assert set(last.tokens) < set(range(3, last.read[3])) and not set(last.tokens) & set(last.read)
    assert simulate(replace(SMALL, budget=6), 40).rows[-1].tokens == ()
    assert draw(table).shape[3] == 3


@pytest.mark.parametrize("options, message", [
    ({"block": 5}, "Use recent 5 or more"), ({"budget": 13}, "between"), ({"budget": 22}, "between"),
    ({"reuse_cap": 0}, "at least 1"), ({"sink": 0}, "sink of 1 or"),
    ({"positions": "relative"}, "absolute, rebased"), ({"window": None}, "needs a window")])
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ForcingError, match=message):
        DeepCompressOptions(**options)
    with pytest.raises(ForcingError, match="'rebased'"):
        build(PUBLISHED, 1025)
