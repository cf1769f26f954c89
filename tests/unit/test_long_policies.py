"""What holds for every policy whose memory is more than frames: the EMA sink, the deep sink and compression.

Whole rollouts of a tiny network through presets, as users run them.
"""
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core import presets
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.options import cache_of, from_preset
from forcing_pack.forcing_core.plan_view import StoreShape, announce, simulate, title
from forcing_pack.forcing_core.policies import KINDS, DeepCompressOptions, DeepSinkOptions, EmaSinkOptions
from forcing_pack.forcing_core.presets import Preset, get
from forcing_pack.forcing_core.standalone import make_denoiser, preset_rollout
from forcing_pack.forcing_core.wan import WanConfig
from forcing_pack.forcing_core.wan.random import random_network, random_prompt
from forcing_testkit.passkit import memory, play

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = WanConfig(dim=128, ffn_dim=64, heads=1, layers=2, text_dim=8, text_len=4, freq_dim=32)
SIZE, CHANNELS = (4, 4), 16
EMA = EmaSinkOptions(window=6, sink=2, block=2, alpha=0.5)
DEEP = DeepSinkOptions(window=8, sink=4, block=2)
COMPRESS = DeepCompressOptions(window=8, sink=2, block=2, budget=6, recent=3, reuse_cap=2)
POLICIES = {
    "ema": EMA, "ema float32": replace(EMA, sink_dtype="float32"), "ema compact": replace(EMA, compact=True),
    "deep sink": DEEP, "deep sink compact": replace(DEEP, compact=True),
    "compress": COMPRESS, "compress compact": replace(COMPRESS, compact=True),
    "paper": replace(COMPRESS, aligned=True, hole=False, reuse_cap=None)}
VARIANTS = {**POLICIES, "deep sink int8": replace(DEEP, store="int8"),
            "ema int8 float32": replace(EMA, store="int8", sink_dtype="float32"),
            "deep sink offloaded": replace(DEEP, offload=True)}
by_policy = pytest.mark.parametrize("name", POLICIES)


@pytest.fixture(scope="module")
def net():
    return random_network(CONFIG, 0)


class Stack:
    """The noise of several seeds as samples of a batch."""

    def __init__(self, *seeds):
        self.each = [BlockNoise(seed, (1, CHANNELS), SIZE) for seed in seeds]

    def initial(self, block):
        return torch.cat([noise.initial(block) for noise in self.each])

    def renoise(self, block, step):
        return torch.cat([noise.renoise(block, step) for noise in self.each])


def denoiser(net, options, frames, seeds=(0,), dtype=torch.float32):
    prompt = torch.cat([random_prompt(CONFIG, seed) for seed in seeds]).to(dtype)
    return make_denoiser(net, options, frames, SIZE, [prompt])


def rollout(net, options, frames, seeds=(0,), given=None):
    made = given or denoiser(net, options, frames, seeds)
    preset = Preset("test", "test", block=options.block, steps=(1000, 500))
    return torch.cat([x0 for _, x0 in preset_rollout(preset, made, frames, Stack(*seeds))], dim=2)


@by_policy
def test_a_longer_video_begins_with_the_shorter_one(net, name):
    """Nothing depends on the length or on what comes later, before, at and after the first eviction."""
    options = POLICIES[name]
    longest = rollout(net, options, 20)
    for frames in (options.window, options.window + 2, 14):
        assert torch.equal(rollout(net, options, frames), longest[:, :, :frames])


@by_policy
def test_a_batch_of_two_is_two_runs(net, name):
    """Also where tokens are chosen: every sample by its own queries."""
    both = rollout(net, POLICIES[name], 16, (1, 2))
    one, other = (rollout(net, POLICIES[name], 16, (seed,)) for seed in (1, 2))
    assert float((both - torch.cat([one, other])).abs().max()) <= 1e-4
    assert float((one - other).abs().max()) > 0.1


@by_policy
def test_every_run_gives_the_same_numbers(net, name):
    """A new run and one on a store that was emptied: no state survives."""
    options = POLICIES[name]
    first = rollout(net, options, 16)
    assert torch.equal(rollout(net, options, 16), first)
    used = denoiser(net, options, 16)
    rollout(net, options, 16, given=used)
    used.forget()
    assert torch.equal(rollout(net, options, 16, given=used), first)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_announced_bytes_are_allocated_bytes_at_any_length(name, dtype):
    options = VARIANTS[name]
    shape = StoreShape(layers=2, dim=256, height=2, width=4, batch=2, element_size=dtype.itemsize)
    sizes = []
    for frames in (options.window, 14, 40):
        now = memory(options, frames)
        play(options, frames, batch=2, dtype=dtype, into=now)
        assert now.store.nbytes == announce(options, frames, shape).bytes > 0
        sizes.append(now.store.nbytes)
        now.free()
        assert now.store.nbytes == 0 and now.store.frames == ()
    assert sizes[0] <= sizes[1] == sizes[2]


@by_policy
def test_a_table_is_drawn_of_what_passes_plan(name):
    options = POLICIES[name]
    plans = [one.plan for one in play(options, 20) if one.opens and one.layer == 0]
    rows = simulate(options, 20).rows
    assert [(row.read, row.positions, row.query) for row in rows] == [
        (plan.read, plan.positions, plan.query) for plan in plans]
    for row in rows:
        assert max(row.read) < row.block.end and not {*row.tokens} & {*row.read} and {*row.sink} <= {*row.read}


def test_what_kind_of_positions_is_said():
    assert "relative positions" in title(simulate(EMA, 12)) and "absolute positions" in title(simulate(DEEP, 12))


@pytest.mark.parametrize(("system", "options"), [
    ("reward-forcing", EmaSinkOptions(9, 3, 3, 0.999, "model")),
    ("deep-forcing", DeepCompressOptions(21, 10, 3, 16, 4, 7, aligned=False, hole=True, positions="rebased")),
    ("deep-forcing-sink", DeepSinkOptions(21, 14, 3, hole=True, positions="rebased"))])
def test_presets_run_with_the_published_options(system, options):
    preset = get(system)
    assert preset.available and presets.POLICIES[preset.policy] is None
    assert cache_of(preset) == options == from_preset(preset).cache
    assert KINDS[preset.policy][0] is type(options)


@pytest.mark.parametrize("system", ["reward-forcing", "deep-forcing", "deep-forcing-sink"])
def test_presets_run_past_their_window(net, system):
    preset = get(system)
    frames = preset.window + 3
    made = denoiser(net, cache_of(preset), frames)
    clip = torch.cat([x0 for _, x0 in preset_rollout(preset, made, frames, Stack(0))], dim=2)
    assert clip.shape[2] == frames and bool(torch.isfinite(clip).all())
    assert len(made.conditions[0].memory.store.frames) < frames
