"""Rolling Forcing: masks and losses window by window, and its rollout against inference and against the paper."""
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.rollout.windows import of_phase, single_windows, windows
from forcing_pack.forcing_core.training.parallel import parallel_velocity
from forcing_pack.forcing_core.training.rolling import (
    Draw,
    RollingOptions,
    draw_windows,
    loss,
    predict,
    rolling_mask,
    rollout,
)
from forcing_pack.forcing_core.wan import TextState, WanConfig
from forcing_pack.forcing_core.wan.random import random_network

torch.set_num_threads(1)
CONFIG = WanConfig(dim=128, ffn_dim=128, heads=1, layers=2, in_channels=4, out_channels=4, text_dim=32, text_len=8)
THREE = RollingOptions(block=2, window=None, sink=0, steps=(1000, 700, 400))
# of THREE, by hand: sigma = 5u / (1 + 4u)
SIGMAS = (1.0, 3.5 / 3.8, 2.0 / 2.6)


def drawing(seed=0):
    return torch.Generator().manual_seed(seed)


def clip(frames, batch=2, seed=1):
    return torch.randn(batch, 4, frames, 4, 4, generator=drawing(seed))


def text(batch=2):
    return TextState(torch.randn(batch, 8, 32, generator=drawing(2)))


def drawn(make, blocks, phase, steps=3):
    return Draw(make(blocks, steps), of_phase(make(blocks, steps), steps, phase))


def window_pass(net, past, noisy, sigmas, first, limit=None, sink=0):
    """Velocity of one window: [its past | the window], one row of the mask after the other. Blocks of two."""
    end = first + noisy.shape[2]

    def sees(frame, key):
        reach = end if frame >= first else frame // 2 * 2 + 2
        return key < reach and (limit is None or key < sink or key >= reach - (limit - sink))

    mask = torch.tensor([[sees(frame, key) for key in range(end)] for frame in range(end)])
    told = torch.tensor([0.0] * first + [1000 * s for s in sigmas]).expand(noisy.shape[0], -1)
    return parallel_velocity(net, torch.cat([past, noisy], 2), told, text(), mask)[:, :, first:]


def test_mask_of_warm_up_steady_and_cool_down():
    """Blocks of one in three steps, phase 1: windows (0, 1), (2, 3, 4) and (5), drawn by hand."""
    options = RollingOptions(block=1, window=None, sink=0, steps=THREE.steps)
    mask = rolling_mask(6, of_phase(windows(6, 3), 3, 1), options)
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1]]


def test_published_reads():
    """Frames that joint passes read behind the sink, from the trace of the public code (window 21, sink 3)."""
    mask = rolling_mask(42, of_phase(windows(14, 5), 5, 4), RollingOptions())
    reads = {first: mask[42 + first, :42].nonzero().flatten().tolist() for first in (0, 15, 30)}
    assert reads == {0: [], 15: [0, 1, 2, 12, 13, 14], 30: [0, 1, 2, *range(24, 30)]}


@pytest.mark.parametrize("make, phase, limit, sink", [(windows, 0, None, 0), (windows, 2, None, 0),
                                                      (windows, 1, 8, 2), (single_windows, 1, None, 0)])
@torch.no_grad()
def test_one_forward_is_one_forward_a_window(make, phase, limit, sink):
    """Eight blocks of two: the velocities of all chosen windows, each computed by itself over its true past."""
    net, clean, chosen = random_network(CONFIG, 0), clip(16), of_phase(make(8, 3), 3, phase)
    joint = predict(net, clean, text(), replace(THREE, window=limit, sink=sink), chosen, drawing(5))
    expected, x0 = torch.zeros_like(clean), torch.zeros_like(clean)
    for first, levels in {(windows, 0): [(0, [0]), (2, [2, 1, 0]), (8, [2, 1, 0]), (14, [2])],
                          (windows, 2): [(0, [2, 1, 0]), (6, [2, 1, 0]), (12, [2, 1])],
                          (windows, 1): [(0, [1, 0]), (4, [2, 1, 0]), (10, [2, 1, 0])],
                          (single_windows, 1): [(first, [1]) for first in range(0, 16, 2)]}[make, phase]:
        here = slice(first, first + 2 * len(levels))
        sigmas = [SIGMAS[level] for level in levels for _ in range(2)]
        sigma = torch.tensor(sigmas).view(1, 1, -1, 1, 1)
        noisy = (1 - sigma) * clean[:, :, here] + sigma * joint.noise[:, :, here]
        expected[:, :, here] = window_pass(net, clean[:, :, :first], noisy, sigmas, first, limit, sink)
        x0[:, :, here] = noisy - sigma * expected[:, :, here]
    torch.testing.assert_close(joint.velocity, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(joint.x0, x0, atol=2e-5, rtol=1e-5)


def test_loss_is_the_weighted_error_of_the_velocity():
    net, clean, cells = random_network(CONFIG, 0), clip(6), torch.rand(2, 1, 6, 4, 4, generator=drawing(3))
    draw = drawing(5)
    joint = predict(net, clean, text(), THREE, draw_windows(3, THREE, draw).chosen, draw)
    error = (joint.velocity - joint.noise + clean) ** 2
    torch.testing.assert_close(loss(net, clean, text(), THREE, drawing(5)), error.mean())
    weighted = sum((error[:, c] * cells[:, 0]).sum() for c in range(4)) / (4 * cells.sum())
    torch.testing.assert_close(loss(net, clean, text(), THREE, drawing(5), cells=cells), weighted)


def test_another_context_is_seen_by_later_windows_only():
    net, clean, chosen = random_network(CONFIG, 0), clip(12), of_phase(windows(6, 3), 3, 1)
    own, other = (predict(net, clean, text(), THREE, chosen, drawing(5), context) for context in (None, clip(12, seed=9)))
    torch.testing.assert_close(own.velocity[:, :, :4], other.velocity[:, :, :4])
    assert (own.velocity - other.velocity)[:, :, 4:].abs().amax((0, 1, 3, 4)).min() > 1e-3


def test_draws_mix_the_schedules_and_meet_every_phase():
    draw, seen = drawing(), []
    for _ in range(400):
        made = draw_windows(4, RollingOptions(), draw)
        seen.append((len(made.schedule) == 4 * 5, made.chosen[0].index % 5))
    assert set(seen) == {(single, phase) for single in (True, False) for phase in range(5)}
    assert 150 < sum(single for single, _ in seen) < 250
    for share, single in ((0.0, False), (1.0, True)):
        options = replace(RollingOptions(), single_share=share)
        assert all((len(draw_windows(4, options, draw).schedule) == 20) == single for _ in range(50))


class Replay:
    """Noise of the block rollout from the draws that `rollout` makes: the clip's, then one a step that goes on."""

    def __init__(self, noise, generator):
        self.noise, self.generator = noise, generator

    def initial(self, block):
        return self.noise[:, :, block.first:block.end]

    def renoise(self, block, step):
        return torch.randn(self.noise[:, :, block.first:block.end].shape, generator=self.generator)


@torch.no_grad()
def test_the_single_schedule_is_the_block_rollout_of_inference():
    """With the last step chosen, the clip is what the cached sampler makes."""
    net, noise, options = random_network(CONFIG, 0), clip(10), replace(THREE, window=8, sink=2)
    memory = make_memory(WindowOptions(8, 2, 2), 10, layers=2, grid=(2, 2), head_dim=128, device="cpu")
    denoiser = NetworkDenoiser(net, [Condition([text().context], memory)])
    made = block_rollout(denoiser, layout(10, 2), options.levels, Replay(noise, drawing(4)))
    expected = torch.cat([x0 for _, x0 in made], 2)
    clip_ = rollout(net, noise, text(), options, drawing(4), drawn(single_windows, 5, 2))
    torch.testing.assert_close(clip_, expected, atol=5e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("phase", [0, 2])
def test_the_rolling_rollout_written_out(phase):
    """Four blocks, three steps, every window with its literal levels; a block is final after level 2."""
    net, noise, draw = random_network(CONFIG, 0), clip(8), drawing(4)
    current, past, expected = noise.clone(), torch.zeros_like(noise), torch.zeros_like(noise)
    for window, (first, levels) in enumerate([(0, [0]), (0, [1, 0]), (0, [2, 1, 0]), (2, [2, 1, 0]), (4, [2, 1]),
                                              (6, [2])]):
        end, sigmas = first + 2 * len(levels), [SIGMAS[level] for level in levels for _ in range(2)]
        noisy = current[:, :, first:end].clone()
        velocity = window_pass(net, past[:, :, :first], noisy, sigmas, first)
        x0 = noisy - torch.tensor(sigmas).view(1, 1, -1, 1, 1) * velocity
        if window % 3 == phase:
            expected[:, :, first:end] = x0
        for at, level in zip(range(first, end, 2), levels):
            made = x0[:, :, at - first:at - first + 2]
            if level == 2:
                past[:, :, at:at + 2] = made
            else:
                s = SIGMAS[level + 1]
                current[:, :, at:at + 2] = (1 - s) * made + s * torch.randn(made.shape, generator=draw)
    made = rollout(net, noise, text(), THREE, drawing(4), drawn(windows, 4, phase))
    torch.testing.assert_close(made, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("phase", [0, 2])
def test_only_the_newest_frames_of_a_rollout_have_gradients(phase):
    """In phase 0 the last window also holds older blocks, which give none; in phase 2 the last block is alone."""
    net = random_network(CONFIG, 0).requires_grad_(True)
    made = rollout(net, clip(8), text(), replace(THREE, grad_frames=2), drawing(), drawn(windows, 4, phase))
    old, = torch.autograd.grad(made[:, :, :6].sum(), net.head.head.weight, retain_graph=True, allow_unused=True)
    new, = torch.autograd.grad(made[:, :, 6:].sum(), net.head.head.weight)
    assert old is None or old.abs().max() == 0
    assert new.abs().max() > 0


def test_gradient_of_a_window_written_out():
    """One window of two blocks over nothing: its x0 has the gradient of a single forward, text included."""
    net, noise = random_network(CONFIG, 0).requires_grad_(True), clip(4)
    options = replace(THREE, steps=(1000, 400))
    rollout(net, noise, text(), options, drawing(4), drawn(windows, 2, 1, 2)).square().mean().backward()
    made = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    draw = drawing(4)
    with torch.no_grad():
        x0 = noise[:, :, :2] - window_pass(net, noise[:, :, :0], noise[:, :, :2], (1.0, 1.0), 0)
    s = SIGMAS[2]
    first = (1 - s) * x0 + s * torch.randn(x0.shape, generator=draw)
    noisy, sigmas = torch.cat([first, noise[:, :, 2:]], 2), (s, s, 1.0, 1.0)
    velocity = window_pass(net, noise[:, :, :0], noisy, sigmas, 0)
    (noisy - torch.tensor(sigmas).view(1, 1, -1, 1, 1) * velocity).square().mean().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(made[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
    assert made["text_embedding.0.weight"].abs().max() > 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_loss_falls(share):
    net, clean, options = random_network(CONFIG, 0).requires_grad_(True), clip(8), replace(THREE, single_share=share)
    optimiser, values = torch.optim.AdamW(net.parameters(), lr=2e-3), []
    for _ in range(30):
        value = loss(net, clean, text(), options, drawing(6))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.4 * values[0], values


def test_a_loss_on_the_rollout_falls():
    """The differentiable clip moves towards a target: what DMD needs of it."""
    net, noise, target = random_network(CONFIG, 0).requires_grad_(True), clip(8), 0.3 * clip(8, seed=8)
    optimiser, values = torch.optim.AdamW(net.parameters(), lr=2e-3), []
    for _ in range(20):
        value = (rollout(net, noise, text(), THREE, drawing(6), drawn(windows, 4, 1)) - target).square().mean()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.5 * values[0], values


def test_a_window_too_small_for_all_blocks_is_refused():
    with pytest.raises(ForcingError, match="at least 18 frames"):
        RollingOptions(window=15)
