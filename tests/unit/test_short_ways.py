"""What is made once instead of for every layer or pass, against the long way: a stretch of the store, embedded levels."""
import pytest
import torch
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.schedule import CLEAN, Level, levels
from forcing_pack.forcing_core.stretch import KEPT
from forcing_pack.forcing_core.wan import Ops, TextState, forward
from forcing_pack.forcing_core.wan import times as timing
from forcing_testkit.forcing_corekit import CHANNELS, CONFIG, HEAD_DIM, cached, gap, latents, network, prompts

pytestmark = pytest.mark.usefixtures("one_thread")
GRID, TOKENS, HEADS, LAYERS = (2, 3), 6, 2, 2
HIGH, LOW = Level(900.0, 0.9), Level(400.0, 0.4)


def memory(options, frames):
    return make_memory(options, frames, layers=LAYERS, grid=GRID, head_dim=HEAD_DIM, heads=HEADS, device="cpu")


def projections(first, frames, layer, batch, dtype):
    generator = torch.Generator().manual_seed(1000 * first + layer)
    return [torch.randn(batch, frames * TOKENS, HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(3)]


def passes(held, frames, block=3, batch=1, dtype=torch.float32):
    """(short, [what every layer got]) of each pass of a rollout with two noisy passes and a clean one a block."""
    for first in range(0, frames, block):
        for phase in ("noisy", "noisy", "clean"):
            now, got = held.begin(first, min(block, frames - first), phase), []
            for layer in range(LAYERS):
                q, k, v = projections(first, now.call.frames, layer, batch, dtype)
                if phase == "clean" and layer == LAYERS - 1:
                    now.exchange(layer, None, k, v)
                else:
                    got += [t.clone() for t in now.exchange(layer, q, k, v)]
            yield now._stretch is not None, got


@pytest.mark.parametrize("options, most", [
    (WindowOptions(), 1.0), (WindowOptions(6), 1.0), (WindowOptions(9, 3), 1.0),
    (WindowOptions(7, 1), 0.63),  # a block falls into slots with a gap between them
    (WindowOptions(9, 3, positions="relative"), 0.8),  # the first pass of a block turns the others' keys
    (WindowOptions(9, 3, positions="relative", compact=True), 0.0), (WindowOptions(9, jitter=0.5), 0.0)])
@pytest.mark.parametrize("batch, dtype", [(1, torch.float32), (2, torch.float32), (2, torch.bfloat16)])
def test_the_short_way_into_the_store_leads_to_the_same(options, most, batch, dtype):
    """Where gradients are on, every pass takes the long way."""
    sizes = {"batch": batch, "dtype": dtype}
    with torch.no_grad():
        short = [*passes(memory(options, 24), 24, **sizes)]
    with torch.enable_grad():
        long = [*passes(memory(options, 24), 24, **sizes)]
    share = sum(took for took, _ in short) / len(short)
    assert most - 0.25 < share <= most
    for (_, a), (_, b) in zip(short, long, strict=True):
        assert len(a) == len(b) and all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(a, b))
        assert max(gap(x.float(), y.float()) for x, y in zip(a, b)) <= (1e-6 if dtype == torch.float32 else 0.0)


@torch.no_grad()
def test_a_full_window_that_goes_round_needs_few_layouts():
    """Views that were made anew in every block would cost more than they save."""
    held = memory(WindowOptions(9), 60)
    all(passes(held, 60))
    assert len(held.store.stretches) <= 5
    growing = memory(WindowOptions(), 60)
    all(passes(growing, 60))
    assert len(growing.store.stretches) <= KEPT


@torch.no_grad()
def test_freed_buffers_are_not_written_to():
    held = memory(WindowOptions(6), 12)
    first = [got for _, got in passes(held, 12)]
    held.free()
    assert held.store.nbytes == 0 and not held.store.stretches
    again = [got for _, got in passes(held, 12)]
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))


def count(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_levels_are_embedded_once():
    """Four blocks of two levels and a clean one: three embeddings, and three more under another prompt."""
    net = network()
    calls, denoiser = count(net.time_embedding), cached(net, WindowOptions(6), 12)
    rollout = lambda: [x for _, x in block_rollout(denoiser, layout(12, 3), levels([1000, 500], 5.0),  # noqa: E731
                                                   BlockNoise(1, (1, CHANNELS), (4, 6)))]
    one = rollout()
    assert len(calls) == 3
    denoiser.forget()
    two = rollout()
    assert len(calls) == 3 and all(torch.equal(a, b) for a, b in zip(one, two))
    denoiser.replace_text(0)
    denoiser.forget()
    rollout()
    assert len(calls) == 6


@pytest.mark.parametrize("frames", [(HIGH,) * 3, (CLEAN,) * 3, (CLEAN, HIGH, LOW)])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_what_is_kept_of_levels_is_what_is_made_of_them(frames, batch):
    net, x, ops = network(), latents(3, batch=batch), Ops()
    text = TextState(prompts(batch))

    def velocity(timesteps):
        held = make_memory(WindowOptions(), 3, layers=CONFIG.layers, grid=GRID, head_dim=HEAD_DIM, device="cpu")
        return forward(net, x, timesteps, text, held.begin(0, 3, "noisy"), ops)

    kept = [velocity(text.times.steps(frames, x)) for _ in range(2)]
    assert torch.equal(*kept)
    assert gap(kept[0], velocity(text.times.steps(frames, x).clone())) <= 1e-6  # another tensor: nothing is known of it


def test_nothing_is_kept_where_gradients_are_wanted():
    known, x = timing.Times(), latents(3)
    steps = known.steps((HIGH,) * 3, x)
    with torch.no_grad():
        assert known.of(steps) is known.of(steps)
    with torch.enable_grad():
        assert known.of(steps) is not known.of(steps)


def test_few_sets_of_levels_are_kept():
    known, x = timing.Times(), latents(1)
    first = known.steps((Level(0.0, 0.0),), x)
    for i in range(1, timing.KEPT):
        known.steps((Level(float(i), 0.0),), x)
    assert known.steps((Level(0.0, 0.0),), x) is first  # used again: the newest now
    known.steps((Level(999.0, 0.0),), x)
    assert known.steps((Level(0.0, 0.0),), x) is first and len(known._known) == timing.KEPT
