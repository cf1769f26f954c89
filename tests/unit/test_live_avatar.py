"""Live Avatar: its LoRA's names, its row, its levels and its memory of one window a step."""
import importlib
from pathlib import Path

import pytest
import torch
from forcing_pack.forcing_core.checkpoints.live_avatar import live_avatar_lora, targets
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.options import cache_of, from_preset, levels_of, sigmas_of
from forcing_pack.forcing_core.plan import Call, layout
from forcing_pack.forcing_core.plan_view import simulate
from forcing_pack.forcing_core.policies import PerStepOptions, WindowOptions
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.rollout import ROLLOUTS, calls
from forcing_pack.forcing_core.saved import Saved, copied, split
from forcing_pack.forcing_core.schedule import Level
from forcing_pack.forcing_core.solvers import euler, euler_levels
from forcing_testkit import forcing_corekit as core
from forcing_testkit.forcing_corekit import gap
from forcing_testkit.policykit import GRID, LEVELS, SampleNoise, network
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, FFN, LAYERS, INJECTORS = 32, 48, 2, 3


# -- the LoRA --------------------------------------------------------------------------------------------------

def weights():
    """Names and shapes of the linear layers of an S2V network, and of others that PEFT leaves alone."""
    def linear(name, rows, columns):
        return {f"{name}.weight": torch.zeros(rows, columns), f"{name}.bias": torch.zeros(rows)}

    made = {"head.modulation": torch.zeros(1, 2, DIM), **linear("text_embedding.0", DIM, DIM), **linear("head.head", 64, DIM),
            **linear("casual_audio_encoder.encoder.final_linear", DIM, DIM)}
    for i in range(LAYERS):
        for attention in ("self_attn", "cross_attn"):
            for x in "qkvo":
                made |= linear(f"blocks.{i}.{attention}.{x}", DIM, DIM)
            made[f"blocks.{i}.{attention}.norm_q.weight"] = torch.zeros(DIM)
        made |= {**linear(f"blocks.{i}.ffn.0", FFN, DIM), **linear(f"blocks.{i}.ffn.2", DIM, FFN)}
    for i in range(INJECTORS):
        for x in "qkvo":
            made |= linear(f"audio_injector.injector.{i}.{x}", DIM, DIM)
        made |= linear(f"audio_injector.injector_adain_layers.{i}.linear", 2 * DIM, DIM)
    return made


def published(path, state, prefix="", rank=4, leave=()):
    """A file as PEFT writes it, of all modules but `leave`."""
    factors = {}
    for name in sorted(targets(state) - {*leave}):
        rows, columns = state[f"{name}.weight"].shape
        factors[f"{prefix}{name}.lora_A.default.weight"] = torch.randn(rank, columns)
        factors[f"{prefix}{name}.lora_B.default.weight"] = torch.randn(rows, rank)
    save_file(factors, path)
    return path


def test_the_modules_are_those_that_peft_finds_by_the_published_targets():
    state = weights()
    by_suffix = {name.removesuffix(".weight") for name in state if name.endswith(".weight")}
    by_suffix = {m for m in by_suffix if any(m == t or m.endswith(f".{t}") for t in ("q", "k", "v", "o", "ffn.0", "ffn.2"))}
    assert targets(state) == by_suffix and len(by_suffix) == LAYERS * 10 + INJECTORS * 4


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_no_key_is_missing_and_none_left_over(tmp_path, prefix):
    state = weights()
    lora = live_avatar_lora(published(tmp_path / "liveavatar.safetensors", state, prefix), state)
    assert {*lora.pairs} == targets(state)
    assert {pair.scale for pair in lora.pairs.values()} == {64 / 4}  # alpha over the rank; 0.5 at the published rank of 128


@pytest.mark.parametrize(("change", "match"), [
    (lambda s: ({n: t for n, t in s.items() if "injector" not in n}, s), "this model is another one. Load wan2.2_s2v"),
    (lambda s: ({n: t for n, t in s.items() if ".1.ffn" not in n}, s), "does not fit this model: 2 of its"),
])
def test_another_network_is_refused(tmp_path, change, match):
    model, trained = change(weights())
    with pytest.raises(ForcingError, match=match):
        live_avatar_lora(published(tmp_path / "lora.safetensors", trained), model)


def test_an_incomplete_file_is_refused(tmp_path):
    state = weights()
    with pytest.raises(ForcingError, match="nothing for 1 of 32 layers .blocks.0.ffn.0.*liveavatar.safetensors"):
        live_avatar_lora(published(tmp_path / "lora.safetensors", state, leave=["blocks.0.ffn.0"]), state)


# -- the row ---------------------------------------------------------------------------------------------------

def test_the_row_is_as_published():
    row, options = get("live-avatar"), from_preset(get("live-avatar"))
    assert (row.block, row.solver, row.step_count, row.shift, row.lora.path) == (3, "euler", 4, 3.0, "liveavatar.safetensors")
    assert options.cache == PerStepOptions(12, 0, 3, "rebased", 45000, steps=4, nearest=1, farthest=27) == cache_of(row)
    assert options.rollout == "per_step" and options.solver == "euler" and not options.guided
    assert simulate(options.cache, 30).rows[-1].read == tuple(range(18, 30))


def test_levels_are_those_of_the_scheduler():
    """1, 0.667665, 0.335329 and 0.002994 are evenly spaced; each is shifted by 3 once more."""
    expected = [3 * u / (1 + 2 * u) for u in (1.0, 0.6676647, 0.3353293, 0.002994012)]
    assert sigmas_of(get("live-avatar"))[:-1] == pytest.approx(expected, abs=1e-6)
    assert [level.timestep for level in levels_of(get("live-avatar"))] == pytest.approx([1000 * s for s in expected], abs=1e-3)
    assert euler_levels(1, 3.0) == (Level(1000.0, 1.0),)


def test_euler_follows_the_velocity():
    """dx = (next - now) * v, with v from the prediction; by hand."""
    x, levels = torch.tensor([2.0]), (Level(1000, 1.0), Level(500, 0.5), Level(100, 0.1))
    by_hand, sigmas = x.clone(), [1.0, 0.5, 0.1, 0.0]
    for now, to in zip(sigmas, sigmas[1:]):
        by_hand = by_hand + (to - now) * (by_hand - 0.3 * by_hand) / now
    assert torch.allclose(euler(x, levels, lambda y, level: 0.3 * y, None), by_hand)


def test_the_workflow_connects_picture_voice_and_model(monkeypatch):
    """Links by type of node: every block gets the voice, the picture twice, and the latent that fits both."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "tools"))
    graph = importlib.import_module("examples").EXAMPLES["portrait_s2v"]().as_dict()
    kinds = {node["id"]: node["type"] for node in graph["nodes"]}
    links = {(kinds[target], entry): (kinds[source], output) for source, output, target, entry in graph["links"]}
    made = {name: links["WanSoundImageToVideo", name] for name in ("ref_image", "ref_motion", "audio_encoder_output")}
    assert made == {"ref_image": ("LoadImage", 0), "ref_motion": ("RepeatImageBatch", 0),
                    "audio_encoder_output": ("AudioEncoderEncode", 0)}
    assert links["ForcingGuider", "positive"] == ("WanSoundImageToVideo", 0)
    assert links["ForcingGuider", "model"] == ("ForcingLiveAvatar", 0)
    assert links["ForcingLiveAvatar", "model"] == ("UNETLoader", 0)
    assert links["SamplerCustomAdvanced", "latent_image"] == ("WanSoundImageToVideo", 2)
    assert links["CreateVideo", "audio"] == ("LoadAudio", 0)
    widgets = {node["type"]: node["widgets"] for node in graph["nodes"]}
    frames = (widgets["WanSoundImageToVideo"]["length"] - 1) // 4 + 1
    assert frames % get("live-avatar").block == 0 and widgets["CreateVideo"]["fps"] == 16
    assert widgets["ForcingPreset"]["system"] == "live-avatar" and widgets["ForcingCache"]["policy"] == "per_step"


# -- a window for every step -----------------------------------------------------------------------------------

SMALL = PerStepOptions(6, 0, 3, steps=2)


def denoiser(options, frames=12):
    net = network()
    memory = make_memory(options, frames, layers=net.config.layers, grid=GRID, head_dim=core.HEAD_DIM, device="cpu")
    return NetworkDenoiser(net, [Condition([core.prompts(seed=0)], memory)])


def roll(target, frames=12, levels=LEVELS, kind="per_step", **more):
    parts = ROLLOUTS[kind](target, layout(frames, 3, given=more.pop("given", 0)), levels, SampleNoise((0,), 12), block=3,
                           **more)
    return torch.cat([x0 for _, x0 in parts], dim=2)


def test_every_step_reads_what_the_same_step_left():
    """An oracle of one window a step: the same network, a plain memory for each noise level."""
    plain = [denoiser(WindowOptions(6, 0, 3, "relative")) for _ in LEVELS]

    class Oracle:
        def __call__(self, x, levels, first, phase):
            assert phase == "noisy"  # and no clean pass is made
            return plain[LEVELS.index(levels[0])](x, levels, first, phase)

    made = roll(denoiser(SMALL))
    assert gap(made, roll(Oracle())) <= 1e-6
    usual = roll(denoiser(WindowOptions(6, 0, 3, "relative")), kind="block")
    assert gap(made[:, :, :3], usual[:, :, :3]) <= 1e-6 and gap(made, usual) > 1e-3


def test_given_frames_are_seen_by_all_steps():
    given = torch.randn(1, core.CHANNELS, 3, *SampleNoise((0,), 12).draws.shape[-2:])
    with_given = roll(denoiser(SMALL), 9, given=3, context=given)
    other = roll(denoiser(SMALL), 9, given=3, context=-given)
    assert gap(with_given[:, :, :3], other[:, :, :3]) > 1e-2
    policy = denoiser(SMALL).conditions[0].memory.policy
    policy.plan(Call(0, 3, "clean"))
    first = policy.plan(Call(3, 3, "noisy", (0, 1, 2), 1.0))
    second = policy.plan(Call(3, 3, "noisy", (0, 1, 2, 3, 4, 5), 0.5))
    assert first.read == (0, 1, 2, 3, 4, 5) and second.read[:3] == (0, 1, 2) and second.positions == first.positions
    assert not {*second.write} & {*first.write}


def test_calls_are_counted_without_clean_passes():
    phases = [call.phase for call in calls("per_step", layout(9, 3), 4)]
    assert phases == ["noisy"] * 12


def test_more_levels_than_steps_are_refused():
    with pytest.raises(ForcingError, match="room for 1 noise levels"):
        roll(denoiser(PerStepOptions(6, 0, 3, steps=1)))
    for wrong in ({"steps": 0}, {"nearest": 0}, {"nearest": 3, "farthest": 2}):
        with pytest.raises(ForcingError, match="make no sense"):
            PerStepOptions(**wrong)


def test_a_resumed_memory_goes_on_with_its_levels():
    first, blocks = denoiser(SMALL), layout(12, 3)
    memory = first.conditions[0].memory
    noise, whole = SampleNoise((0,), 12), roll(denoiser(SMALL))
    made = [x0 for _, x0 in ROLLOUTS["per_step"](first, blocks[:2], LEVELS, noise, block=3)]
    fresh = denoiser(SMALL)
    like = torch.zeros(1, 0, network().config.heads, core.HEAD_DIM)
    fresh.conditions[0].memory.load(Saved(*split(copied(memory.state()))), like)
    made += [x0 for _, x0 in ROLLOUTS["per_step"](fresh, blocks[2:], LEVELS, noise, block=3)]
    assert torch.equal(torch.cat(made, dim=2), whole)
