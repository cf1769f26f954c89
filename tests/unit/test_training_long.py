"""Streaming long tuning: its bookkeeping without a network, its rollout against inference, its gradient by hand."""
import pytest
import torch
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import Block, layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import Switch, block_rollout
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.training.long_tuning import (
    LongOptions,
    LongState,
    begin,
    extend,
    finished,
    live_generate,
    loss,
)
from forcing_pack.forcing_core.training.parallel import parallel_velocity
from forcing_pack.forcing_core.training.self_rollout import LiveDenoiser
from forcing_pack.forcing_core.wan import TextState, WanConfig
from forcing_pack.forcing_core.wan.random import random_network
from forcing_testkit.forcing_corekit import FakeDenoiser, Recorder

torch.set_num_threads(1)
CONFIG = WanConfig(dim=128, ffn_dim=128, heads=1, layers=2, in_channels=4, out_channels=4, text_dim=32, text_len=8)
THREE = levels((1000, 750, 500), 5.0)
SMALL = LongOptions(block=2, window=6, new_frames=(4,), max_frames=14, switch_at=(), replay=6)


def drawing(seed=0):
    return torch.Generator().manual_seed(seed)


def prompt(seed):
    return torch.randn(1, 8, 32, generator=drawing(seed))


def noise(seed=3):
    return BlockNoise(seed, (1, 4), (4, 4))


def denoiser(net, cache, frames, kind=LiveDenoiser):
    memory = make_memory(cache, frames, layers=2, grid=(2, 2), head_dim=128, device="cpu")
    return kind(net, [Condition([prompt(20), prompt(21)], memory)])


def counted(block):
    """Latents that say which frame they are, with a graph."""
    frames = torch.arange(block.first, block.end, dtype=torch.float32)
    return (frames.view(1, 1, -1, 1, 1) * torch.ones(1, requires_grad=True)).expand(1, 2, -1, 2, 2)


def frames_of(clip):
    return clip[0, 0, :, 0, 0].tolist()


def stream(options, seed=0, image_latent=None):
    """All extensions of one rollout without a network, and the passes made."""
    recorder, draw = Recorder(FakeDenoiser()), drawing(seed)
    state, steps = begin(recorder, options, draw), []
    while not finished(state, options):
        steps.append(extend(state, recorder, counted, options, draw, image_latent))
        state = steps[-1].state
    return steps, recorder


def test_a_rollout_grows_to_its_maximum():
    """21, then 18 or 21 at a time while they fit into 240; the clip is always the newest 21."""
    lengths = set()
    for seed in range(6):
        steps, _ = stream(LongOptions(), seed)
        made = [step.state.frames for step in steps]
        assert made[0] == 21 and {b - a for a, b in zip(made, made[1:])} == {18, 21}
        assert 240 - 18 < made[-1] <= 240
        lengths.add(made[-1])
        for before, step in zip([0, *made], steps):
            end = step.state.frames
            assert frames_of(step.clip) == list(range(end - 21, end))
            assert step.mask.tolist() == [frame >= before for frame in range(end - 21, end)]
    assert len(lengths) > 1


def test_the_last_piece_is_one_that_fits():
    """After 21 of 39 frames only 18 more fit, whatever is drawn; then nothing does."""
    options = LongOptions(max_frames=39)
    for seed in range(8):
        steps, recorder = stream(options, seed)
        assert [step.state.frames for step in steps] == [21, 39]
    with pytest.raises(ForcingError, match="Begin a new one"):
        extend(steps[-1].state, recorder, counted, options, drawing())


def test_passes_and_blocks_go_on_over_iterations():
    """One clean pass a block on what was made, nothing in between; block numbers never start again."""
    seen, recorder = [], Recorder(FakeDenoiser())
    state = begin(recorder, SMALL, drawing())
    for _ in range(2):
        state = extend(state, recorder, lambda block: seen.append(block) or counted(block), SMALL, drawing()).state
    assert seen == [Block(i, 2 * i, 2) for i in range(5)]
    assert [(c.phase, c.first, frames_of(c.x)) for c in recorder.calls] == [
        ("clean", 2 * i, [2 * i, 2 * i + 1]) for i in range(5)]
    assert all(c.timesteps == (0.0, 0.0) and not c.x.requires_grad for c in recorder.calls)
    # prompts are taken anew in every iteration, as the weights have changed
    assert [i for i, event in enumerate(recorder.events) if event[0] == "text"] == [1, 2, 6]


def test_gradients_reach_new_frames_only_and_the_state_has_none():
    state = begin(Recorder(FakeDenoiser()), SMALL, drawing())
    first = extend(state, FakeDenoiser(), counted, SMALL, drawing())
    assert first.clip.requires_grad and not first.state.latents.requires_grad
    assert frames_of(first.state.latents) == [0, 1, 2, 3, 4, 5]
    leaves = {}

    def generate(block):
        leaves[block.first] = torch.full((1, 2, 2, 2, 2), float(block.first), requires_grad=True)
        return leaves[block.first] * 1

    second = extend(first.state, FakeDenoiser(), generate, SMALL, drawing())
    assert second.mask.tolist() == [False] * 2 + [True] * 4
    gradient = torch.autograd.grad(second.clip.sum(), list(leaves.values()))
    assert [g.sum().item() for g in gradient] == [16.0, 16.0]
    assert not second.state.latents.requires_grad
    assert first.state.frames == 6 and frames_of(first.state.latents) == [0, 1, 2, 3, 4, 5]  # states are values


def test_the_prompt_changes_once_at_a_drawn_block():
    """Forget, new prompt, one recache of the newest frames, then the block; for ever after the second prompt."""
    options = LongOptions(block=2, window=6, new_frames=(4,), max_frames=22, switch_at=(8,), replay=4)
    steps, recorder = stream(options)
    assert recorder.events[recorder.events.index(("text", 1)) - 1:][:3] == [("forget",), ("text", 1), ("recache", 4, 4)]
    replayed, = [call for call in recorder.calls if call.phase == "recache"]
    assert frames_of(replayed.x) == [4, 5, 6, 7]
    order = [event[:2] for event in recorder.events if event[0] in ("clean", "recache")]
    assert order.index(("recache", 4)) == order.index(("clean", 6)) + 1
    assert [step.state.segment for step in steps] == [0, 1, 1, 1, 1]
    assert [event[1] for event in recorder.events if event[0] == "text"] == [0, 0, 0, 1, 1, 1, 1]
    kept = LongOptions(block=2, window=6, new_frames=(4,), max_frames=22, switch_at=(8,), replay=4, renew_sink=False)
    assert [event[0] for event in stream(kept)[1].events].count("forget") == 1  # at the beginning


def test_switches_are_drawn_from_the_published_frames():
    assert LongOptions().switch_at == (21, 39, 57, 75, 93, 111, 129, 147, 165, 183, 201)
    draw = drawing()
    drawn = {begin(FakeDenoiser(), LongOptions(), draw).switch for _ in range(300)}
    assert drawn == {Switch(at, 1, True) for at in range(21, 202, 18)}
    assert begin(FakeDenoiser(), LongOptions(max_frames=30), draw).switch.at == 21
    assert begin(FakeDenoiser(), LongOptions(switch_at=()), draw).switch is None


@pytest.mark.parametrize("new", [4, 6])
def test_the_first_frame_as_an_image(new):
    """Never at the start of a video; else made of the frames up to it, and left out of the gradient."""
    seen = []

    def image_latent(latents):
        seen.append(frames_of(latents))
        return -latents[:, :, -1:]

    options = LongOptions(block=2, window=6, new_frames=(new,), max_frames=6 + new, switch_at=(), replay=6)
    first, second = stream(options, image_latent=image_latent)[0]
    assert frames_of(first.clip) == [0, 1, 2, 3, 4, 5] and first.mask.all()
    assert seen == [list(range(new + 1))]
    assert frames_of(second.clip) == [-new, *range(new + 1, new + 6)]
    assert second.mask.tolist() == [False] + [frame >= 6 for frame in range(new + 1, new + 6)]


@pytest.mark.parametrize("renew", [True, False])
@torch.no_grad()
def test_pieces_make_the_video_of_one_rollout(renew):
    """Same weights, same noise, last step: the stream is the inference sampler, recache and window included."""
    net, cache = random_network(CONFIG, 0), WindowOptions(6, 2, 2)
    options = LongOptions(block=2, window=6, new_frames=(4,), max_frames=18, switch_at=(8,), replay=6, renew_sink=renew)
    plain = denoiser(net, cache, 18, NetworkDenoiser)
    whole = block_rollout(plain, layout(18, 2), THREE, noise(), switches=[Switch(8, 1, renew)], window=6)
    expected = torch.cat([x0 for _, x0 in whole], 2)
    live = denoiser(net, cache, 18)
    state = begin(live, options, drawing())
    while not finished(state, options):
        step = extend(state, live, live_generate(live, THREE, noise(), 2), options, drawing())
        state = step.state
        torch.testing.assert_close(step.clip, expected[:, :, state.frames - 6:state.frames], atol=1e-5, rtol=1e-5)
    assert state.frames == 18


def test_gradient_of_a_later_piece_written_out():
    """Block 3 at its second level over data: one dense pass over [clean past | block], the past's keys cut off."""
    net = random_network(CONFIG, 0).requires_grad_(True)
    options = LongOptions(block=2, window=6, new_frames=(2,), max_frames=8, switch_at=(), replay=6)
    live = denoiser(net, WindowOptions(block=2), 8)
    with torch.no_grad():
        first = extend(begin(live, options, drawing()), live, live_generate(live, THREE, noise(), 1), options, drawing())
    value, state = loss(first.state, live, live_generate(live, THREE, noise(), 1),
                        lambda x, mask: x[:, :, mask].square().mean(), options, drawing())
    value.backward()
    made = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()

    past, block, draws = first.clip, Block(3, 6, 2), noise()
    mask = torch.tensor([[key < frame // 2 * 2 + 2 for key in range(8)] for frame in range(8)])

    def velocity(x, sigma):
        told = torch.tensor([[0.0] * 6 + [1000 * sigma] * 2])
        return parallel_velocity(net, torch.cat([past, x], 2), told, TextState(prompt(20)), mask)[:, :, 6:]

    cut = []  # what the block reads of the past: [B, n, width] of keys and values of the first six frames
    for layer in net.blocks:
        for projection in (layer.self_attn.norm_k, layer.self_attn.v):
            cut.append(projection.register_forward_hook(
                lambda _, __, out: torch.cat([out[:, :24].detach(), out[:, 24:]], 1)))
    with torch.no_grad():
        x0 = draws.initial(block) - velocity(draws.initial(block), 1.0)
    s = 5 * 0.75 / 4
    x = (1 - s) * x0 + s * draws.renoise(block, 0)
    expected = (x - s * velocity(x, s)).square().mean()
    expected.backward()
    for hook in cut:
        hook.remove()
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(made[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)
    assert made["text_embedding.0.weight"].abs().max() > 0 and state.frames == 8


def test_loss_falls_over_a_whole_stream():
    """A pull towards a target in the new frames, step after step through rollouts with a change of prompt: the same
    stream makes a smaller loss afterwards, and memory and state stand any number of optimiser steps."""
    net = random_network(CONFIG, 0).requires_grad_(True)
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
    options = LongOptions(block=2, window=6, new_frames=(4,), max_frames=14, switch_at=(6,), replay=6)
    live, target = denoiser(net, WindowOptions(6, 2, 2), 14), 0.3 * torch.randn(1, 4, 1, 4, 4, generator=drawing(8))
    rounds = []
    for _ in range(8):
        draw, values = drawing(1), []
        state = begin(live, options, draw)
        while not finished(state, options):
            value, state = loss(state, live, live_generate(live, THREE, noise(), len(values)),
                                lambda x, mask: (x - target)[:, :, mask].square().mean(), options, draw)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            values.append(float(value.detach()))
        assert len(values) == 3
        rounds.append(sum(values))
    assert rounds[-1] < 0.4 * rounds[0], rounds


@pytest.mark.parametrize("settings", [{"window": 20}, {"new_frames": ()}, {"new_frames": (24,)}, {"new_frames": (17,)},
                                      {"replay": 24}, {"replay": 0}, {"max_frames": 18}])
def test_options_that_do_not_fit(settings):
    with pytest.raises(ForcingError, match="Use"):
        LongOptions(**settings)


def test_a_change_before_the_first_frame_is_refused():
    with pytest.raises(ForcingError, match="from its start"):
        extend(LongState(switch=Switch(0, 1)), FakeDenoiser(), counted, SMALL, drawing())
