"""Relax Forcing against scores, places and a softmax made one sample at a time."""
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.options import cache_of
from forcing_pack.forcing_core.plan_view import simulate
from forcing_pack.forcing_core.policies import RelaxOptions, WindowOptions, build, replayed_frames
from forcing_pack.forcing_core.presets import get
from forcing_testkit.forcing_corekit import gap, rotated
from forcing_testkit.policykit import attended, softmax_attention, video
from torch.nn.functional import cosine_similarity

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, BATCH, LAYERS, GRID, TOKENS = 2, 2, 2, (1, 2), 2
PUBLISHED = RelaxOptions()


class Driven:
    """Random keys and values through a memory, frame by frame; what was written by clean passes is noted.

    Noisy passes have other keys, and keys of every layer and sample point in ways of their own, so that a choice from the
    wrong ones is another choice."""

    def __init__(self, options, frames):
        self.memory = make_memory(options, frames, layers=LAYERS, grid=GRID, head_dim=128, device="cpu")
        self.options, self.draw, self.past = options, torch.Generator().manual_seed(3), {}

    def forward(self, first, frames, phase):
        """(outputs, raw q, own (k, v)) of all layers, each a list; and the pass."""
        now = self.memory.begin(first, frames, phase)
        outs, qs, own = [], [], []
        for layer in range(LAYERS):
            q, k, v = torch.randn(3, BATCH, frames * TOKENS, HEADS, 128, generator=self.draw)
            k = k + torch.randn(BATCH, frames, 1, HEADS, 128, generator=self.draw).repeat_interleave(TOKENS, 2).flatten(1, 2)
            outs.append(attended(now, layer, q, k, v))
            qs.append(q)
            own.append((k, v))
        if phase != "noisy":
            for i in range(frames):
                here = slice(i * TOKENS, (i + 1) * TOKENS)
                self.past[first + i] = [(k[:, here], v[:, here]) for k, v in own]
        return outs, qs, own, now

    def block(self, first, steps=1):
        for _ in range(steps):
            self.forward(first, self.options.block, "noisy")
        return self.forward(first, self.options.block, "clean")

    def until(self, frames):
        for first in range(0, frames, self.options.block):
            self.block(first)
        return self

    def wanted(self, sample, first, held):
        """By the rule: (chosen frame, all candidates) of a sample for the block at `first`; `held` is the oldest one kept
        behind the sink."""
        between = [f for f in range(held, first - 1) if f >= 2]
        half = between[len(between) // 2:]
        four = [half[i * (len(half) - 1) // 3] for i in range(4)]
        mean = lambda frames: torch.stack([self.past[f][0][0][sample].mean(0).flatten() for f in frames]).mean(0)  # noqa: E731
        cos = lambda a, b: float(cosine_similarity(a, b, dim=0))  # noqa: E731
        score = {f: cos(mean([f]), mean([0, 1])) - 2.0 * cos(mean([f]), mean([first - 1])) for f in four}
        return max(score, key=score.get), four


@pytest.mark.parametrize("first, oldest", [(30, 2), (150, 35)])
def test_a_block_attends_to_seven_frames_chosen_by_the_rule(first, oldest):
    """Before the reservoir is full and long after: sink, one of four, tail and block stand in a row, whatever is between."""
    driven, picked = Driven(PUBLISHED, first + 6).until(first), set()
    assert len(driven.memory.store.frames) == min(first, 120)
    for phase in ("noisy", "noisy", "clean"):
        outs, qs, own, now = driven.forward(first, 3, phase)
        assert len(now.plan.read) == 7 and now.plan.query == (4, 5, 6)
        assert min(now.store.frames[2:]) == oldest
        for layer, sample in ((layer, sample) for layer in range(LAYERS) for sample in range(BATCH)):
            chosen, four = driven.wanted(sample, first, oldest)
            assert len({*four}) == 4 and four[-1] == first - 2
            picked.add((sample, chosen))
            frames = [driven.past[f][layer] for f in (0, 1, chosen, first - 1)]
            k, v = (torch.cat([*(frame[i][sample:sample + 1] for frame in frames), own[layer][i][sample:sample + 1]], dim=1)
                    for i in range(2))
            out = softmax_attention(rotated(qs[layer][sample:sample + 1], (4, 5, 6), GRID), rotated(k, range(7), GRID), v)
            assert gap(outs[layer][sample:sample + 1], out) <= 1e-5
    assert len(picked) == BATCH  # the same in all steps and layers, and here another one for each sample


def test_the_reservoir_is_bounded_and_forgets_its_oldest_frames():
    driven = Driven(PUBLISHED, 160).until(150)
    assert driven.memory.store.frames == (0, 1, *range(32, 150)) and driven.memory.policy.capacity == 120
    assert build(PUBLISHED, 33).capacity == 33
    small = Driven(replace(PUBLISHED, reservoir=7), 40).until(30)
    assert small.memory.store.frames == (0, 1, *range(25, 30))
    now = small.forward(30, 3, "noisy")[-1]
    assert now.plan.read == (0, 1, 28, 29, 30, 31, 32) and now.plan.evict == (25, 26, 27)


@pytest.mark.parametrize("count, want", [(1, [5]), (2, [5, 9]), (3, [5, 7, 9]), (4, [5, 6, 7, 9]), (5, [5, 6, 7, 8, 9])])
def test_candidates_are_spread_over_the_newer_half(count, want):
    options = RelaxOptions(sink=1, recent=2, candidates=count, history=min(count, 1))
    sink, among, tail = options.parts((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11))
    assert (sink, tail) == ((0,), (10, 11))
    assert list(among) == want


def test_few_frames_are_all_attended_to():
    options = RelaxOptions(history=3, candidates=4)
    assert options.parts((0, 1, 2, 3, 4)) == ((0, 1), (2, 3), (4,))
    assert options.parts((0, 1, 2, 3, 4, 5)) == ((0, 1), (2, 3, 4), (5,))
    assert options.parts((0, 1, 2)) == ((0, 1), (), (2,)) and options.parts((0,)) == ((0,), (), ())
    for frames in (3, 6):  # nothing to choose yet
        assert gap(video(PUBLISHED, frames), video(WindowOptions(), frames)) <= 1e-5
    assert gap(video(PUBLISHED, 9), video(WindowOptions(), 9)) > 1e-3


def test_without_novelty_the_beginning_decides_and_with_much_the_tail():
    picks = []
    for novelty in (0.0, 50.0):
        driven = Driven(replace(PUBLISHED, novelty=novelty), 33).until(30)
        *_, now = driven.forward(30, 3, "noisy")
        store, (sink, among, tail) = now.store, PUBLISHED.parts(tuple(range(30)))
        near = store.described(tail if novelty else sink).mean(dim=1, keepdim=True)
        alike = cosine_similarity(store.described(among), near, dim=-1)
        best = alike.argmin(dim=1) if novelty else alike.argmax(dim=1)
        assert [plan.read[2] for plan in now._plans] == [among[i] for i in best.tolist()]
        picks.append(best.tolist())
    assert picks[0] != picks[1]


def test_a_choice_of_more_frames_stays_in_the_order_of_time():
    options = replace(PUBLISHED, history=2)
    *_, now = Driven(options, 33).until(30).forward(30, 3, "noisy")
    for plan in now._plans:
        assert len(plan.read) == 8 and list(plan.read) == sorted({*plan.read}) and plan.positions == tuple(range(8))


def test_descriptions_come_from_clean_passes():
    driven = Driven(PUBLISHED, 9)
    driven.forward(0, 3, "noisy")
    assert float(driven.memory.store.means.abs().max()) == 0
    driven.forward(0, 3, "clean")
    before = driven.memory.store.means.clone()
    assert gap(before[:, 1], driven.past[1][0][0].mean(dim=1).flatten(1)) <= 1e-6
    driven.forward(3, 3, "noisy")
    assert torch.equal(driven.memory.store.means, before)


def test_a_recache_rewrites_what_a_window_of_seven_holds():
    driven = Driven(PUBLISHED, 66).until(60)
    store, raw = driven.memory.store, driven.memory.store._data[1].raw.clone()
    assert replayed_frames(driven.memory.policy) == 7
    *_, now = driven.forward(53, 7, "recache")
    assert now.plan.read == (0, 1, *range(55, 60)) and now.plan.write == tuple(range(55, 60))
    assert now.plan.query == (0, 1, 2, 3, 4, 5, 6)
    changed = {f for f, slot in store.slots.items() if not torch.equal(store._data[1].raw[:, slot], raw[:, slot])}
    assert changed == {*range(55, 60)} and store.frames == tuple(range(60))
    assert gap(store.described((57,))[:, 0], driven.past[57][0][0].mean(dim=1).flatten(1)) <= 1e-6
    assert driven.wanted(0, 60, 2)[0] == driven.forward(60, 3, "noisy")[-1]._plans[0].read[2]


def test_a_recache_from_the_first_frame_on_rewrites_the_sink_too():
    driven = Driven(PUBLISHED, 15).until(6)
    *_, now = driven.forward(0, 6, "recache")
    assert now.plan.write == now.plan.read == (0, 1, 2, 3, 4, 5) and now.plan.query == (0, 1, 2, 3, 4, 5)


def test_the_plan_view_shows_the_reservoir():
    row = simulate(PUBLISHED, 60).rows[-1]
    assert len(row.read) == 7 and row.distances == (-4, -3, -2, -1, 0, 1, 2) and row.sink == (0, 1)
    assert {*row.kept} | {*row.read} == {*range(60)} and not row.tokens


def test_the_preset():
    preset = get("relax-forcing")
    assert cache_of(preset) == PUBLISHED and preset.available and preset.window == PUBLISHED.window == 7


@pytest.mark.parametrize("options, message", [
    ({"recent": 0}, "recent and block at least 1"), ({"history": 5}, "as many as the history"),
    ({"novelty": -1.0}, "2 as published"), ({"novelty": float("nan")}, "2 as published"),
    ({"reservoir": 6}, "at least 7"), ({"sink": -1}, "make no sense")])
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ForcingError, match=message):
        RelaxOptions(**options)
