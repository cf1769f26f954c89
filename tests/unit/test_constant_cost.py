"""A block late in a video costs what an early one costs, in time and in bytes, under every policy whose memory is bounded.

Seconds of the processor, not of the clock, so that other programs do not count; `tests/tools/constant_cost.py` takes the
clock, and real minutes.
"""
import time

import pytest
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.wan import WanConfig
from forcing_testkit.costkit import LONG, MINUTE, bounded_options, cost

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = WanConfig(dim=128, ffn_dim=64, heads=1, layers=1, in_channels=4, out_channels=4, freq_dim=32, text_dim=8, text_len=4)
EARLY, BLOCKS, TRIES, MOST = 72, 12, 3, 1.25
SMALL, LARGE = (4, 4), (8, 8)  # 4 and 16 tokens a frame


@pytest.mark.parametrize("options", bounded_options().values(), ids=list(bounded_options()))
def test_late_blocks_cost_no_more_than_early_ones(options):
    """Both rollouts are of a video of 20 minutes; the late one has made a minute of it."""
    ratios = []
    while len(ratios) < TRIES and min(ratios, default=MOST + 1) > MOST:
        found = cost(options, CONFIG, frames=LONG, early=EARLY, late=MINUTE, size=SMALL, steps=1, blocks=BLOCKS,
                     clock=time.process_time)
        assert found.early_bytes == found.late_bytes and found.early_bytes[0] > 0
        ratios.append(found.ratio)
    assert min(ratios) <= MOST, ratios


def test_the_measure_sees_a_memory_that_grows():
    """Otherwise the test above would pass with anything: without a window, four times the frames are attended to."""
    found = cost(WindowOptions(), CONFIG, frames=MINUTE, early=EARLY, late=MINUTE, size=LARGE, steps=1, blocks=BLOCKS,
                 clock=time.process_time)
    assert found.ratio > MOST
