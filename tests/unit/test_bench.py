"""Benchmarks report what they measured; the comparison with ComfyUI is found or asked for in one sentence."""
import json
import sys
from argparse import ArgumentParser
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.bench import Case, Setup, Timing, compare, early_late, machine, measure, write_json
from forcing_pack.forcing_core.cli import bench as command
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.plan_view import StoreShape, announce
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.wan import WanConfig
from forcing_pack.forcing_core.wan.random import random_network

TINY = WanConfig(dim=64, ffn_dim=32, heads=2, layers=2, text_dim=8, text_len=4, freq_dim=32)
SETUP = Setup(get("longlive"), TINY, (32, 16))


pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(*words):
    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def timing(blocks, seconds):
    first_frames = tuple(range(0, 3 * blocks, 3))
    return Timing(3 * blocks, 12, 3, "absolute", 1, sum(seconds), tuple(seconds), first_frames, 0, None)


def test_a_random_network_depends_on_its_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (random_network(TINY, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.head.weight"], other["head.head.weight"])
    assert first["head.head.weight"].std() > 0.05


def test_half_precision_keeps_the_patch_embedding():
    net = random_network(TINY, 0, dtype=torch.bfloat16)
    assert net.patch_embedding.weight.dtype == torch.float32 and net.head.head.weight.dtype == torch.bfloat16


def test_measured_rollouts():
    said = []
    short, long = measure(SETUP, [Case(6, None), Case(15, 9)], 2, said.append)
    assert (short.frames, short.window, short.runs, len(short.block_seconds)) == (6, None, 2, 2)
    assert (long.window, long.sink, long.first_frames) == (9, 3, (0, 3, 6, 9, 12))
    assert all(seconds > 0 for seconds in long.block_seconds) and long.seconds > 0
    shape = StoreShape(layers=2, dim=64, height=2, width=4, element_size=4)
    assert long.store_bytes == announce(SETUP.options(Case(15, 9)), 15, shape).bytes
    assert long.peak_bytes is None
    # cases alternate, so that a machine that slows down does not favour the first one
    assert said[2:] == ["run 1 of 2: 6 frames, window everything", "run 1 of 2: 15 frames, window 9",
                        "run 2 of 2: 6 frames, window everything", "run 2 of 2: 15 frames, window 9"]


def test_a_policy_without_a_window_of_that_name():
    """Bounded and merging memories make their window of other settings: nothing to choose there."""
    setup = replace(SETUP, preset=get("context-forcing"))
    assert setup.options(Case(6, None)).window == 21
    with pytest.raises(ForcingError, match="no setting window.*Leave it out"):
        setup.options(Case(6, 12))


def test_a_guided_preset_has_two_stores():
    guided = replace(SETUP, preset=replace(get("longlive"), cfg=3.0))
    one, two = (measure(setup, [Case(3, None)], 1)[0].store_bytes for setup in (SETUP, guided))
    assert two == 2 * one


def test_early_and_late_blocks():
    found = early_late(timing(200, [9.0] * 10 + [1.0] * 10 + [5.0] * 169 + [1.5] * 10 + [99.0]))
    assert found == {"early_frame": 60, "late_frame": 597, "early": 1.0, "late": 1.5, "ratio": 1.5}
    assert early_late(timing(20, [1.0] * 20)) is None


def test_what_cannot_be_measured_is_refused_before_it_starts():
    said = []
    with pytest.raises(ForcingError, match="leaves no room"):
        measure(SETUP, [Case(6, None), Case(6, 4)], 1, said.append)
    with pytest.raises(ForcingError, match="nothing to generate"):
        measure(SETUP, [Case(0, None)], 1, said.append)
    with pytest.raises(ForcingError, match="at least 1 of each"):
        measure(SETUP, [Case(6, None)], 0, said.append)
    with pytest.raises(ForcingError, match="device 'tpu' is not known"):
        measure(replace(SETUP, device="tpu"), [Case(6, None)], 1, said.append)
    assert not said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_cuda_device_is_told():
    with pytest.raises(ForcingError, match="sees no CUDA device"):
        measure(replace(SETUP, device="cuda"), [Case(6, None)], 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_times_and_peak():
    [found] = measure(replace(SETUP, device="cuda", dtype=torch.bfloat16), [Case(15, 9)], 2)
    assert all(seconds > 0 for seconds in found.block_seconds) and found.peak_bytes > found.store_bytes


def test_the_machine_and_the_file(tmp_path):
    info = machine()
    assert info["torch"] == torch.__version__ and info["threads"] == torch.get_num_threads() and info["device"]
    write_json(tmp_path / "a.json", {"machine": info})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"machine": info}
    with pytest.raises(ForcingError, match="was not written"):
        write_json(tmp_path / "nowhere" / "a.json", {})


def test_the_command(tmp_path, capsys):
    path = tmp_path / "a.json"
    assert command.run(arguments("--json", path, "--frames", 6, 9, "--window", "all", 6, "--runs", 1, "--dim", 128,
                                 "--layers", 1, "--size", "16x16")) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(result) == {"machine", "rates", "rollouts", "compare", "official"}
    assert result["compare"] == result["official"] == []  # neither was asked for
    assert [(row["frames"], row["window"]) for row in result["rollouts"]] == [(6, None), (9, None), (6, 6), (9, 6)]
    assert {row["dtype"] for row in result["rollouts"]} == {"float32"}
    assert result["rollouts"][3]["store_bytes"] == 6 * 128 * 2 * 4  # frames of 1 token, width, keys and values, float32
    assert "pixel fps" in capsys.readouterr().out


def test_bad_arguments(tmp_path):
    with pytest.raises(ForcingError, match="multiple of 128"):
        command.run(arguments("--json", tmp_path / "a.json", "--dim", 100))
    with pytest.raises(ForcingError, match="does not exist"):
        command.run(arguments("--json", tmp_path / "nowhere" / "a.json"))
    with pytest.raises(SystemExit):
        arguments("--json", "a.json", "--window", "none")


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """A folder with a nodes/compare.py beside something that looks like ComfyUI."""
    host, repository = tmp_path / "ComfyUI", tmp_path / "pack"
    (host / "comfy").mkdir(parents=True)
    (host / "main.py").touch()
    (repository / "nodes").mkdir(parents=True)
    monkeypatch.setattr(compare, "PARENT", "pretended_pack")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    yield repository
    for name in [name for name in sys.modules if name.startswith("pretended_pack")]:
        del sys.modules[name]


def test_the_comparison_is_loaded_by_path(pack):
    (pack / "nodes" / "compare.py").write_text(
        "def compare(frames_and_windows, runs, progress):\n"
        "    progress('here')\n"
        "    return [dict(frames=f, window=w, ratio=1.5, core_seconds=3.0, our_seconds=2.0)"
        " for f, w in frames_and_windows]\n", encoding="utf-8")
    said = []
    rows = compare.run_compare([Case(21, None), Case(60, 12)], 2, said.append, compare.load_compare(pack))
    assert [(row["frames"], row["window"]) for row in rows] == [(21, None), (60, 12)] and said == ["here"]
    assert sys.path[0] == str(pack.parent / "ComfyUI")
    assert [line.split() for line in command.compare_table(rows)[2:]] == [
        ["21", "all", "3.00", "2.00", "1.500", "-"], ["60", "12", "3.00", "2.00", "1.500", "-"]]


def test_errors_of_the_comparison_are_ours(pack):
    """Under the synthetic parent the core is loaded a second time, with an error class of its own."""
    (pack / "nodes" / "compare.py").write_text(
        "class ForcingError(ValueError): pass\n"
        "def compare(*_):\n"
        "    raise ForcingError('told')\n", encoding="utf-8")
    with pytest.raises(ForcingError, match="told"):
        compare.run_compare([Case(21, None)], 1, print, compare.load_compare(pack))


def test_what_the_comparison_lacks_is_named(pack, monkeypatch):
    with pytest.raises(ForcingError, match="needs nodes/compare.py"):
        compare.load_compare(pack)
    (pack / "nodes" / "compare.py").write_text("import not_there_at_all\n", encoding="utf-8")
    with pytest.raises(ForcingError, match="not_there_at_all"):
        compare.load_compare(pack)
    monkeypatch.setenv("COMFYUI_PATH", str(pack))
    with pytest.raises(ForcingError, match="needs a ComfyUI checkout"):
        compare.load_compare(pack)
    monkeypatch.delenv("COMFYUI_PATH")
    monkeypatch.setenv("HOME", str(pack))
    monkeypatch.setenv("USERPROFILE", str(pack))
    (pack.parent / "ComfyUI" / "main.py").unlink(missing_ok=True)
    with pytest.raises(ForcingError, match="custom_nodes"):
        compare.load_compare(pack)
