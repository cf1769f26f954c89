"""The evaluation measures what was made, says what it could not make, and what it writes can be read."""
import json
import os
import signal
import sys
from argparse import ArgumentParser
from dataclasses import fields, replace

import pytest
import torch
from forcing_pack.forcing_core.cli import evaluate as command
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.evaluate import ablations, plots, rollouts, run, settings, tables
from forcing_pack.forcing_core.micro import bundle, temporal, world
from forcing_pack.forcing_core.micro.observe import frames_of, observe
from forcing_pack.forcing_core.micro.vae import MicroVAE, vae_bytes
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.policies import KINDS, build
from forcing_pack.forcing_core.presets import PRESETS
from forcing_pack.forcing_core.rollout import Switch
from forcing_pack.forcing_core.rollout.transitions import check_switches
from forcing_pack.forcing_core.standalone import make_denoiser, preset_rollout
from forcing_pack.forcing_core.wan.random import random_network
from PIL import Image
from safetensors.torch import save_file

SELF_FORCING = settings.SETTINGS["self-forcing"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of small random models, a different network under each name."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(bundle.NETWORKS):
        state = random_network(bundle.micro_config(128, 1), seed).state_dict()
        save_file({key: value.to(torch.bfloat16) for key, value in state.items()}, folder / f"micro_{name}.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (folder / bundle.VAE).write_bytes(vae_bytes(MicroVAE(4), {}))
    return folder


@pytest.fixture(scope="module")
def models(weights):
    return run.load(weights, settings.SETTINGS.values())


def arguments(*words):
    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def captions_of(specs):
    return [world.caption(spec) for spec in specs]


def quiet(*_):
    pass


# --- settings and options

def test_every_cache_policy_with_a_published_system_has_a_setting():
    wanted = {preset.policy for preset in PRESETS.values() if preset.policy in KINDS and preset.block == 3}
    assert {setting.preset.policy for setting in settings.SETTINGS.values()} == wanted >= {"window"}
    assert {"relax", "memflow", "merging", "routing", "bounded", "rolling_sink", "recompute", "recency"} <= wanted
    assert wanted == {*KINDS} - {"reference"}  # which needs pictures
    assert {settings.SETTINGS[name].cache().store for name in ("self-forcing-int8", "self-forcing-fp8")} == {"int8", "fp8"}
    assert settings.SETTINGS["lol"].cache().jitter == 0.8
    further = [setting for setting in settings.SETTINGS.values() if setting.preset.policy != "window"]
    assert len(further) == len(wanted) - 1 and all(setting.steps == 4 for setting in further)


@pytest.mark.parametrize("name", settings.SETTINGS)
def test_every_setting_can_make_two_minutes(name):
    setting = settings.SETTINGS[name]
    assert setting.network in bundle.NETWORKS
    assert build(setting.cache(), rollouts.latent_frames(120, settings.BLOCK)).capacity > 0


def test_choosing():
    assert [s.name for s in settings.choose(["long", "self-forcing", "long"])] == ["long", "self-forcing"]
    assert [s.name for s in settings.choose(["long", "all"])] == list(settings.SETTINGS)
    assert "teacher" not in settings.USUAL and set(settings.QUICK) < set(settings.USUAL)
    with pytest.raises(ForcingError, match="Did you mean self-forcing-sink3"):
        settings.choose(["self-forcing-sink"])
    with pytest.raises(ForcingError, match="Choose from teacher, teacher-4-steps"):
        settings.choose(["???"])


@pytest.mark.parametrize("seconds, latents", [(0.01, 3), (0.5625, 3), (0.6, 6), (5, 21), (30, 123), (120, 483)])
def test_lengths_are_whole_blocks(seconds, latents):
    assert rollouts.latent_frames(seconds, 3) == latents


def test_longer_lengths_have_the_first_captions():
    options = run.Options((), (120, 5, 30, 5))
    assert options.seconds == (5, 30, 120)
    assert [options.clips(seconds) for seconds in options.seconds] == [24, 8, 4]
    assert options.specs(5)[:4] == options.specs(120)
    assert run.Options((), (120,), 7).clips(120) == 7


def test_the_captions_are_unseen():
    seen = set(captions_of(world.specs(world.draw(5, 500))))
    assert len(seen) > 200 and not seen & set(captions_of(run.Options((), (5,)).specs(5)))


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e9])
def test_bad_seconds(seconds):
    with pytest.raises(ForcingError, match="more than 0 and at most 3600"):
        run.Options((SELF_FORCING,), (5, seconds))


def test_no_captions():
    with pytest.raises(ForcingError, match="at least 1"):
        run.Options((SELF_FORCING,), (5,), 0)


def test_a_switch_changes_colour_and_shape():
    specs = run.Options((), (5,), 30).specs(5)
    for old, new in zip(captions_of(specs), run.other_captions(specs, 0), strict=True):
        assert not set(old.split()[1:3]) & set(new.split()[1:3])


# --- rollouts

def test_a_stream_is_the_rollout_decoded_at_once(models):
    captions, frames = captions_of(run.Options((), (5,), 2).specs(5)), 9
    ticks = []
    made = rollouts.roll(models, SELF_FORCING, captions, frames, 3, lambda *at: ticks.append(at))
    denoiser = make_denoiser(models.nets["student"], SELF_FORCING.cache(), frames, (8, 8), [bundle.prompt(captions)])
    steps = preset_rollout(SELF_FORCING.preset, denoiser, frames, BlockNoise(3, (2, 16), (8, 8)))
    whole = models.vae.decode(torch.cat([latents for _, latents in steps], 2)).clamp(-1, 1)
    assert made.sizes == [3, 3, 3] and ticks == [(1, 3), (2, 3), (3, 3)] and len(made.times) == 3
    clip, seen = frames_of(whole), temporal.Pixels().push(frames_of(whole))
    assert made.pixels.frames == 33 and clip.std() > 0.01
    assert torch.allclose(made.pixels.steps, seen.steps, atol=1e-5) and torch.allclose(made.pixels.small, seen.small, atol=1e-4)
    assert torch.equal(made.observation.objects, observe(clip).objects)
    shown = [clip[0, frame].permute(1, 2, 0).add(1).mul(127.5) for frame in rollouts.times(33)]
    assert all(abs(torch.from_numpy(tile).float() - one).max() < 0.6 for tile, one in zip(made.tiles, shown, strict=True))
    assert made.store_bytes == 2 * 9 * 16 * 128 * 2 * 4  # clips, frames, tokens, width, keys and values, float32


def test_a_guided_setting_has_two_stores_and_its_own_network(models):
    captions = ["a red circle moving left on a dark background"]
    plain, guided = (rollouts.roll(models, settings.SETTINGS[name], captions, 6, 0, quiet)
                     for name in ("self-forcing", "teacher"))
    assert guided.store_bytes == 2 * plain.store_bytes and not torch.equal(plain.pixels.steps, guided.pixels.steps)


def test_what_is_kept_of_a_video_is_small(models):
    """Less than a sixth of its pixels in float16, and nothing that hangs on to a decoded piece."""
    captions = captions_of(run.Options((), (5,), 2).specs(5))
    made = rollouts.roll(models, SELF_FORCING, captions, 24, 0, quiet)
    kept = [getattr(part, f.name) for part in made.seen for f in fields(part)] + made.pixels._small + made.pixels._steps
    frames = len(captions) * made.pixels.frames
    assert made.pixels.frames == 93 and sum(t.untyped_storage().nbytes() for t in kept) < 4096 * frames
    assert made.pixels._last.untyped_storage().nbytes() == 2 * 3 * 64 * 64 * 4 and len(made.tiles) == rollouts.CELLS
    assert all(tile.base is None or tile.base.nbytes <= 12 * 3 * 64 * 64 for tile in made.tiles)


def test_after_a_switch_the_new_caption_rules(models):
    before, after = (["a red circle moving left on a dark background"], ["a blue square moving up on a light background"])
    turned = rollouts.roll(models, SELF_FORCING, before, 12, 0, quiet, rollouts.Turn(2, after))
    same = rollouts.roll(models, SELF_FORCING, before, 12, 0, quiet, rollouts.Turn(2, before))
    assert turned.observation.background.shape == (1, 24, 3) and not turned.tiles
    assert not torch.allclose(turned.observation.background, same.observation.background)


@pytest.mark.parametrize("name", settings.SETTINGS)
def test_every_setting_has_a_way_to_change_its_prompt(name):
    setting = settings.SETTINGS[name]
    cache = setting.cache()
    assert setting.transition == ("keep" if cache.rollout in ("rolling", "per_step") else "recache")
    check_switches([Switch(9, 1, transition=setting.transition)], build(cache, 21), cache.rollout)


@pytest.mark.parametrize("name, replayed", [("rolling-forcing", []), ("memflow", [(0, 6)]), ("relax-forcing", [(0, 6)]),
                                            ("krea-realtime-14b", [])])
def test_a_switch_is_made_in_the_way_of_the_setting(name, replayed, models, monkeypatch):
    seen, call = [], rollouts.NetworkDenoiser.__call__

    def noted(self, x, levels, first, phase):
        seen.append((phase, first, x.shape[2]))
        return call(self, x, levels, first, phase)

    monkeypatch.setattr(rollouts.NetworkDenoiser, "__call__", noted)
    before, after = (["a red circle moving left on a dark background"], ["a blue square moving up on a light background"])
    made = rollouts.roll(models, settings.SETTINGS[name], before, 12, 0, quiet, rollouts.Turn(2, after))
    assert made.observation.background.isfinite().all() and made.sizes == [3] * 4
    assert [rest for phase, *rest in seen if phase == "recache"] == [list(part) for part in replayed]


# --- rows

def perfect(delay):
    """Stands for `roll`: a model that draws exactly what it is told, a new caption after `delay` frames."""
    def roll(models, setting, captions, frames, seed, tick, turn=None, things=1):
        video = world.render([told[caption] for caption in captions], 4 * frames - 3)
        if turn is not None:
            if delay is None:
                raise ForcingError("no switches")
            new = world.render([told[caption] for caption in turn.captions], 4 * frames - 3)
            first = 4 * 3 * turn.block - 3
            video = torch.cat([video[:, :, first:first + delay], new[:, :, first + delay:]], 2)
        made = rollouts.Made(rollouts.times(4 * frames - 3), [3] * (frames // 3), times=[9.0, 2.0, 1.0, 3.0], store_bytes=4000)
        made.look(frames_of(video))
        return made

    told = {world.caption(spec): spec for spec in world.specs(world.draw(9, 2000, split="test"))}
    return roll


@pytest.mark.parametrize("delay", [0, 5, 48, None])
def test_a_perfect_model_gets_perfect_figures(monkeypatch, delay):
    monkeypatch.setattr(run, "roll", perfect(delay))
    results = run.evaluate(run.Options((SELF_FORCING,), (5,), 3), None)
    row, = results.rows
    assert row["caption_accuracy"] == row["frame_accuracy"] == 1 and row["drift"] < 0.02 and row["lost"] == 0
    assert row["store_bytes"] == 1333 and row["seconds_per_block"] == 2.0 and len(row["drift_curve"]) == 5
    expected = {48: (None, 0), None: (None, None)}.get(delay, (delay, 1))
    assert (row["switch_delay_frames"], row["switched"]) == expected
    assert row["switch_note"] == ("no switches" if delay is None else "")
    assert (row["switch_seconds"], row["transition"]) == ((None, None) if delay is None else (81 / 16, "recache"))
    assert results.reference[0]["caption_accuracy"] == 1 and results.reference[0]["drift"] < 0.02


def test_the_delay_is_the_median_of_those_that_obey(monkeypatch):
    monkeypatch.setattr(run, "roll", perfect(0))
    monkeypatch.setattr(run.metrics, "switch_delay_frames", lambda *_: [3, None, 8, None, 40])
    results = run.evaluate(run.Options((SELF_FORCING,), (5,), 5), None)
    assert (results.rows[0]["switch_delay_frames"], results.rows[0]["switched"]) == (8, 0.6)
    line = next(line for line in tables.result_lines(run.Options((SELF_FORCING,), (5,), 5), results)
                if line.startswith("self-forcing"))
    assert line.split()[-4:-2] == ["8", "0.60"]


def test_a_setting_switches_once_and_every_length_tells(monkeypatch):
    calls, roll = [], perfect(5)
    monkeypatch.setattr(run, "roll", lambda *args, **more: calls.append(len(args) > 6) or roll(*args, **more))
    rows = run.evaluate(run.Options((SELF_FORCING,), (1, 6, 7), 2), None).rows
    assert sum(calls) == 1 and [row["switch_delay_frames"] for row in rows] == [None, 5, 5]
    assert "less than 5 s" in rows[0]["switch_note"] and rows[1]["switch_seconds"] == rows[2]["switch_seconds"] > 6


def test_a_setting_that_cannot_make_a_length_is_skipped_and_named(models):
    short = replace(SELF_FORCING, name="short", changes=(("window", 3), ("limit", 3)))
    results = run.evaluate(run.Options((short,), (0.5, 1), 1), models)
    assert [row["seconds"] for row in results.rows] == [0.5]
    assert [(row["settings"], row["seconds"]) for row in results.skipped] == [("short", 1)]
    assert "short at 1 s was skipped: 6 latent frames need" in "\n".join(
        tables.result_lines(run.Options((short,), (0.5, 1), 1), results))


def test_json_has_no_numbers_that_json_lacks():
    assert run.strict({"a": [float("nan"), 1.0, {"b": float("inf")}], "c": "x", "d": (2, None)}) == {
        "a": [None, 1.0, {"b": None}], "c": "x", "d": [2, None]}


# --- ablations

def row(name, seconds, drift, right):
    return {"settings": name, "seconds": seconds, "drift": drift, "frame_accuracy": right}


def test_verdicts():
    rows = [row("self-forcing", 5, 0.1, 0.9), row("teacher-forcing", 5, 0.9, 0.1), row("self-forcing", 30, 0.2, 0.95),
            row("teacher-forcing", 30, 0.4, 0.99), row("long", 30, float("nan"), 0.95)]
    found = {(v.claim, v.metric): v for v in ablations.verdicts(rows)}
    assert len(found) == 6  # the sink was not run, and nothing is compared at the training length
    own, own_right = (found["training on own rollouts", metric] for metric in ("drift", "frame_accuracy"))
    assert own.holds and (own.better, own.better_figure, own.worse_figure) == ("self-forcing at 30 s", 0.2, 0.4)
    assert own_right.holds is False
    assert found["training on long rollouts", "drift"].holds is None
    assert found["training on long rollouts", "frame_accuracy"].holds is False  # no better is not better
    assert found[ablations.PAST, "drift"].holds and found[ablations.PAST, "frame_accuracy"].holds is False
    lines = tables.verdict_lines(tuple(found.values()))
    assert lines[1].split()[0] == "holds" and lines[1].split()[-1] == "0.400" and "self-forcing at 30 s" in lines[1]
    assert [line for line in lines if line.startswith("not measured") and " -" in line]


def test_one_length_is_compared_at_that_length():
    found = ablations.verdicts([row("self-forcing", 5, 0.1, 0.9), row("teacher-forcing", 5, 0.9, 0.1)])
    assert [(v.metric, v.holds) for v in found] == [("drift", True), ("frame_accuracy", True)]


# --- plots

def test_labels_are_spread():
    places = plots.spread([50, 51, 52, 99, 10], 10, 0, 100)
    order = sorted(places)
    assert all(b - a >= 10 - 1e-9 for a, b in zip(order, order[1:])) and 0 <= order[0] and order[-1] <= 100
    assert places.index(min(places)) == 4 and places[0] < places[1] < places[2] < places[3]
    assert plots.spread([10, 50, 90], 10, 0, 100) == [10, 50, 90]


def count(image, colour):
    return sum(n for n, c in image.getcolors(1 << 24) if c == colour)


def test_the_sheet_shows_every_picture():
    red = torch.tensor([250, 0, 1], dtype=torch.uint8).expand(64, 64, 3).contiguous().numpy()
    image = plots.sheet([("a", "b", [red] * 3), ("a long name of a setting", "c", [red] * 3)], [0, 1.5, 3], "a caption")
    assert count(image, (250, 0, 1)) == 6 * plots.TILE ** 2
    with pytest.raises(ForcingError, match="at least one"):
        plots.sheet([], [0], "a caption")


def test_bars_are_as_long_as_their_figures():
    rows = [{"settings": "a", "seconds": s, "caption_accuracy": v} for s, v in ((5, 0.5), (30, float("nan")), (120, 1.0))]
    image = plots.bars(rows)
    half, none, whole = (count(image, colour) - 25 * 25 for colour in plots.PALETTE[:3])  # without the legend
    assert none == 0 and abs(2 * half - whole) < 100 < half


def test_a_curve_for_every_setting():
    rows = [{"settings": name, "drift_curve": [0.0, 0.1 * number, float("nan")]}
            for number, name in enumerate(settings.SETTINGS)]
    image = plots.drift_plot(rows)
    assert all(count(image, plots.PALETTE[n % len(plots.PALETTE)]) > 500 for n in range(len(rows)))
    assert plots.drift_plot([{"settings": "a", "drift_curve": [float("nan")]}]).size == image.size


# --- the command

def refuse(text):
    raise AssertionError(f"{text} is not JSON")


def test_the_command(weights, tmp_path, capsys):
    args = arguments("--seconds", 0.5, 1, "--settings", "self-forcing", "teacher-forcing", "--captions", 2, "--json",
                     tmp_path / "a.json", "--out", tmp_path / "new" / "plots", "--weights", weights, "--ablations")
    assert command.run(args) == 0
    told = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    names = ["self-forcing", "teacher-forcing", "long", "self-forcing-sink3"]
    assert [(r["settings"], r["seconds"]) for r in told["rows"]] == [(n, s) for s in (0.5, 1.0) for n in names]
    wanted = {"caption_accuracy", "drift", "seam_ratio", "repeats", "switch_delay_frames", "store_bytes",
              "seconds_per_block"}
    assert all(wanted <= set(r) for r in told["rows"]) and told["machine"]["torch"] == torch.__version__
    assert told["rows"][0]["seam_ratio"] is None and not told["stopped"] and len(told["captions"]) == 2
    assert {v["claim"] for v in told["ablations"]} >= {"training on own rollouts", "a sink"}
    assert sorted(os.listdir(args.out)) == ["accuracy.png", "drift.png", "sheet-0.5s.png", "sheet.png"]
    assert Image.open(args.out / "sheet.png").height > 5 * plots.TILE
    out, err = capsys.readouterr()
    assert "1 s, 2 unseen captions" in out and out.count("\nself-forcing-sink3 ") == 2 and "does not hold" in out
    assert err.splitlines()[0].startswith("1 of 8") and "self-forcing, 0.5 s, video" in err


def test_the_seed_decides(weights, tmp_path):
    def drift(seed):
        args = arguments("--seconds", 1, "--settings", "self-forcing", "--captions", 1, "--seed", seed, "--json",
                         tmp_path / "a.json", "--weights", weights)
        assert command.run(args) == 0
        return json.loads((tmp_path / "a.json").read_text())["rows"][0]["seam_change"]

    assert drift(1) == drift(1) != drift(2)


def test_ctrl_c_keeps_what_is_finished(weights, tmp_path, monkeypatch, capsys):
    show = command.Line.show

    def interrupt(self, progress):
        show(self, progress)
        if progress.run == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(command.Line, "show", interrupt)
    before = signal.getsignal(signal.SIGINT)
    args = arguments("--seconds", 1, "--settings", "self-forcing", "long", "--captions", 1, "--json", tmp_path / "a.json",
                     "--out", tmp_path, "--weights", weights)
    assert command.run(args) == 130
    assert signal.getsignal(signal.SIGINT) is before
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["stopped"] and [r["settings"] for r in told["rows"]] == ["self-forcing"]
    assert "Stopped after 1 of 2 rows." in capsys.readouterr().out and (tmp_path / "sheet.png").exists()


def test_what_runs_by_default():
    quick, usual = (command.options_of(arguments(*words)) for words in (["--quick"], []))
    assert (quick.seconds, quick.clips(5), [s.name for s in quick.settings]) == ((5,), 6, list(settings.QUICK))
    assert usual.seconds == (5, 30, 120) and [s.name for s in usual.settings] == list(settings.USUAL)
    claims = command.options_of(arguments("--ablations", "--quick"))
    assert (claims.seconds, claims.clips(120)) == ((5, 30, 120), 6)
    assert [s.name for s in claims.settings] == list(ablations.SETTINGS)


def test_the_list(capsys):
    assert command.run(arguments("--list")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(settings.SETTINGS) and "window, 21 frames, sink 3" in "".join(lines)


def test_missing_packages_come_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ForcingError, match="pip install av'"):
        command.run(arguments("--weights", tmp_path))


def test_complaints_come_first(tmp_path, weights):
    (tmp_path / "file").touch()
    for words, complaint in ((["--weights", tmp_path], "micro_.*is missing"),
                             (["--weights", weights, "--json", tmp_path / "no" / "a.json"], "existing folder"),
                             (["--weights", weights, "--json", tmp_path], "it is a folder"),
                             (["--weights", weights, "--out", tmp_path / "file"], "cannot be made"),
                             (["--weights", weights, "--settings", "selfforcing"], "Did you mean self-forcing"),
                             (["--weights", weights, "--seconds", "-3"], "more than 0")):
        with pytest.raises(ForcingError, match=complaint):
            command.run(arguments(*words))
    assert os.listdir(tmp_path) == ["file"]
