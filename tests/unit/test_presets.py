"""The preset table: complete, consistent, and equal to the published settings."""
import pytest
from forcing_pack.forcing_core import presets, schedule
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.presets import PRESETS, for_file, get, guess, runnable

FOUR = (1000, 750, 500, 250)

# name: block, window, sink, positions, steps, first steps, warp, shift, weights key (literal, from the papers' code)
PUBLISHED = {
    "self-forcing": (3, None, 0, "absolute", FOUR, None, True, 5, "generator_ema"),
    "self-forcing-long": (3, 12, 3, "relative", FOUR, None, True, 5, "generator_ema"),
    "self-forcing-10s": (3, None, 0, "absolute", FOUR, None, True, 5, "generator_ema"),
    "self-forcing++": (3, 21, 0, "absolute", FOUR, None, True, 5, "generator_ema"),
    "causvid-3step": (3, None, 0, "absolute", (1000, 757, 522), None, False, 8, "generator"),
    "causvid-4step-warp": (3, None, 0, "absolute", FOUR, None, True, 8, "generator"),
    "causal-forcing-chunkwise": (3, None, 0, "absolute", FOUR, None, True, 5, "generator"),
    "causal-forcing-framewise": (1, None, 0, "absolute", FOUR, None, True, 5, "generator_ema"),
    "causal-forcing++-2step": (1, None, 0, "absolute", (1000, 500), FOUR, True, 5, "generator_ema"),
    "causal-forcing++-1step": (1, None, 0, "absolute", (1000,), FOUR, True, 5, "generator_ema"),
    "causal-forcing-longvideo": (3, 21, 3, "absolute", FOUR, None, True, 5, "generator_ema"),
    "longlive": (3, 12, 3, "absolute", FOUR, None, True, 5, "generator"),
    "longlive-infinity": (3, 12, 3, "relative", FOUR, None, True, 5, "generator"),
    "rolling-forcing": (3, 21, 3, "absolute", (1000, 800, 600, 400, 200), None, True, 5, "generator_ema"),
    "reward-forcing": (3, 9, 3, "relative", FOUR, None, True, 5, "flat"),
    "deep-forcing": (3, 21, 10, "absolute", FOUR, None, True, 5, "generator_ema"),
    "deep-forcing-sink": (3, 21, 14, "absolute", FOUR, None, True, 5, "generator_ema"),
    "light-forcing-long": (3, 12, 1, "relative", FOUR, None, True, 5, "generator_ema"),
    "context-forcing": (3, 21, 3, "relative", FOUR, None, True, 5, "generator_ema"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_equal_the_published_settings(name):
    p = get(name)
    assert (p.block, p.window, p.sink, p.positions, p.steps, p.first_steps, p.warp, p.shift,
            p.weights_key) == PUBLISHED[name]


def test_every_system_of_the_family_has_a_row():
    others = {"causal-forcing-ar-teacher-chunkwise", "causal-forcing-ar-teacher-framewise", "light-forcing-short",
              "resampling-forcing", "krea-realtime-14b", "knot-forcing", "tempcache", "live",
              "micro", "micro-endless", "recency-forcing", "rolling-sink", "lol", "relax-forcing", "memflow", "live-avatar"}
    assert set(PRESETS) == set(PUBLISHED) | others


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_rows_are_consistent(preset):
    assert preset.policy in presets.POLICIES
    assert preset.licence and preset.title and preset.notes.isascii()
    assert bool(preset.steps) != bool(preset.step_count), "either a step list or a number of solver steps"
    assert (preset.solver == "renoise") == bool(preset.steps)
    for steps in (preset.steps, preset.first_steps or ()):
        assert not steps or len(schedule.levels(steps, preset.shift, preset.warp)) == len(steps)
    if preset.window is not None:
        assert preset.window - preset.sink >= preset.block
    assert preset.weights_key in ("generator", "generator_ema", "flat")
    assert preset.context_timestep == 0 and not preset.independent_first  # no released checkpoint differs


def test_the_many_step_teacher_is_guided_and_has_the_official_negative_prompt():
    teacher = get("causal-forcing-ar-teacher-chunkwise")
    assert (teacher.solver, teacher.step_count, teacher.cfg, teacher.shift) == ("unipc", 50, 3.0, 5.0)
    assert teacher.negative_prompt.startswith("\u8272\u8c03\u8273\u4e3d")
    assert teacher.negative_prompt.count("\uff0c") == 27
    assert get("causal-forcing-ar-teacher-framewise").block == 1
    assert all(p.cfg == 1 and not p.negative_prompt for p in PRESETS.values() if p.solver == "renoise")


def test_only_systems_with_a_known_policy_and_public_weights_run():
    assert {"self-forcing", "rolling-forcing", "causal-forcing-longvideo"} <= {p.name for p in runnable()}
    assert all(presets.POLICIES[p.policy] is None and p.files for p in runnable())
    assert "live" not in {p.name for p in runnable()}
    for preset in PRESETS.values():
        assert preset.available == (preset.runs == "yes")
        assert preset.available or preset.runs.startswith("no: ")
    assert "public weights" in presets.Preset("x", "X").runs


def test_longlive_needs_its_lora_and_recaches():
    longlive = get("longlive")
    assert longlive.lora.path == "models/lora.pt" and longlive.recache and longlive.global_sink


def test_restricted_weights_say_so():
    for name in ("rolling-forcing", "causal-forcing-longvideo"):
        assert "academic" in get(name).restrictions
    assert get("causvid-3step").restrictions == "non-commercial"
    assert get("causal-forcing-framewise").restrictions == ""


def test_get_forgives_spelling_and_suggests():
    assert get(" Self_Forcing ").name == "self-forcing"
    with pytest.raises(ForcingError, match="Did you mean.*longlive"):
        get("longlife")
    with pytest.raises(ForcingError, match="Choose one of self-forcing"):
        get("zzzzzz")


@pytest.mark.parametrize(("path", "name"), [
    ("gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt", "self-forcing"),
    ("self_forcing_dmd.pt", "self-forcing"),
    ("self_forcing_sid.safetensors", "self-forcing"),
    ("self_forcing_10s.pt", "self-forcing-10s"),
    ("self_forcing_dmd_fp8.safetensors", "self-forcing"),
    ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
    ("D:\\models\\chunkwise\\causal_forcing.pt", "causal-forcing-chunkwise"),
    ("causal_forcing-framewise.safetensors", "causal-forcing-framewise"),
    ("causal-forcing++-2step-bf16.safetensors", "causal-forcing++-2step"),
    ("self-forcing-long-bf16.safetensors", "self-forcing-long"),
    ("longlive-infinity.safetensors", "longlive-infinity"),
    ("framewise-1step.pt", "causal-forcing++-1step"),
    ("autoregressive_checkpoint/model.pt", "causvid-3step"),
    ("autoregressive_checkpoint_warp_4step_cfg2/model.pt", "causvid-4step-warp"),
    ("longlive_base.pt", "longlive"),
    ("rolling_forcing_dmd.pt", "rolling-forcing"),
    ("rewardforcing.pt", "reward-forcing"),
    ("longvideo.pt", "causal-forcing-longvideo"),
    ("krea-realtime-video-14b.safetensors", "krea-realtime-14b"),
])
def test_official_files_are_recognised(path, name):
    assert guess(path).name == name


@pytest.mark.parametrize("path", ["model.pt", "lora.pt", "wan2.1_t2v_1.3B_bf16.safetensors", "", "causal_cd.pt"])
def test_names_that_say_nothing_are_not_guessed(path):
    assert for_file(path) == () and guess(path) is None


def test_one_name_of_two_files_is_not_guessed():
    assert [p.name for p in for_file("causal_forcing.pt")] == ["causal-forcing-chunkwise", "causal-forcing-framewise"]
    assert guess("causal_forcing.pt") is None


def test_systems_without_training_share_their_base_file():
    names = [p.name for p in for_file("self_forcing_dmd.pt")]
    assert names[0] == "self-forcing" and {"self-forcing-long", "deep-forcing", "self-forcing++"} <= set(names)
