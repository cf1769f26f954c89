"""Many rollouts at once, what a worker makes of a request, and the command in front of it."""
import argparse
import importlib.util
import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forcing_pack.forcing_core import __main__ as program
from forcing_pack.forcing_core.cli import parallel as command
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.parallel import launch as launching
from forcing_pack.forcing_core.parallel.farm import jobs_of, over_processes, over_ray
from forcing_pack.forcing_core.parallel.ranks import Ranks
from forcing_pack.forcing_core.parallel.request import LATENTS, SNAPSHOT, VIDEO, Request, pack, read_jobs, unpack
from forcing_pack.forcing_core.parallel.sources import source_of
from forcing_pack.forcing_core.parallel.work import Rollout, fulfil
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.standalone import make_denoiser, preset_rollout, window_options
from forcing_pack.forcing_core.wan.text import pad_rows
from forcing_testkit.forcing_corekit import gap
from forcing_testkit.tiny import tiny_wan
from safetensors.torch import load_file, save_file

REPO = Path(__file__).resolve().parents[2]
REQUEST = Request(out="", weights="random", frames=3, size=(64, 32), every=1)
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def latents(folder):
    return load_file(Path(folder) / LATENTS)["latents"]


def alone(request, folder):
    """What a request makes in this process."""
    fulfil(replace(request, out=str(folder)), Ranks(), lambda text: None)
    return latents(folder)


# --- requests

def test_requests_travel_as_text():
    requests = [REQUEST, replace(REQUEST, size=None, cache={"window": 9}, prompt="\u00e9")]
    assert unpack(pack(requests)) == requests


@pytest.mark.parametrize("bad", [{"frames": 0}, {"every": 0}, {"seed": -1}, {"seed": 1 << 64}])
def test_numbers_that_make_no_sense(bad):
    with pytest.raises(ForcingError, match="Use at least 1 frame"):
        replace(REQUEST, **bad)


@pytest.mark.parametrize("text, says", [
    ("{", "no list of jobs"), ("{}", "no jobs"), ("[]", "no jobs"), ('[{"seed": 1}, {"sed": 1}]', "Job 1 .* prompt, cond"),
    ('[{"seed": true}]', "Job 0"), ('[{"prompt": 3}]', "Job 0"), ("[1]", "Job 0")])
def test_jobs_that_cannot_be_read(text, says, tmp_path):
    path = tmp_path / "jobs.json"
    path.write_text(text)
    with pytest.raises(ForcingError, match=says):
        read_jobs(path)
    with pytest.raises(ForcingError, match="no list of jobs"):
        read_jobs(tmp_path / "none.json")


# --- what a worker makes

def test_a_checkpoint_file_is_run_with_an_encoded_prompt(tmp_path):
    prompt = torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(1))
    save_file({"prompt": prompt}, tmp_path / "words.safetensors")
    request = replace(REQUEST, weights=str(tiny_wan(tmp_path / "net.safetensors")), preset="self-forcing",
                      conditioning=str(tmp_path / "words.safetensors"), seed=5)
    made = alone(request, tmp_path / "out")
    preset, net = get("self-forcing"), source_of(request, CPU).net
    denoiser = make_denoiser(net, window_options(preset), 3, (4, 8), [pad_rows(prompt)])
    (_, wanted), = preset_rollout(preset, denoiser, 3, BlockNoise(5, (1, 16), (4, 8)))
    assert gap(made, wanted) == 0 and float(made.std()) > 0.1
    assert net.config.heads == 2 and torch.equal(net.blocks[1].self_attn.k.weight,
                                                 load_file(request.weights)["blocks.1.self_attn.k.weight"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {LATENTS, SNAPSHOT}  # nothing here decodes it


def test_a_micro_network_is_run_with_its_captions_and_decoded(tmp_path):
    request = replace(REQUEST, weights="student", prompt="a blue square moving up on a light background", frames=6, size=None)
    source = source_of(request, CPU)
    assert source.size == (64, 64) and source.preset.name == "micro"
    assert source_of(replace(request, frames=60), CPU).preset.name == "micro-endless"
    assert alone(request, tmp_path).shape == (1, 16, 6, 8, 8)
    assert (tmp_path / VIDEO).stat().st_size > 500


@pytest.mark.parametrize("change, says", [
    ({"weights": "none.pt"}, "There are no weights none.pt"),
    ({"dtype": "int4"}, "'int4' is not known. Use one of float32"),
    ({"prompt": "a red circle"}, "Random weights follow no prompt"),
    ({"weights": "student", "conditioning": "x"}, "Use --prompt"),
    ({"weights": "student", "prompt": "a dog"}, "dog"),
])
def test_what_no_network_can_do(change, says):
    with pytest.raises(ForcingError, match=says):
        source_of(replace(REQUEST, **change), CPU)


def test_encoded_prompts_that_do_not_fit(tmp_path):
    path = tmp_path / "words.safetensors"
    request = replace(REQUEST, weights=str(tiny_wan(tmp_path / "net.safetensors")), preset="self-forcing")
    with pytest.raises(ForcingError, match="Give --conditioning FILE"):
        source_of(request, CPU)
    request = replace(request, conditioning=str(path))
    with pytest.raises(ForcingError, match="was not read"):
        source_of(request, CPU)
    for wrong in ({"text": torch.zeros(1, 5, 4096)}, {"prompt": torch.zeros(1, 5, 8)}, {"prompt": torch.zeros(5, 4096)}):
        save_file(wrong, path)
        with pytest.raises(ForcingError, match=r"no 'prompt' of the shape \[1, n, 4096\]"):
            source_of(request, CPU)


def test_finished_folders_stay_and_unfinished_ones_go_on(tmp_path):
    longer = replace(REQUEST, frames=9)
    whole = alone(longer, tmp_path / "whole")
    request = replace(longer, out=str(tmp_path / "part"), resume=True)
    (tmp_path / "part").mkdir()
    run = Rollout(request, Ranks()).run()
    assert next(run) == (1, 3)
    run.close()
    told = []
    fulfil(request, Ranks(), told.append)
    assert told == ["part: block 2 of 3", "part: block 3 of 3"] and torch.equal(latents(tmp_path / "part"), whole)
    fulfil(request, Ranks(), told.append)
    assert len(told) == 2
    fulfil(replace(request, resume=False), Ranks(), told.append)
    assert len(told) == 5


# --- many at once

def test_jobs_over_processes_are_single_runs_and_one_that_fails_stops_no_other(tmp_path):
    """Two real processes; the second has the bad job before a good one."""
    requests = jobs_of(replace(REQUEST, out=str(tmp_path)), [{"seed": 1}, {"prompt": "a dog"}, {"seed": 2}, {"seed": 3}])
    with pytest.raises(ForcingError, match="^001: Random weights follow no prompt"):
        over_processes(requests, 2)
    for number, seed in ((0, 1), (2, 2), (3, 3)):
        assert gap(latents(tmp_path / f"{number:03d}"), alone(replace(REQUEST, seed=seed), tmp_path / f"alone {seed}")) <= 1e-5
    assert not (tmp_path / "001" / LATENTS).exists()


class FakeRay(types.SimpleNamespace):
    """The calls of Ray that a farm makes, in this process."""

    def __init__(self):
        super().__init__(asked=[], ended=False)

    def init(self, **settings):
        self.settings = settings

    def remote(self, **needs):
        self.needs = needs
        return lambda function: types.SimpleNamespace(remote=lambda *given: self.ask(function, given))

    def ask(self, function, given):
        self.asked.append((function, given))
        return len(self.asked)

    def wait(self, waiting):
        return waiting[-1:], waiting[:-1]

    def get(self, number):
        function, given = self.asked[number - 1]
        return function(*given)

    def shutdown(self):
        self.ended = True


def test_jobs_over_ray_are_single_runs(tmp_path, monkeypatch):
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    requests = jobs_of(replace(REQUEST, out=str(tmp_path), resume=True), [{"seed": 1}, {"prompt": "a dog"}, {"seed": 2}])
    before = alone(replace(REQUEST, seed=1), tmp_path / "000")
    with pytest.raises(ForcingError, match="Job 001 failed: Random weights .* Not finished: 001. Run the command again"):
        over_ray(requests, "ray://head:10001")
    assert len(ray.asked) == 2 and ray.ended  # the finished one was left alone
    assert ray.settings["address"] == "ray://head:10001" and ray.needs == {"num_cpus": 1}
    assert torch.equal(latents(tmp_path / "000"), before)
    assert torch.equal(latents(tmp_path / "002"), alone(replace(REQUEST, seed=2), tmp_path / "alone"))
    assert {path.name for path in (tmp_path / "002").iterdir()} == {LATENTS, VIDEO, SNAPSHOT}


def test_a_cluster_that_is_not_there(tmp_path, monkeypatch):
    def nobody(**settings):
        raise ConnectionError("ray head unreachable")

    ray = FakeRay()
    ray.init = nobody
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ForcingError, match="ray head unreachable. Check the address"):
        over_ray(jobs_of(replace(REQUEST, out=str(tmp_path)), [{"seed": 1}]), "ray://nowhere:1")


def test_ray_is_asked_for_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ForcingError, match="pip install ray"):
        over_ray(jobs_of(replace(REQUEST, out=str(tmp_path)), [{"seed": 1}]))


def test_jobs_over_a_real_ray(require, tmp_path):
    require(importlib.util.find_spec("ray"), "parallel: Ray is not installed", "pip install ray")
    (tmp_path / "jobs.json").write_text('[{"seed": 1}, {"seed": 2}]')
    words = ["--out", tmp_path / "farm", "--jobs", tmp_path / "jobs.json", "--weights", "random", "--frames", 3, "--size",
             "64x32"]
    done = subprocess.run([sys.executable, "-m", "forcing_core", "parallel", *map(str, words), "--ray"], cwd=REPO, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert gap(latents(tmp_path / "farm" / "001"), alone(replace(REQUEST, seed=2), tmp_path / "alone")) <= 1e-5


# --- the command

def asked(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(words))


def test_the_command_asks_for_what_it_is_told(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(command, "launch", lambda shares, **how: seen.append((shares, how)))
    out = tmp_path / "new" / "folder"
    args = asked("--out", str(out), "--processes", "4", "--weights", "random", "--seconds", "2", "--size", "128x64", "--set",
                 "window=9", "--set", "positions=relative", "--preset", "longlive", "--every", "2", "--resume")
    assert command.run(args) == 0 and out.is_dir()
    (shares, how), = seen
    wanted = Request(str(out), "random", frames=9, preset="longlive", size=(128, 64), every=2, resume=True,
                     cache={"window": 9, "positions": "relative"})
    assert shares == [[wanted]] * 4 and how["together"]
    assert "no snapshot yet" in how["advice"]()
    (out / SNAPSHOT).touch()
    assert "--resume to go on" in how["advice"]()
    assert f"{out / LATENTS}: 9 latent frames" in capsys.readouterr().out


def test_the_command_deals_out_jobs(monkeypatch, tmp_path):
    (tmp_path / "jobs.json").write_text(json.dumps([{"seed": seed} for seed in range(5)]))
    seen = []
    monkeypatch.setattr(launching, "_start", lambda number, count, share, group, folder: seen.append((share, group)))
    monkeypatch.setattr(launching, "_wait", lambda workers, together: [])
    monkeypatch.setattr(launching, "_end", lambda workers: None)
    words = ["--out", str(tmp_path), "--jobs", str(tmp_path / "jobs.json"), "--weights", "random"]
    assert command.run(asked(*words, "--processes", "2")) == 0
    assert [[request.seed for request in share] for share, _ in seen] == [[0, 2, 4], [1, 3]]
    assert all(group == {"WORLD_SIZE": "1"} for _, group in seen)  # each on its own
    seen.clear()
    command.run(asked(*words, "--processes", "9"))
    assert len(seen) == 5


@pytest.mark.parametrize("words, says", [
    (["--seconds", "0"], "0 seconds"), (["--seconds", "nan"], "nan seconds"), (["--ray"], "Give --jobs"),
    (["--seed", "-1"], "a seed from 0")])
def test_the_command_refuses_in_one_line(words, says, tmp_path, capsys):
    assert program.main(["parallel", "--out", str(tmp_path / "out"), *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [["--size", "64"], ["--set", "window"], ["--processes", "0"],
                                   ["--frames", "3", "--seconds", "1"]])
def test_words_that_are_none(words, capsys):
    with pytest.raises(SystemExit):
        asked("--out", "x", *words)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ForcingError, match="cannot be made"):
        command.run(asked("--out", str(tmp_path / "file" / "out")))


def test_under_torchrun_it_is_one_of_the_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ForcingError, match="Leave out --jobs"):
        command.run(asked("--out", str(tmp_path), "--ray"))


def test_help_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None\nfrom forcing_core.__main__ import main\nmain(['parallel', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and "--processes" in done.stdout
