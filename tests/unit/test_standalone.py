"""A preset's rollout outside of ComfyUI: a change of prompt goes over what the preset's memory holds."""
import pytest
import torch
from forcing_pack.forcing_core.options import cache_of
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.rollout import Switch
from forcing_pack.forcing_core.standalone import preset_rollout
from forcing_testkit.forcing_corekit import FakeDenoiser, Recorder, cached, network, prompts

pytestmark = pytest.mark.usefixtures("one_thread")


class Noise:
    def initial(self, block):
        return torch.full((1, 4, block.frames, 4, 6), float(block.first))

    def renoise(self, block, step):
        return self.initial(block)


def recached(name, frames=30, at=27, **more):
    """(first, frames) of the forwards that rewrite the memory of a preset."""
    denoiser = Recorder(FakeDenoiser())
    list(preset_rollout(get(name), denoiser, frames, Noise(), switches=[Switch(at, 1)], **more))
    return [event[1:] for event in denoiser.events if event[0] == "recache"]


@pytest.mark.parametrize("name, window", [
    ("longlive", 12), ("longlive-infinity", 12), ("reward-forcing", 9), ("deep-forcing", 21), ("context-forcing", 21),
    ("tempcache", 7), ("recency-forcing", 21), ("rolling-sink", 21), ("memflow", 12), ("relax-forcing", 7)])
def test_a_recache_goes_over_the_window(name, window):
    assert recached(name) == [(27 - window, window)]
    assert recached(name, 9, 6) == [(0, 6)]  # or over all there is


@pytest.mark.parametrize("name", ["self-forcing", "resampling-forcing"])
def test_a_memory_without_a_window_is_rewritten_whole(name):
    assert recached(name) == [(0, 27)]


def test_a_window_of_ones_own_counts():
    """Also where the preset's own memory could not make a video of that length."""
    assert recached("longlive", window=9) == [(18, 9)]
    assert recached("self-forcing", 1050, window=9) == [(18, 9)]


def test_the_sink_of_longlive_outlives_a_change_of_prompt():
    """As published (global_sink). A recache over the whole video would have rewritten it."""
    preset, net = get("longlive"), network()
    denoiser = cached(net, cache_of(preset), 24, texts=[prompts(), prompts(seed=1)])
    store, seen = denoiser.conditions[0].memory.store, []
    for block, _ in preset_rollout(preset, denoiser, 24, Noise(), switches=[Switch(18, 1)]):
        if block.first in (15, 18):  # before and after
            seen.append([store._data[1].roped[:, [store.slots[f] for f in frames]].clone()
                         for frames in ((0, 1, 2), (12, 13, 14))])
    before, after = seen[0], seen[1]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
