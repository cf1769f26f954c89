"""Resampling Forcing: its degraded history and its loss against plain recomputations without a store."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.training.parallel import parallel_velocity
from forcing_pack.forcing_core.training.resampling import ResamplingOptions, draw_strength, loss, resample
from forcing_pack.forcing_core.wan import TextState, WanConfig
from forcing_pack.forcing_core.wan.random import random_network

torch.set_num_threads(1)
CONFIG = WanConfig(dim=128, ffn_dim=128, heads=1, layers=2, in_channels=4, out_channels=4, text_dim=32, text_len=8)


def drawing(seed=0):
    return torch.Generator().manual_seed(seed)


def clip(frames=4, batch=2, seed=1):
    return torch.randn(batch, 4, frames, 4, 4, generator=drawing(seed))


def prompt(batch=2):
    return torch.randn(batch, 8, 32, generator=drawing(2))


def levels_of(sigma):
    """[B, F] sigmas, shaped to meet latents."""
    return sigma[:, None, :, None, None]


def one_by_one(net, history, start, noise, block, steps, window=None, sink=0):
    """No store: every step of a block is a pass over [blocks made so far | this block] under a literal mask."""
    made, frames = history[:, :, :0], history.shape[2]
    for first in range(0, frames, block):
        end = min(first + block, frames)
        x = (1 - levels_of(start)) * history[:, :, first:end] + levels_of(start) * noise[:, :, first:end]
        rows = [(f, min((f // block + 1) * block, frames)) for f in range(end)]
        mask = torch.tensor([[j < e and (window is None or j < sink or j >= e - (window - sink)) for j in range(end)]
                             for _, e in rows])
        for step in range(steps):
            sigma = start * (steps - step) / steps
            timesteps = torch.cat([torch.zeros(len(x), first), 1000 * sigma.expand(-1, end - first)], 1)
            v = parallel_velocity(net, torch.cat([made, x], 2), timesteps, TextState(prompt()), mask)[:, :, first:]
            x = x - levels_of(start) / steps * v
        made = torch.cat([made, x], 2)
    return made


@pytest.mark.parametrize("block, frames, window, sink", [(1, 4, None, 0), (2, 4, None, 0), (1, 5, 3, 1)])
@torch.no_grad()
def test_autoregressive_resampling_is_a_rollout_from_noised_history(block, frames, window, sink):
    net, history = random_network(CONFIG, 0), clip(frames)
    options = ResamplingOptions(block=block, steps=3, window=window, sink=sink)
    draw = drawing(7)
    start = draw_strength(2, 0.6, draw)[:, None]
    noise = torch.randn(history.shape, generator=draw)
    expected = one_by_one(net, history, start, noise, block, 3, window, sink)
    made = resample(net, history, TextState(prompt()), options, drawing(7))
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=1e-5)
    assert (made - history).abs().max() > 0.1


@torch.no_grad()
def test_parallel_resampling_stands_on_the_true_history():
    """Each block by itself, its past being true frames."""
    net, history, draw = random_network(CONFIG, 0), clip(4), drawing(7)
    start = draw_strength(2, 0.6, draw)[:, None]
    noise = torch.randn(history.shape, generator=draw)
    expected = []
    for first in (0, 2):
        x = (1 - levels_of(start)) * history + levels_of(start) * noise
        x = x[:, :, first:first + 2]
        mask = torch.ones(first + 2, first + 2).tril().bool()
        mask[0, 1] = mask[first, first + 1] = True  # blocks of two
        for sigma in (start, start / 2):
            timesteps = torch.cat([torch.zeros(2, first), 1000 * sigma.expand(-1, 2)], 1)
            both = torch.cat([history[:, :, :first], x], 2)
            v = parallel_velocity(net, both, timesteps, TextState(prompt()), mask)[:, :, first:]
            x = x - levels_of(start) / 2 * v
        expected.append(x)
    options = ResamplingOptions(mode="parallel", block=2, steps=2)
    made = resample(net, history, TextState(prompt()), options, drawing(7))
    torch.testing.assert_close(made, torch.cat(expected, 2), atol=2e-5, rtol=1e-5)
    other = resample(net, history, TextState(prompt()), ResamplingOptions(block=2, steps=2), drawing(7))
    torch.testing.assert_close(made[:, :, :2], other[:, :, :2], atol=2e-5, rtol=1e-5)  # no history yet
    assert (made - other)[:, :, 2:].abs().max() > 1e-3


def test_strength_is_a_shifted_logit_normal():
    """Quantiles of logit-normal(0, 1) at 0.6: sigmoid(-1, 0, 1) = .2689, .5, .7311 through the shift."""
    drawn = draw_strength(200_000, 0.6, drawing())
    expected = [0.6 * t / (1 - 0.4 * t) for t in (0.268941, 0.5, 0.731059)]
    assert drawn.quantile(torch.tensor([0.158655, 0.5, 0.841345])).tolist() == pytest.approx(expected, abs=4e-3)
    assert 0 < drawn.min() and drawn.max() < 1


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_written_out(weighted):
    """History of the first three frames from `resample`, then one pass over [past | frame] for every frame."""
    net, clean, options = random_network(CONFIG, 0), clip(4), ResamplingOptions(steps=2)
    weights = torch.rand(2, 1, 4, 4, 4, generator=drawing(3)) if weighted else None
    draw = drawing(11)
    past = resample(net, clean[:, :, :3], TextState(prompt()), options, draw)
    u = 1 - (1000 * torch.rand(2, 4, generator=draw, dtype=torch.float64)).floor() / 1000  # a level for every frame
    sigmas, noise = (5 * u / (1 + 4 * u)).float(), torch.randn(clean.shape, generator=draw)
    noisy, total, count = (1 - levels_of(sigmas)) * clean + levels_of(sigmas) * noise, 0.0, 0.0
    for frame in range(4):
        both = torch.cat([past[:, :, :frame], noisy[:, :, frame:frame + 1]], 2)
        timesteps = torch.cat([torch.zeros(2, frame), 1000 * sigmas[:, frame:frame + 1]], 1)
        mask = torch.ones(frame + 1, frame + 1).tril().bool()
        v = parallel_velocity(net, both, timesteps, TextState(prompt()), mask)[:, :, frame]
        weight = weights[:, :, frame] if weighted else torch.ones(2, 1, 4, 4)
        total += (((v - noise[:, :, frame] + clean[:, :, frame]) ** 2) * weight).sum()
        count += weight.sum() * clean.shape[1]
    made = loss(net, clean, TextState(prompt()), options, drawing(11), cells=weights)
    torch.testing.assert_close(made, total / count, atol=1e-5, rtol=1e-5)


def test_the_resampled_history_has_no_gradient_and_the_text_keeps_its_own():
    """The student's own passes must not leave text keys without gradient behind."""
    net = random_network(CONFIG, 0).requires_grad_(True)
    text = TextState(prompt())
    assert not resample(net, clip(), text, ResamplingOptions(), drawing()).requires_grad
    parallel_velocity(net, clip(), torch.zeros(2, 4), text, torch.ones(4, 4).bool()).sum().backward()
    assert net.text_embedding[0].weight.grad.abs().max() > 0
    net.zero_grad()
    loss(net, clip(), text, ResamplingOptions(), drawing()).backward()
    assert net.text_embedding[0].weight.grad.abs().max() > 0
    assert net.blocks[0].cross_attn.k.weight.grad.abs().max() > 0
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("mode", ["autoregressive", "parallel"])
def test_loss_falls(mode):
    net, clean = random_network(CONFIG, 0).requires_grad_(True), clip(4)
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
    options, values = ResamplingOptions(mode=mode, steps=2, block=2), []
    for _ in range(25):
        value = loss(net, clean, TextState(prompt()), options, drawing(5))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.5 * values[0], values


@pytest.mark.parametrize("call", [lambda: ResamplingOptions(mode="both"), lambda: ResamplingOptions(steps=0),
                                  lambda: ResamplingOptions(strength=0.0),
                                  lambda: loss(random_network(CONFIG, 0), clip(3), TextState(prompt()),
                                               ResamplingOptions(block=3), drawing())])
def test_what_cannot_be_resampled(call):
    with pytest.raises(ForcingError, match="Use"):
        call()
