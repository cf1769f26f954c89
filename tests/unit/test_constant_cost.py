"""A block late in a video costs what an early one costs, in time and in bytes, under every policy whose memory is bounded.

On a tiny network, to minute 1; `tests/tools/constant_cost.py` goes on to minute 20 of the micro model.
"""
import functools

import pytest
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.wan import WanConfig
from forcing_pack.forcing_core.wan.random import random_network, random_prompt
from forcing_testkit.costkit import LONG, MINUTE, Cost, bounded_options, cost

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = WanConfig(dim=128, ffn_dim=64, heads=1, layers=1, in_channels=4, out_channels=4, freq_dim=32, text_dim=8, text_len=4)
EARLY, LATE, TRIES, MOST = 36, MINUTE - 36, 3, 1.25
SMALL, LARGE = (4, 4), (8, 8)  # 4 and 16 tokens a frame


@functools.cache
def network():
    return random_network(CONFIG, 0), random_prompt(CONFIG, 1)


def measured(options, frames, size):
    return cost(options, *network(), frames=frames, early=EARLY, late=LATE, size=size, steps=1, groups=6, together=2)


@pytest.mark.parametrize("options", bounded_options().values(), ids=list(bounded_options()))
def test_late_blocks_cost_no_more_than_early_ones(options):
    """Both rollouts are of a video of 20 minutes; the late one has made a minute of it."""
    ratios = []
    while len(ratios) < TRIES and min(ratios, default=MOST + 1) > MOST:
        found = measured(options, LONG, SMALL)
        assert found.constant_bytes and found.early_bytes[0] > 0
        ratios.append(found.ratio)
    assert min(ratios) <= MOST, ratios


def test_the_measure_sees_a_memory_that_grows():
    """Otherwise the test above would pass with anything: without a window, four times the frames are attended to."""
    assert measured(WindowOptions(), MINUTE, LARGE).ratio > MOST


def test_bytes_that_differ_from_each_other_or_from_what_was_told_are_not_constant():
    told = 7, 0
    assert Cost(1.0, 1.0, (1.0,), (1.0,), told, told, told).constant_bytes
    for other in [(8, 0), (7, 1)]:
        assert not Cost(1.0, 1.0, (1.0,), (1.0,), told, told, other).constant_bytes
        assert not Cost(1.0, 1.0, (1.0,), (1.0,), told, other, told).constant_bytes
