"""The commands that handle files: presets, fetch, convert, and the program around them."""
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from forcing_pack.forcing_core import __main__ as program
from forcing_pack.forcing_core.checkpoints import ModelConfig, expected_shapes
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.presets import PRESETS
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(dim=128, num_heads=1, ffn_dim=192, num_layers=1, text_dim=32, freq_dim=16)


def forcing(*arguments, env=()):
    """The program in a process of its own, as a user starts it."""
    return subprocess.run([sys.executable, "-m", "forcing_core", *map(str, arguments)], cwd=REPO, text=True,
                          capture_output=True, timeout=120, env={**os.environ, **dict(env)})


@pytest.fixture
def checkpoint(tmp_path):
    state = {f"model.{name}": torch.randn(shape) for name, shape in expected_shapes(CONFIG).items()}
    path = tmp_path / "self_forcing_dmd.pt"
    torch.save({"generator": state, "generator_ema": state}, path)
    return path


# --- the program

def test_help_lists_every_command_without_importing_torch():
    code = ("import sys; sys.modules['torch'] = sys.modules['safetensors'] = None\n"
            "from forcing_core.__main__ import main\n"
            "main(sys.argv[1:])")
    for arguments in (["--help"], ["presets", "--help"], ["fetch", "--help"], ["convert", "--help"], ["presets"]):
        result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=REPO, text=True, capture_output=True,
                                timeout=60)
        assert result.returncode == 0, result.stderr
        if arguments == ["--help"]:
            assert all(f"\n    {name} " in result.stdout for name in program.COMMANDS)


def test_only_the_chosen_command_is_imported(monkeypatch):
    asked = []
    monkeypatch.setattr(program.importlib, "import_module",
                        lambda name, package: asked.append(name) or types.SimpleNamespace(
                            HELP="", add_arguments=lambda parser: None, run=lambda args: 7))
    assert program.main(["bench"]) == 7
    assert asked == [".cli.bench"]


@pytest.mark.parametrize(("error", "status", "told"), [
    (ForcingError("Two\nlines."), 1, "error: Two lines.\n"), (KeyboardInterrupt(), 130, "stopped\n"),
])
def test_problems_are_one_line_and_a_status(error, status, told, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr(program, "_module", lambda *names: types.SimpleNamespace(
        HELP="", add_arguments=lambda parser: None, run=run))
    assert program.main(["demo"]) == status
    assert capsys.readouterr().err == told


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(program, "_module", lambda *names: types.SimpleNamespace(
        HELP="", add_arguments=lambda parser: None, run=lambda args: 1 // 0))
    with pytest.raises(ZeroDivisionError):
        program.main(["demo"])


def test_a_missing_dependency_is_named(monkeypatch, capsys):
    def missing(name, package):
        raise ModuleNotFoundError("No module named 'av'", name="av")

    monkeypatch.setattr(program.importlib, "import_module", missing)
    assert program.main(["demo"]) == 1
    assert "needs the Python module av" in capsys.readouterr().err


def test_no_or_unknown_commands_are_usage_errors(capsys):
    for arguments in ([], ["nonsense"]):
        with pytest.raises(SystemExit) as caught:
            program.main(arguments)
        assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


# --- presets

def test_table_has_a_line_for_each_preset(capsys):
    assert program.main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert all(line.isascii() for line in lines)


def test_json_holds_everything_and_can_be_read_back(capsys):
    assert program.main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(PRESETS)
    assert rows["longlive"]["lora"] == {"repo": "Efficient-Large-Model/LongLive-1.3B", "path": "models/lora.pt",
                                        "bytes": None}
    assert rows["deep-forcing"]["options"] == {"budget": 16, "recent": 4, "reuse_cap": 7, "positions": "rebased"}
    assert rows["self-forcing"]["available"] is True and rows["live"]["runs"].startswith("no: ")


def test_one_preset_in_full(capsys):
    assert program.main(["presets", "causal-forcing-ar-teacher-chunkwise"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and "zhuhz22/Causal-Forcing/chunkwise/ar_diffusion.pt" in out
    assert "step_count        50" in out
    assert program.main(["presets", "longlife"]) == 1
    assert "Did you mean longlive" in capsys.readouterr().err


# --- convert

def test_convert_as_a_program(checkpoint, tmp_path):
    target = tmp_path / "out.safetensors"
    result = forcing("convert", checkpoint, target, "--causal-ar")
    assert result.returncode == 0, result.stderr
    assert "Preset self-forcing" in result.stdout and "container generator_ema" in result.stdout
    assert load_file(target)["head.modulation"].dtype is torch.bfloat16
    again = forcing("convert", checkpoint, target)
    assert again.returncode == 1 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    assert forcing("convert", checkpoint, target, "--overwrite", "--dtype", "fp32").returncode == 0


def test_convert_a_lora_to_comfyui_names(tmp_path, capsys):
    torch.save({"generator_lora": {"base_model.model.blocks.0.ffn.0.lora_A.weight": torch.ones(2, 128),
                                   "base_model.model.blocks.0.ffn.0.lora_B.weight": torch.ones(192, 2)}},
               tmp_path / "lora.pt")
    assert program.main(["convert", str(tmp_path / "lora.pt"), str(tmp_path / "l.safetensors"), "--as-lora"]) == 0
    assert "1 layers, rank 2" in capsys.readouterr().out
    assert sorted(load_file(tmp_path / "l.safetensors")) == [
        f"diffusion_model.blocks.0.ffn.0.{end}" for end in ("alpha", "lora_A.weight", "lora_B.weight")]


# --- fetch: never the network here

@pytest.fixture
def hub(monkeypatch):
    """A huggingface_hub that writes down what it is asked for; set .trouble to make it fail."""
    errors = types.ModuleType("huggingface_hub.errors")
    for name in ("OfflineModeIsEnabled", "RepositoryNotFoundError", "EntryNotFoundError"):
        setattr(errors, name, type(name, (Exception,), {}))
    errors.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (errors.EntryNotFoundError,), {})
    errors.GatedRepoError = type("GatedRepoError", (errors.RepositoryNotFoundError,), {})
    fake = types.ModuleType("huggingface_hub")
    fake.errors, fake.asked, fake.trouble = errors, [], None

    def hf_hub_download(repo, path, local_dir):
        if fake.trouble:
            raise fake.trouble
        fake.asked.append((repo, path, Path(local_dir).name))
        return str(Path(local_dir) / path)

    fake.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return fake


def test_fetch_shows_size_and_licence_and_downloads_the_usual_file(hub, tmp_path, capsys):
    assert program.main(["fetch", "causal-forcing-framewise", "--dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "about 5.7 GB" in out and "Licence: Apache-2.0" in out
    assert hub.asked == [("zhuhz22/Causal-Forcing", "framewise/causal_forcing.pt", "Causal-Forcing")]


def test_fetch_asks_for_consent_where_weights_are_restricted(hub, tmp_path, capsys):
    assert program.main(["fetch", "rolling-forcing", "--dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert hub.asked == [] and "--accept-licence" in captured.err
    assert "Restriction: code: academic use only" in captured.out and "size not published" in captured.out
    assert program.main(["fetch", "rolling-forcing", "--dir", str(tmp_path), "--accept-licence"]) == 0
    assert len(hub.asked) == 1


def test_fetch_takes_the_lora_along(hub, tmp_path):
    assert program.main(["fetch", "longlive", "--dir", str(tmp_path), "--accept-licence"]) == 0
    assert [path for _, path, _ in hub.asked] == ["models/longlive_base.pt", "models/lora.pt"]


def test_fetch_can_take_another_file(hub, tmp_path, capsys):
    options = ["--dir", str(tmp_path), "--accept-licence"]
    assert program.main(["fetch", "self-forcing", "--file", "self_forcing_sid.pt", *options]) == 0
    assert [path for _, path, _ in hub.asked] == ["checkpoints/self_forcing_sid.pt"]
    assert program.main(["fetch", "self-forcing", "--file", "nothing.pt", *options]) == 1
    assert "checkpoints/self_forcing_dmd.pt" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["knot-forcing", "context-forcing"])
def test_fetch_without_a_known_file_says_why(name, hub, capsys):
    assert program.main(["fetch", name, "--accept-licence"]) == 1
    assert "No single weights file" in capsys.readouterr().err and hub.asked == []


@pytest.mark.parametrize(("name", "told"), [
    ("OfflineModeIsEnabled", "offline mode"), ("LocalEntryNotFoundError", "cannot be reached"),
    ("GatedRepoError", "asks for consent"), ("RepositoryNotFoundError", "no such public repository"),
    ("EntryNotFoundError", "no such file any more"),
])
def test_download_errors_are_explained(name, told, hub, tmp_path, capsys):
    hub.trouble = getattr(hub.errors, name)("long technical text")
    assert program.main(["fetch", "causal-forcing-framewise", "--dir", str(tmp_path)]) == 1
    assert told in capsys.readouterr().err


def test_other_download_errors_are_passed_on(hub, tmp_path, capsys):
    for trouble, told in ((OSError(28, "No space"), "disk is full"), (RuntimeError("xet"), "RuntimeError: xet")):
        hub.trouble = trouble
        assert program.main(["fetch", "causal-forcing-framewise", "--dir", str(tmp_path)]) == 1
        assert told in capsys.readouterr().err


def test_fetch_looks_at_the_free_space_first(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=10**9))
    assert program.main(["fetch", "causal-forcing-framewise", "--dir", str(tmp_path / "new" / "folder")]) == 1
    assert "5.7 GB are needed" in capsys.readouterr().err and hub.asked == []


def test_fetch_without_the_hub_library_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert program.main(["fetch", "causal-forcing-framewise", "--dir", str(tmp_path)]) == 1
    assert "pip install huggingface-hub" in capsys.readouterr().err


def test_the_real_library_offline_gives_one_line(tmp_path):
    pytest.importorskip("huggingface_hub")
    result = forcing("fetch", "causal-forcing-framewise", "--dir", tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE" in result.stderr or "cannot be reached" in result.stderr
