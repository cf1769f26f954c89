"""Dense-mask forwards of the training half: literal masks, and agreement with the cached rollout.

`DensePass` of the test kit is the oracle of the plain forward: own mask rule, own rotations. The oracle of teacher
forcing is a real rollout with its store.
"""
from dataclasses import dataclass

import pytest
import torch
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.training.parallel import (
    block_causal,
    block_ends,
    parallel_velocity,
    per_token,
    teacher_forced_velocity,
    teacher_forcing,
)
from forcing_pack.forcing_core.wan import TextState, WanConfig
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
    visible,
)

TOLERANCE = 1e-5
SIZE = (4, 4)
CONFIG = WanConfig(dim=128, ffn_dim=128, heads=1, layers=2, in_channels=CHANNELS, out_channels=CHANNELS, text_dim=32,
                   text_len=8)
LEVELS = levels([1000, 500], 5.0)


@dataclass(frozen=True)
class Clip:
    """ends: where every block ends, written out."""

    name: str
    block: int
    ends: tuple[int, ...]
    window: int | None = None
    sink: int = 0
    independent: bool = False
    context_timestep: float = 0.0
    batch: int = 1

    @property
    def frames(self):
        return self.ends[-1]

    @property
    def rule(self):
        return {"window": self.window, "sink": self.sink, "independent_first": self.independent}

    def own_end(self, frame):
        return block_of(frame, self.ends)[1]


CLIPS = [
    Clip("everything", 3, (3, 6, 9)),
    Clip("frame_by_frame", 1, (1, 2, 3, 4, 5)),
    Clip("tail", 3, (3, 6, 8)),
    Clip("window", 2, (2, 4, 6, 8, 10), window=4),
    Clip("window_sink", 3, (3, 6, 9, 12, 15), window=9, sink=3),
    Clip("sink_over_block", 1, (1, 2, 3, 4, 5, 6, 7), window=4, sink=2),
    Clip("window_no_multiple", 2, (2, 4, 6, 8, 9), window=5, sink=1),
    Clip("independent", 3, (1, 4, 7), independent=True),
    Clip("independent_window_sink", 2, (1, 3, 5, 7, 9), window=5, sink=1, independent=True),
    Clip("context_timestep", 2, (2, 4, 6), context_timestep=60.0),
    Clip("batch", 2, (2, 4, 6, 8), window=6, sink=2, batch=2),
]
by_name = pytest.mark.parametrize("clip", CLIPS, ids=lambda c: c.name)
EVICTING = [c for c in CLIPS if c.window]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def net():
    return network(3, CONFIG)


def picture(*lines):
    """A mask from lines of x (visible) and dots."""
    return torch.tensor([[c == "x" for c in line.replace(" ", "")] for line in lines])


# --- masks

def test_block_causal_mask_written_out():
    assert torch.equal(block_causal(5, 2), picture("xx...", "xx...", "xxxx.", "xxxx.", "xxxxx"))


def test_independent_first_frame_written_out():
    assert torch.equal(block_causal(5, 2, independent_first=True),
                       picture("x....", "xxx..", "xxx..", "xxxxx", "xxxxx"))


def test_window_and_sink_written_out():
    """Window 4 with a sink of 1: the sink, and the last three frames up to the block's end."""
    assert torch.equal(block_causal(6, 2, window=4, sink=1),
                       picture("xx....", "xx....", "xxxx..", "xxxx..", "x..xxx", "x..xxx"))


def test_local_window_without_sink_written_out():
    assert torch.equal(block_causal(6, 2, window=3),
                       picture("xx....", "xx....", ".xxx..", ".xxx..", "...xxx", "...xxx"))


def test_teacher_forcing_mask_written_out():
    """Left: what is seen of the clean half; right: of the noisy one."""
    assert torch.equal(teacher_forcing(5, 2), picture(
        "xx... .....", "xx... .....", "xxxx. .....", "xxxx. .....", "xxxxx .....",
        "..... xx...", "..... xx...", "xx... ..xx.", "xx... ..xx.", "xxxx. ....x"))


def test_teacher_forcing_with_window_and_sink_written_out():
    assert torch.equal(teacher_forcing(6, 2, window=4, sink=1)[6:], picture(
        "...... xx....", "...... xx....", "xx.... ..xx..", "xx.... ..xx..", "x..x.. ....xx", "x..x.. ....xx"))


@by_name
def test_masks_follow_the_rule_of_the_cache(clip):
    """Frame j is seen by the block that ends at E when j < E and (j < S or j >= E - (W - S))."""
    F = clip.frames
    assert block_ends(F, clip.block, clip.independent).tolist() == [clip.own_end(f) for f in range(F)]
    sees = [visible(clip.own_end(f), clip.window, clip.sink) for f in range(F)]
    causal = torch.tensor([[j in sees[f] for j in range(F)] for f in range(F)])
    own = torch.tensor([[clip.own_end(j) == clip.own_end(f) for j in range(F)] for f in range(F)])
    assert torch.equal(block_causal(F, clip.block, **clip.rule), causal)
    forced = teacher_forcing(F, clip.block, **clip.rule)
    assert torch.equal(forced[:F, :F], causal) and not forced[:F, F:].any()
    assert torch.equal(forced[F:, :F], causal & ~own) and torch.equal(forced[F:, F:], own)


def test_per_token_repeats_every_frame():
    small = picture("x.", "xx")
    assert torch.equal(per_token(small, 2), picture("xx..", "xx..", "xxxx", "xxxx"))


# --- forwards

@by_name
def test_parallel_forward_equals_the_dense_oracle(net, clip):
    """Every frame at a timestep of its own, as in diffusion forcing."""
    x, text = latents(clip.frames, SIZE, clip.batch), prompts(clip.batch)
    timesteps = [1000.0 - 50 * clip.own_end(f) for f in range(clip.frames)]
    rows = [("clean", f, clip.own_end(f)) for f in range(clip.frames)]
    expected = DensePass(rows, (2, 2), clip.window, clip.sink).run(net, x, timesteps, text)
    mask = block_causal(clip.frames, clip.block, **clip.rule)
    ours = parallel_velocity(net, x, torch.tensor([timesteps] * clip.batch), TextState(text), mask)
    assert gap(ours, expected) <= TOLERANCE


def test_full_mask_is_the_plain_bidirectional_network(net):
    x, text = latents(4, SIZE), prompts()
    rows = [("clean", f, 4) for f in range(4)]
    expected = DensePass(rows, (2, 2)).run(net, x, [700.0] * 4, text)
    ours = parallel_velocity(net, x, torch.full((1, 4), 700.0), TextState(text), torch.ones(4, 4).bool())
    assert gap(ours, expected) <= TOLERANCE
    assert gap(parallel_velocity(net, x, torch.full((1, 4), 700.0), TextState(text), block_causal(4, 1)),
               expected) > 100 * TOLERANCE


def test_positions_are_relative_and_matter(net):
    x, text, t = latents(4, SIZE), prompts(), torch.full((1, 4), 500.0)
    mask = block_causal(4, 2)
    base, moved, spread = (parallel_velocity(net, x, t, TextState(text), mask, positions=p)
                           for p in (None, [7, 8, 9, 10], [0, 3, 6, 9]))
    assert gap(base, moved) <= TOLERANCE
    assert gap(base, spread) > 100 * TOLERANCE


# --- teacher forcing against the cached rollout

def rollout(net, clip):
    """(calls, generated video) of a real rollout with its store and its clean passes."""
    denoiser = Recorder(cached(net, WindowOptions(clip.window, clip.sink, clip.block), clip.frames, SIZE,
                               [prompts(clip.batch)]))
    blocks = layout(clip.frames, clip.block, independent_first=clip.independent)
    made = [x0 for _, x0 in block_rollout(
        denoiser, blocks, LEVELS, BlockNoise(7, (clip.batch, CHANNELS), SIZE), block=clip.block,
        independent_first=clip.independent, context_timestep=clip.context_timestep)]
    return [c for c in denoiser.calls if c.phase == "noisy"], torch.cat(made, 2)


def forced_x0(net, clip, video, noisy, level, told=None, **changed):
    timesteps = torch.full((clip.batch, clip.frames), level.timestep)
    velocity = teacher_forced_velocity(
        net, video, noisy, timesteps, TextState(prompts(clip.batch)),
        teacher_forcing(clip.frames, clip.block, **{**clip.rule, **changed}),
        clean_timesteps=torch.full_like(timesteps, clip.context_timestep if told is None else told))
    return noisy - level.sigma * velocity


@by_name
def test_noisy_half_equals_every_rollout_step(net, clip):
    """With the generated video as the clean half, one parallel forward gives a step of all blocks of the rollout."""
    calls, video = rollout(net, clip)
    for step, level in enumerate(LEVELS):
        now = calls[step::len(LEVELS)]
        assert len(now) == len(clip.ends)
        noisy, made = (torch.cat(part, 2) for part in ([c.x for c in now], [c.out for c in now]))
        assert gap(forced_x0(net, clip, video, noisy, level), made) <= TOLERANCE


@pytest.mark.parametrize("clip", EVICTING, ids=lambda c: c.name)
def test_rollout_comparison_sees_a_missing_window(net, clip):
    """Negative control."""
    calls, video = rollout(net, clip)
    noisy, made = (torch.cat(part, 2) for part in ([c.x for c in calls[::2]], [c.out for c in calls[::2]]))
    assert gap(forced_x0(net, clip, video, noisy, LEVELS[0], window=None, sink=0), made) > 100 * TOLERANCE


def test_rollout_comparison_sees_the_clean_timestep_and_the_clean_half(net):
    """Negative controls; and without clean_timesteps the clean half is told 0."""
    clip = CLIPS[0]
    calls, video = rollout(net, clip)
    noisy, made = (torch.cat(part, 2) for part in ([c.x for c in calls[::2]], [c.out for c in calls[::2]]))
    assert gap(forced_x0(net, clip, video, noisy, LEVELS[0], told=60.0), made) > 100 * TOLERANCE
    assert gap(forced_x0(net, clip, noisy, noisy, LEVELS[0]), made) > 100 * TOLERANCE
    plain = teacher_forced_velocity(net, video, noisy, torch.full((1, 9), 1000.0), TextState(prompts()),
                                    teacher_forcing(9, 3))
    assert gap(noisy - plain, made) <= TOLERANCE


def test_noisy_blocks_do_not_see_each_other_or_their_own_clean_block(net):
    """Derivatives of block 1's velocity: by its own noisy frames and by clean block 0, by nothing else."""
    clean, noisy = (latents(6, SIZE, seed=s).requires_grad_() for s in (1, 2))
    out = teacher_forced_velocity(net, clean, noisy, torch.full((1, 6), 600.0), TextState(prompts()),
                                  teacher_forcing(6, 2))
    by_clean, by_noisy = torch.autograd.grad(out[:, :, 2:4].square().sum(), (clean, noisy))
    assert (by_clean.abs().amax((0, 1, 3, 4)) > 0).tolist() == [True, True, False, False, False, False]
    assert (by_noisy.abs().amax((0, 1, 3, 4)) > 0).tolist() == [False, False, True, True, False, False]


def test_gradient_reaches_every_parameter():
    net = network(3, CONFIG).requires_grad_(True)
    out = teacher_forced_velocity(net, latents(4, SIZE), latents(4, SIZE, seed=1), torch.full((1, 4), 600.0),
                                  TextState(prompts()), teacher_forcing(4, 2))
    out.square().mean().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []
