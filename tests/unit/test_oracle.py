"""The cached rollout against one no-cache pass under a dense mask, on a tiny real network.

The mask is made from the literal block ends below and from the rule "frame j is seen by the block that ends at E
when j < E and (j < S or j >= E - (W - S))"; nothing of the policy, the store or rope.py takes part in it.
"""
from dataclasses import dataclass

import pytest
import torch
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.schedule import Level, levels
from forcing_testkit.forcing_corekit import (
    CHANNELS,
    DensePass,
    Recorder,
    block_of,
    cached,
    gap,
    latents,
    network,
    prompts,
)

TOLERANCE = 1e-5
LEVELS = levels([1000, 500], 5.0)


@dataclass(frozen=True)
class Scenario:
    """ends: where every block ends, given chunks first (the first `chunks` of them)."""

    name: str
    block: int
    window: int | None
    sink: int
    ends: tuple[int, ...]
    chunks: int = 0
    independent: bool = False
    positions: str = "absolute"
    limit: int = 1024
    compact: bool = False
    size: tuple[int, int] = (4, 6)
    batch: int = 1
    context_timestep: float = 0.0

    @property
    def frames(self):
        return self.ends[-1]

    @property
    def given(self):
        return self.ends[self.chunks - 1] if self.chunks else 0

    @property
    def grid(self):
        return self.size[0] // 2, self.size[1] // 2

    @property
    def options(self):
        return WindowOptions(self.window, self.sink, self.block, self.positions, self.limit, self.compact)

    def oracle(self, rows, **changed):
        rule = {"window": self.window, "sink": self.sink, "positions": self.positions, "limit": self.limit}
        return DensePass(rows, self.grid, **{**rule, **changed})


ones, threes = tuple(range(1, 13)), tuple(range(3, 19, 3))
SCENARIOS = [
    Scenario("dense_f3", 3, None, 0, (3, 6, 9, 12)),
    Scenario("f1_w4", 1, 4, 0, ones),
    Scenario("f1_w6_s1", 1, 6, 1, ones),
    Scenario("f1_w5_s2", 1, 5, 2, ones),
    Scenario("f2_w5_s1_odd_tail", 2, 5, 1, (2, 4, 6, 8, 10, 11)),
    Scenario("f2_w5_s3_sink_over_block", 2, 5, 3, (2, 4, 6, 8, 10, 12)),
    Scenario("f3_w6", 3, 6, 0, threes),
    Scenario("f3_w6_s3", 3, 6, 3, threes),
    Scenario("f3_w9_s3_long", 3, 9, 3, tuple(range(3, 25, 3))),
    Scenario("f3_w7_s2_no_multiple", 3, 7, 2, threes),
    Scenario("f3_w8_s5_sink_over_block", 3, 8, 5, threes),
    Scenario("f3_w7_s1_odd_tail", 3, 7, 1, (3, 6, 9, 12, 15, 17)),
    Scenario("f3_w8_s4_odd_tail", 3, 8, 4, (3, 6, 9, 12, 13)),
    Scenario("given4_w6_s1", 3, 6, 1, (3, 4, 7, 10, 13, 16), chunks=2),
    Scenario("given7_over_w5_s2", 3, 5, 2, (3, 6, 7, 10, 13, 16), chunks=3),
    Scenario("given3_f1_w4_s1_context100", 1, 4, 1, (1, 2, 3, 4, 5, 6, 7, 8), chunks=3, context_timestep=100.0),
    Scenario("batch2_f2_w6_s2", 2, 6, 2, (2, 4, 6, 8, 10, 12), batch=2),
    Scenario("latent6x10_w7_s3", 3, 7, 3, (3, 6, 9, 12), size=(6, 10)),
    Scenario("latent10x14_f1_w3_s1", 1, 3, 1, (1, 2, 3, 4, 5, 6), size=(10, 14)),
    Scenario("independent_w7_s1", 3, 7, 1, (1, 4, 7, 10, 13, 16), independent=True),
    Scenario("independent_given4_w6_s2", 3, 6, 2, (1, 4, 7, 10, 13), chunks=2, independent=True),
    Scenario("independent_odd_tail_w5", 2, 5, 0, (1, 3, 5, 7, 9, 10), independent=True),
    Scenario("relative_w9_s3", 3, 9, 3, tuple(range(3, 22, 3)), positions="relative"),
    Scenario("relative_compact_w7_s3", 2, 7, 3, (2, 4, 6, 8, 10, 12, 13), positions="relative", compact=True),
    Scenario("relative_batch2_odd_tail_w8_s4", 3, 8, 4, (3, 6, 9, 12, 14), positions="relative", batch=2),
    Scenario("relative_independent_w6_s2", 3, 6, 2, (1, 4, 7, 10, 13), positions="relative", independent=True),
    Scenario("rebased_w7_s2", 3, 7, 2, tuple(range(3, 22, 3)), positions="rebased", limit=12),
    Scenario("rebased_compact_w5_s2", 1, 5, 2, ones, positions="rebased", limit=8, compact=True),
    Scenario("rebased_at_window_w6_s3", 3, 6, 3, threes, positions="rebased", limit=6),
]
EVICTING = [s for s in SCENARIOS if s.window is not None]
by_name = pytest.mark.parametrize("s", SCENARIOS, ids=lambda s: s.name)


@pytest.fixture(scope="module")
def net():
    return network()


def one_level_run(net, s, ops=None):
    """(z, x0 of the generated frames) with every frame at one timestep: what is left in the store is what the
    oracle computes. A noisier pass comes first, so the eviction happens in another pass than the one compared."""
    z, junk, text = latents(s.frames, s.size, s.batch), latents(s.frames, s.size, s.batch, seed=1), prompts(s.batch)
    denoiser = cached(net, s.options, s.frames, s.size, [text], ops)
    start, out = 0, []
    for end in s.ends:
        here = slice(start, end)
        if end <= s.given:
            denoiser(z[:, :, here], [Level(300.0, 0.3)] * (end - start), start, "clean")
        else:
            denoiser(junk[:, :, here], [Level(900.0, 0.9)] * (end - start), start, "noisy")
            out.append(denoiser(z[:, :, here], [Level(300.0, 0.3)] * (end - start), start, "noisy"))
        start = end
    return z, torch.cat(out, dim=2)


def one_level_oracle(net, s, z, **changed):
    rows = [("clean", frame, block_of(frame, s.ends)[1]) for frame in range(s.frames)]
    velocity = s.oracle(rows, **changed).run(net, z, [300.0] * s.frames, prompts(s.batch))
    return (z - 0.3 * velocity)[:, :, s.given:]


def rollout(net, s):
    """(calls, all frames of the video) of a real block rollout with its clean passes."""
    denoiser = Recorder(cached(net, s.options, s.frames, s.size, [prompts(s.batch)]))
    blocks = layout(s.frames - s.given, s.block, given=s.given, independent_first=s.independent)
    given = latents(s.given, s.size, s.batch) if s.given else None
    noise = BlockNoise(7, (s.batch, CHANNELS), s.size)
    made = [x0 for _, x0 in block_rollout(
        denoiser, blocks, LEVELS, noise, context=given, block=s.block, independent_first=s.independent,
        context_timestep=s.context_timestep)]
    return denoiser.calls, torch.cat(([] if given is None else [given]) + made, dim=2)


def teacher_forced(net, s, video, noisy, level, **changed):
    """x0 of the generated frames in one pass over [clean video | noisy inputs]."""
    ends = [block_of(frame, s.ends)[1] for frame in range(s.frames)]
    rows = [("clean", frame, ends[frame]) for frame in range(s.frames)]
    rows += [("noisy", frame, ends[frame]) for frame in range(s.given, s.frames)]
    clean = [0.0 if frame < s.given else s.context_timestep for frame in range(s.frames)]
    timesteps = clean + [level.timestep] * (s.frames - s.given)
    velocity = s.oracle(rows, **changed).run(net, torch.cat([video, noisy], dim=2), timesteps, prompts(s.batch))
    return noisy - level.sigma * velocity[:, :, s.frames:]


def test_enough_evicting_triples():
    """Guards the list itself: at least twelve (W, S, block) triples that really evict, blocks of 1, 2 and 3."""
    triples = {(s.window, s.sink, s.block) for s in EVICTING if s.frames > s.window}
    assert len(triples) >= 12
    assert {block for _, _, block in triples} == {1, 2, 3}
    assert any(sink > block for _, sink, block in triples)
    assert any(window % block for window, _, block in triples)


@by_name
def test_cached_passes_equal_one_masked_pass(net, s):
    """A frame evicted too early or too late, a lost sink, a wrong position, another sample's text: all show."""
    z, ours = one_level_run(net, s)
    assert gap(ours, one_level_oracle(net, s, z)) <= TOLERANCE


@by_name
def test_rollout_equals_teacher_forcing(net, s):
    """Every step of a real rollout (noisy passes, clean passes, given frames) equals one pass over clean and noisy
    frames: a clean pass at the wrong timestep, or noisy keys left in the store, make it fail."""
    calls, video = rollout(net, s)
    noisy = [c for c in calls if c.phase == "noisy"]
    for step, level in enumerate(LEVELS):
        now = noisy[step::len(LEVELS)]
        assert {c.timesteps for c in now} == {(level.timestep,) * c.frames for c in now}
        inputs = torch.cat([c.x for c in now], dim=2)
        expected = teacher_forced(net, s, video, inputs, level)
        assert gap(torch.cat([c.out for c in now], dim=2), expected) <= TOLERANCE


@pytest.mark.parametrize("s", EVICTING, ids=lambda s: s.name)
def test_oracle_can_fail_on_the_window(net, s):
    """Negative control: without the window in the mask the oracle is far away, so the comparisons above mean
    something."""
    z, ours = one_level_run(net, s)
    assert gap(ours, one_level_oracle(net, s, z, window=None)) > 100 * TOLERANCE


@pytest.mark.parametrize("s", [s for s in EVICTING if s.positions != "absolute"], ids=lambda s: s.name)
def test_oracle_can_fail_on_positions(net, s):
    """Negative control: with a sink, moved positions are not the absolute ones."""
    z, ours = one_level_run(net, s)
    assert gap(ours, one_level_oracle(net, s, z, positions="absolute")) > 100 * TOLERANCE


def test_oracle_can_fail_on_prompts(net):
    """Negative control: swapped prompts of a batch are seen."""
    s = next(s for s in SCENARIOS if s.batch == 2)
    z, ours = one_level_run(net, s)
    swapped = one_level_oracle(net, s, z.flip(0)).flip(0)
    assert gap(ours, swapped) > 100 * TOLERANCE


def test_noisy_keys_left_in_the_store_are_seen(net):
    """Negative control of the clean pass: with its timestep wrong by 100 the teacher-forcing oracle is far away."""
    s = next(s for s in SCENARIOS if s.name == "f3_w6_s3")
    calls, video = rollout(net, s)
    now = [c for c in calls if c.phase == "noisy"][0::len(LEVELS)]
    wrong = Scenario(**{**s.__dict__, "context_timestep": 100.0})
    expected = teacher_forced(net, wrong, video, torch.cat([c.x for c in now], dim=2), LEVELS[0])
    assert gap(torch.cat([c.out for c in now], dim=2), expected) > 100 * TOLERANCE


def test_relative_equals_absolute_without_a_sink(net):
    """Rotary attention sees differences of positions only: without a sink all three kinds are one."""
    base = Scenario("", 3, 6, 0, threes)
    _, absolute = one_level_run(net, base)
    for changes in ({"positions": "relative"}, {"positions": "relative", "compact": True},
                    {"positions": "rebased", "limit": 8}):
        _, moved = one_level_run(net, Scenario(**{**base.__dict__, **changes}))
        assert gap(moved, absolute) <= TOLERANCE


def test_guidance_has_a_memory_a_side(net):
    """With one store for both sides of guidance (as in ComfyUI's own sampler) the sides would mix."""
    s = next(s for s in SCENARIOS if s.name == "f3_w7_s2_no_multiple")
    z, sides = latents(s.frames), [prompts(seed=1), prompts(seed=2)]
    denoiser = cached(net, s.options, s.frames, texts=[[sides[0]], [sides[1]]], guidance=3.0)
    ours = torch.cat([denoiser(z[:, :, end - 3:end], [Level(300.0, 0.3)] * 3, end - 3, "noisy") for end in s.ends], 2)
    rows = [("clean", frame, block_of(frame, s.ends)[1]) for frame in range(s.frames)]
    positive, negative = (s.oracle(rows).run(net, z, [300.0] * s.frames, text) for text in sides)
    expected = z - 0.3 * (negative + 3.0 * (positive - negative))
    assert gap(ours, expected) <= 3 * TOLERANCE
    assert gap(positive, negative) > 100 * TOLERANCE
