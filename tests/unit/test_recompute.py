"""The recomputing rollout against blocks that are made one by one behind a context written anew."""
import pytest
import torch
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory, memory_bytes
from forcing_pack.forcing_core.options import cache_of
from forcing_pack.forcing_core.plan import Block, layout
from forcing_pack.forcing_core.plan_view import simulate
from forcing_pack.forcing_core.policies import RecomputeOptions, WindowOptions
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.rollout import Switch, block_rollout, calls, most_frames, recompute_rollout
from forcing_pack.forcing_core.rollout.state import RolloutState
from forcing_pack.forcing_core.rollout.transitions import replays
from forcing_pack.forcing_core.schedule import clean
from forcing_pack.forcing_core.standalone import preset_rollout
from forcing_testkit import forcing_corekit as core
from forcing_testkit.forcing_corekit import gap, rotated
from forcing_testkit.policykit import LEVELS, TOKENS, SampleNoise, attended, empty, network, softmax_attention

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES = 18


class Recorder:
    """A denoiser that answers with a number for every frame, and notes what it was asked."""

    def __init__(self):
        self.calls, self.notes = [], []

    def __call__(self, x, levels, first, phase):
        self.calls.append((first, x.shape[2], phase, levels[0].timestep, x[0, 0, :, 0, 0].tolist()))
        named = torch.arange(first, first + x.shape[2], dtype=torch.float32).view(1, 1, -1, 1, 1)
        return named.expand(x.shape).clone() if phase == "noisy" else None

    def forget(self):
        self.notes.append(("forget", len(self.calls)))

    def replace_text(self, segment):
        self.notes.append(("text", segment, len(self.calls)))

    def blend_text(self, a, b, weight):
        self.notes.append(("blend", a, b, weight, len(self.calls)))


def denoiser(options, frames, samples=(0,)):
    prompts = torch.cat([core.prompts(seed=sample) for sample in samples])
    return NetworkDenoiser(network(), [Condition([prompts], empty(options, frames))])


def video(options, frames=FRAMES, samples=(0,), noise=None, into=None):
    made = into or denoiser(options, frames, samples)
    parts = recompute_rollout(made, layout(frames, options.block), LEVELS, noise or SampleNoise(samples, frames),
                              block=options.block, window=options.window)
    return torch.cat([x0 for _, x0 in parts], dim=2)


@pytest.mark.parametrize("window", [6, 4, 10])
def test_every_block_stands_behind_a_context_of_its_own(window):
    """The same block by the plain rollout, from an empty memory behind the first frame and the newest ones."""
    made, noise = video(RecomputeOptions(window)), SampleNoise((0,), FRAMES)
    for block in layout(FRAMES, 3):
        count = min(block.first, window - 3)
        context = torch.cat([made[:, :, :1], made[:, :, block.first - count:block.first][:, :, 1:]], dim=2) if count else None
        here = SampleNoise((0,), FRAMES)
        here.draws = noise.draws[:, block.first - count:]
        plain = NetworkDenoiser(network(), [Condition([core.prompts(seed=0)], empty(WindowOptions(None, 0, 3), FRAMES))])
        (_, x0), = block_rollout(plain, [Block(0, count, 3)], LEVELS, here, context=context)
        assert gap(x0, made[:, :, block.first:block.end]) <= 1e-5


@pytest.mark.parametrize("settings", [
    {}, {"window": 5}, {"window": 12}, {"given": 1, "window": 9}, {"given": 7, "window": 6}, {"tail": 2},
    {"independent_first": True, "window": 8}])
def test_forwards(settings):
    """What is announced is what is made; every context is the first frame and the newest ones, at clean levels."""
    window, given = settings.get("window", 6), settings.get("given", 0)
    alone = settings.get("independent_first", False)
    blocks = layout(12 + settings.get("tail", 0) + alone, 3, given=given, independent_first=alone)
    told = calls("recompute", blocks, 2, given=given, independent_first=alone, window=window)
    denoise = Recorder()
    start = torch.arange(given, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(1, core.CHANNELS, -1, 4, 6)
    list(recompute_rollout(denoise, blocks, LEVELS, SampleNoise((0,), given + 16), context=start if given else None,
                           window=window, independent_first=alone, context_timestep=7.0))
    assert [(c.first, c.frames, c.phase) for c in told] == [call[:3] for call in denoise.calls]
    for block in blocks:
        at = [i for i, call in enumerate(denoise.calls) if call[:3] == (block.first, block.frames, "noisy")][0]
        begin = max(i for name, i in denoise.notes if i <= at)
        context = denoise.calls[begin:at]
        seen = sum((values for *_, values in context), [])
        count = min(block.first, window - block.frames)
        assert seen == [0.0, *range(block.first - count + 1, block.first)][:count]
        assert [f for first, frames, *_ in context for f in range(first, first + frames)] == list(
            range(block.first - count, block.first))
        assert all(call[2:4] == ("clean", 7.0) and call[1] <= 3 for call in context)
    assert len(denoise.notes) == len(blocks) and most_frames("recompute", 3, 4) == 3


def test_plans_stand_at_places():
    for row in simulate(RecomputeOptions(9), 40).rows:
        assert row.positions == tuple(range(len(row.read))) and row.query == row.positions[-row.block.frames:]
        assert row.read == tuple(range(max(0, row.block.end - 9), row.block.end)) or row.block.end == 40


def test_a_weight_is_a_biased_softmax_in_denoising_steps_only():
    held = make_memory(RecomputeOptions(7, 3, weight=0.3), 20, layers=1, grid=(2, 3), head_dim=128, device="cpu")
    draw, past = torch.Generator().manual_seed(4), []
    for first, frames, phase in ((8, 3, "clean"), (11, 1, "clean"), (12, 3, "noisy")):
        q, k, v = torch.randn(3, 1, frames * TOKENS, 2, 128, generator=draw)
        out = attended(held.begin(first, frames, phase), 0, q, k, v)
        past.append((k, v))
        keys, values = (torch.cat(t, dim=1) for t in zip(*past))
        count = keys.shape[1] // TOKENS
        bias = torch.zeros(count)
        if phase == "noisy":
            bias[1:4] = torch.tensor(0.3).log()
        turned = rotated(q, range(count - frames, count), (2, 3)), rotated(keys, range(count), (2, 3))
        assert gap(out, softmax_attention(*turned, values, bias.repeat_interleave(TOKENS)[None, :, None])) <= 1e-5
    assert gap(out, softmax_attention(*turned, values)) > 1e-3


def test_prompts_change_before_the_context_is_made():
    """No recache: the context is made under the new prompt anyway."""
    switches = [Switch(6, 1), Switch(9, 2, transition="keep"), Switch(12, 3, transition="soft", previous=2, weight=0.25)]
    denoise = Recorder()
    list(recompute_rollout(denoise, layout(15, 3), LEVELS, SampleNoise((0,), 15), window=6, switches=switches))
    # 2 forwards, then 3 a block: the context and two steps
    assert [note for note in denoise.notes if note[0] != "forget"] == [
        ("text", 1, 5), ("text", 2, 8), ("blend", 2, 3, 0.25, 11)]
    assert [note[-1] for note in denoise.notes if note[0] == "forget"] == [0, 2, 5, 8, 11]
    assert all(phase != "recache" for _, _, phase, *_ in denoise.calls)
    assert replays(switches, "recompute") == 0 and replays(switches) == 1


def test_a_rollout_goes_on_where_it_was_left():
    """Only the first frame, the newest ones and the newest block are needed; the memory is made anew."""
    options, state, parts = RecomputeOptions(5), RolloutState(), []
    settings = {"block": 3, "window": 5, "resume": state}
    run = recompute_rollout(denoiser(options, FRAMES), layout(FRAMES, 3), LEVELS, SampleNoise((0,), FRAMES), **settings)
    for _ in range(3):
        parts.append(next(run)[1])
    run.close()
    assert state.history.latents.shape[2] == 5 and state.first.shape[2] == 1
    parts += [x0 for _, x0 in recompute_rollout(denoiser(options, FRAMES), layout(FRAMES, 3), LEVELS,
                                                SampleNoise((0,), FRAMES), **settings)]
    assert torch.equal(torch.cat(parts, dim=2), video(options))


@pytest.mark.parametrize("kind", ["cut", "flush", "jump"])
def test_transitions_that_forget_are_refused(kind):
    with pytest.raises(ForcingError, match=f"recompute rollout cannot change prompts by {kind}.*recache, keep or soft"):
        list(recompute_rollout(Recorder(), layout(6, 3), LEVELS, None, window=6, switches=[Switch(3, 1, transition=kind)]))


def test_samples_future_runs_and_bytes():
    options = RecomputeOptions(6, 3, weight=0.5)
    both, alone = video(options, samples=(0, 1)), [video(options, samples=(s,)) for s in (0, 1)]
    assert gap(both, torch.cat(alone)) <= 1e-4 and gap(alone[0], video(RecomputeOptions())) > 1e-3
    other = SampleNoise((0,), FRAMES)
    other.draws[:, 12:] += 1.0
    used = denoiser(options, FRAMES)
    changed = video(options, noise=other, into=used)
    assert torch.equal(changed[:, :, :12], alone[0][:, :, :12]) and gap(changed[:, :, 12:], alone[0][:, :, 12:]) > 0.1
    assert torch.equal(video(options, into=used), alone[0])
    held, config = used.conditions[0].memory, network().config
    assert held.store.nbytes == memory_bytes(held.policy, layers=config.layers, frame_tokens=TOKENS, dim=config.dim,
                                             batch=1, element_size=4)


def test_the_preset_runs_its_own_window():
    preset = get("krea-realtime-14b")
    assert preset.available and cache_of(preset) == RecomputeOptions(6, 3, 1.0)
    denoise = Recorder()
    list(preset_rollout(preset, denoise, 12, _Steps()))
    assert [(first, frames) for first, frames, phase, *_ in denoise.calls if phase == "clean"] == [(0, 3), (3, 3), (6, 3)]
    assert {call[3] for call in denoise.calls if call[2] == "clean"} == {clean().timestep}


class _Steps:
    def initial(self, block):
        return torch.zeros(1, 16, block.frames, 4, 6)

    def renoise(self, block, step):
        return self.initial(block)


def test_what_makes_no_sense():
    with pytest.raises(ForcingError, match="needs a window"):
        list(recompute_rollout(Recorder(), layout(6, 3), LEVELS, None))
    for wrong, fix in (({"window": 3}, "at least 4"), ({"window": None}, "at least 4"), ({"weight": 0.0}, "above 0")):
        with pytest.raises(ForcingError, match=fix):
            RecomputeOptions(**wrong)
