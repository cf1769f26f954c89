"""The table of plans is what a rollout really does, and the announced bytes are what a store really takes."""
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan_view import (
    COLOURS,
    StoreShape,
    _state,
    announce,
    draw,
    format_bytes,
    simulate,
    start_seconds,
    title,
)
from forcing_pack.forcing_core.policies import MergingOptions, WindowOptions
from forcing_pack.forcing_core.presets import Preset
from forcing_pack.forcing_core.standalone import make_denoiser, preset_rollout
from forcing_pack.forcing_core.wan import WanConfig
from forcing_pack.forcing_core.wan.random import random_network, random_prompt
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIG = WanConfig(dim=64, ffn_dim=32, heads=2, layers=2, text_dim=8, text_len=4, freq_dim=32)
SIZE = 4, 8


pytestmark = pytest.mark.usefixtures("one_thread")


def rollout(options, frames, conditions=1):
    """A real rollout of a tiny network; returns its denoiser with the plans of all calls of each condition."""
    preset = Preset("test", "test", block=options.block, steps=(1000, 500), cfg=1.0 if conditions == 1 else 2.0)
    prompts = [random_prompt(CONFIG, seed) for seed in range(conditions)]
    denoiser = make_denoiser(random_network(CONFIG, 0), options, frames, SIZE, prompts, preset.cfg)
    policy, calls = denoiser.conditions[0].memory.policy, []
    plan = policy.plan
    policy.plan = lambda call: calls.append((call, plan(call))) or calls[-1][1]
    for _ in preset_rollout(preset, denoiser, frames, BlockNoise(0, (1, 16), SIZE)):
        pass
    return denoiser, calls


def test_rows_of_a_window_with_a_sink():
    table = simulate(WindowOptions(window=6, sink=1, block=2), 10)
    assert [row.read for row in table.rows] == [
        (0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5), (0, 3, 4, 5, 6, 7), (0, 5, 6, 7, 8, 9)]
    assert [row.evicted for row in table.rows] == [(), (), (), (1, 2), (3, 4)]
    assert [row.sink for row in table.rows] == [(), (0,), (0,), (0,), (0,)]
    assert [row.query for row in table.rows] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert table.rows[4].distances == (-8, -3, -2, -1, 0, 1)


def test_relative_positions_keep_the_sink_at_one_distance():
    table = simulate(WindowOptions(window=6, sink=1, block=2, positions="relative"), 40)
    assert {row.distances for row in table.rows[3:]} == {(-4, -3, -2, -1, 0, 1)}


def test_given_frames_come_before_the_first_block():
    table = simulate(WindowOptions(window=6, sink=1, block=3), 8, given=4, independent_first=True)
    assert [(row.block.first, row.block.frames) for row in table.rows] == [(4, 3), (7, 1)]
    assert table.rows[0].read == (0, 2, 3, 4, 5, 6)
    assert table.rows[0].evicted == (1,)


def test_a_table_starts_with_a_single_frame_for_models_that_do():
    table = simulate(WindowOptions(), 7, independent_first=True)
    assert [row.block.frames for row in table.rows] == [1, 3, 3]


@pytest.mark.parametrize("options", [WindowOptions(window=5, sink=1, block=2),
                                     WindowOptions(window=5, sink=1, block=2, positions="relative"), WindowOptions()])
def test_a_table_is_what_a_rollout_plans(options):
    _, calls = rollout(options, 11)
    first_calls = [plan for call, plan in calls if call.phase == "noisy" and call.first not in call.held]
    rows = simulate(options, 11).rows
    assert [(row.read, row.positions, row.query) for row in rows] == [
        (plan.read, plan.positions, plan.query) for plan in first_calls]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_row_sees_more_than_its_window_and_nothing_comes_back(data):
    block, sink = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    options = WindowOptions(window=sink + block + data.draw(st.integers(0, 6)), sink=sink, block=block,
                            positions=data.draw(st.sampled_from(["absolute", "relative"])))
    table = simulate(options, data.draw(st.integers(options.window, 40)))
    gone = set()
    for row in table.rows:
        gone |= set(row.evicted)
        assert len(row.read) <= options.window
        assert not gone & set(row.read)
        assert gone | set(row.read) == set(range(row.block.end))


def test_merged_frames_are_not_drawn_as_evicted():
    """They live on in the groups that their tokens joined; where nothing is merged, the newest do, whole."""
    options = MergingOptions(sink=1, recent=3, block=3, budget=6)
    table = simulate(options, 30)
    last = table.rows[-1]
    assert last.read == (0, *range(24, 30)) and last.tokens == tuple(range(1, 24)) and last.evicted == (21, 22, 23)
    assert {_state(table, row, frame) for row in table.rows for frame in range(30)} == {
        "block", "past", "sink", "tokens", "future"} and COLOURS["tokens"] in colours(draw(table))
    whole = simulate(replace(options, tau=1.0), 30).rows[-1]
    assert whole.tokens == tuple(range(18, 24))
    assert simulate(options, 7).rows[-1].tokens == ()


def test_a_policy_without_tokens_of_its_own_leaves_none():
    table = simulate(WindowOptions(window=6, sink=1, block=2), 20)
    assert all(row.tokens == () for row in table.rows) and _state(table, table.rows[-1], 1) == "evicted"


@pytest.mark.parametrize("conditions", [1, 2])
@pytest.mark.parametrize("options", [WindowOptions(window=5, sink=1, block=2), WindowOptions(block=3),
                                     WindowOptions(window=5, sink=1, block=2, positions="relative"),
                                     WindowOptions(window=5, sink=1, block=2, positions="relative", compact=True)])
def test_announced_bytes_are_allocated_bytes(options, conditions):
    denoiser, _ = rollout(options, 9, conditions)
    shape = StoreShape(layers=2, dim=64, height=SIZE[0], width=SIZE[1], element_size=4, conditions=conditions)
    allocated = sum(condition.memory.store.nbytes for condition in denoiser.conditions)
    assert announce(options, 9, shape).bytes == allocated > 0


def test_an_announcement_in_words():
    made = announce(WindowOptions(window=12, sink=3), 60)
    assert made.bytes == 3450470400
    assert made.text == ("KV store 3.45 GB (3,290.6 MiB): 12 of 60 latent frames, 30 layers x 1536, "
                         "1560 tokens a frame, 16 bit")
    assert announce(WindowOptions(window=12, sink=3), 60, StoreShape(conditions=2)).bytes == 2 * 3450470400
    assert format_bytes(18579456) == "18.6 MB (17.7 MiB)"


def test_frames_have_the_times_of_the_video():
    assert [start_seconds(frame) for frame in (0, 1, 2, 20)] == [0, 1 / 16, 5 / 16, 77 / 16]
    assert title(simulate(WindowOptions(), 21)) == (
        "window everything, sink 0, absolute positions  |  21 latent frames = 81 frames, 5.1 s")


def colours(picture):
    codes = (picture[0] * 255).round().int() @ torch.tensor([1 << 16, 1 << 8, 1], dtype=torch.int32)
    return {(code >> 16, code >> 8 & 255, code & 255) for code in codes.unique().tolist()}


@pytest.mark.parametrize("options, frames, given", [
    (WindowOptions(), 21, 0), (WindowOptions(block=1), 1, 0), (WindowOptions(window=12, sink=3), 1024, 0),
    (WindowOptions(block=1), 600, 0), (WindowOptions(window=21, sink=3, block=8, positions="relative"), 3001, 0),
    (WindowOptions(window=9, sink=2), 30, 7), (WindowOptions(window=200, sink=1, block=100), 900, 0)])
def test_a_picture_has_the_layout_of_an_image_and_a_bounded_size(options, frames, given):
    picture = draw(simulate(options, frames, given=given))
    assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[3] == 3
    assert picture.shape[2] == 1200 and picture.shape[1] <= 760
    assert 0 <= picture.min() and picture.max() <= 1
    shown = colours(picture)
    assert COLOURS["block"] in shown
    assert (COLOURS["sink"] in shown) == (options.sink > 0)
    assert (COLOURS["given"] in shown) == (given > 0)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ForcingError, match="640 to 4096"):
        draw(simulate(WindowOptions(), 6), width=100)
    with pytest.raises(ForcingError, match="divisible by 16"):
        StoreShape(height=7)
    with pytest.raises(ForcingError, match="nothing to generate"):
        simulate(WindowOptions(), 4, given=4)
    with pytest.raises(ForcingError, match="make no sense"):
        simulate(WindowOptions(), 4, block=0)
