"""Recency Forcing's bias against its formula, a biased softmax and a plain window."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory, memory_bytes
from forcing_pack.forcing_core.options import cache_of, levels_of
from forcing_pack.forcing_core.plan import Call
from forcing_pack.forcing_core.policies import RecencyOptions, WindowOptions, build
from forcing_pack.forcing_core.policies.recency import step_of
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.schedule import levels
from forcing_testkit.forcing_corekit import gap, rotated
from forcing_testkit.policykit import LEVELS, TOKENS, SampleNoise, attended, empty, network, softmax_attention, video

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = RecencyOptions(window=12, sink=1, recent=3, block=3, beta=3.0)  # 1 + 5 + 3 + 3
FRAMES = 21


def test_steps_of_the_published_list():
    sigmas = [level.sigma for level in levels_of(get("recency-forcing"))]
    assert [step_of(sigma) for sigma in sigmas] == pytest.approx([1, 2, 3, 4], abs=1e-5)
    assert step_of(0.0) == 4
    assert [step_of(level.sigma) for level in levels([1000, 500], 5.0)] == pytest.approx([1, 3], abs=1e-5)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_the_bias_is_the_formula(step):
    """3 sink + 12 history + 3 recent + 3 current frames; distances are those of whole blocks."""
    sigma = levels_of(get("recency-forcing"))[step - 1].sigma
    policy = build(RecencyOptions(), 60)
    call = Call(30, 3, "noisy", (0, 1, 2, *range(12, 30)), sigma)
    plan = policy.plan(call)
    assert plan.read == (0, 1, 2, *range(15, 33))
    wanted = {}
    for blocks, chunk in ((2, range(24, 27)), (3, range(21, 24)), (4, range(18, 21)), (5, range(15, 18))):
        wanted.update(dict.fromkeys(chunk, -12 * ((blocks - 1) / 4) ** (0.1 * 2 ** step)))
    assert policy.biases(plan, call) == pytest.approx(wanted, rel=1e-4)


def test_single_frames_and_short_histories():
    """With blocks of one frame each frame has a distance of its own; nothing is biased before there is history."""
    policy = build(RecencyOptions(window=9, sink=1, recent=2, block=1, beta=1.0, gamma=0.5), 20)
    call = Call(9, 1, "noisy", (0, 2, 3, 4, 5, 6, 7, 8), 1.0)
    assert policy.biases(policy.plan(call), call) == pytest.approx({f: -(9 - f - 2) / 5 for f in range(2, 7)})
    early = Call(3, 1, "noisy", (0, 1, 2), 1.0)
    assert policy.biases(policy.plan(early), early) == {}


def test_a_pass_is_a_biased_softmax():
    """Biases laid out in temporal order would hit other frames, as slots are used again."""
    held = make_memory(SMALL, FRAMES, layers=1, grid=(2, 3), head_dim=128, device="cpu")
    draw, past = torch.Generator().manual_seed(2), {}
    for first in range(0, FRAMES, 3):
        q, k, v = torch.randn(3, 1, 3 * TOKENS, 2, 128, generator=draw)
        now = held.begin(first, 3, "noisy", 0.9)
        out = attended(now, 0, q, k, v)
        past.update(zip(range(first, first + 3), zip(k.split(TOKENS, 1), v.split(TOKENS, 1))))
        frames, biases = now.plan.read, held.policy.biases(now.plan, now.call)
        keys, values = (torch.cat([past[f][i] for f in frames], dim=1) for i in range(2))
        bias = torch.tensor([biases.get(f, 0.0) for f in frames]).repeat_interleave(TOKENS)[None, :, None]
        turned = rotated(q, now.plan.query, (2, 3)), rotated(keys, now.plan.positions, (2, 3))
        assert gap(out, softmax_attention(*turned, values, bias)) <= 1e-5
    assert now.order != now.plan.read and len(biases) == 5 and max(frames) < first + 3
    assert gap(out, softmax_attention(*turned, values)) > 1e-3


def test_the_denoiser_says_how_noisy_a_call_is():
    held, seen = empty(SMALL, 9), []
    begin = held.begin

    def noted(*call):
        made = begin(*call)
        seen.append((made.call.phase, made.call.sigma))
        return made

    held.begin = noted
    video(SMALL, 9, into=held)
    block = [("noisy", level.sigma) for level in LEVELS]
    assert seen == (block + [("clean", 0.0)]) * 2 + block


def test_without_bias_it_is_a_plain_window():
    plain = video(WindowOptions(12, 1, 3, "relative"), FRAMES)
    assert gap(video(RecencyOptions(12, 1, 3, 3, beta=0.0), FRAMES), plain) <= 1e-5
    biased = video(SMALL, FRAMES)
    assert gap(biased[:, :, :6], plain[:, :, :6]) <= 1e-6 and gap(biased[:, :, 6:], plain[:, :, 6:]) > 1e-3


def test_samples_future_and_runs():
    """A batch is its samples, later noise changes nothing before it, and an emptied memory gives the same again."""
    both, alone = video(SMALL, FRAMES, samples=(0, 1)), [video(SMALL, FRAMES, samples=(s,)) for s in (0, 1)]
    assert gap(both, torch.cat(alone)) <= 1e-4
    other, held = SampleNoise((0,), FRAMES), empty(SMALL, FRAMES)
    other.draws[:, 15:] += 1.0
    changed = video(SMALL, FRAMES, noise=other, into=held)
    assert torch.equal(changed[:, :, :15], alone[0][:, :, :15]) and gap(changed[:, :, 15:], alone[0][:, :, 15:]) > 0.1
    held.forget()
    assert torch.equal(video(SMALL, FRAMES, into=held), alone[0])
    config = network().config
    assert held.store.nbytes == memory_bytes(held.policy, layers=config.layers, frame_tokens=TOKENS, dim=config.dim,
                                             batch=1, element_size=4)


def test_the_preset_and_what_makes_no_sense():
    assert cache_of(get("recency-forcing")) == RecencyOptions() and RecencyOptions().history == 12
    assert build(SMALL, FRAMES).flushed((0, 4, 5, 6), 2) == (0, 5, 6)
    for wrong in ({"window": 9}, {"recent": -1}, {"window": None}, {"beta": -1.0}, {"gamma": -0.1}):
        with pytest.raises(ForcingError, match="Use a window|Set window|at least 0"):
            RecencyOptions(**wrong)
