"""Recorded runs of the official pipelines, and whether the judge can say no."""
import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forcing_pack.forcing_core.cli import parity as cli
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.parity import load_network, read_case, run_case
from safetensors import safe_open
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[1] / "goldens"
CASES = sorted(path for path in FOLDER.glob("*.safetensors") if path.stem != "weights")
QUICK = "cfpp_1step"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def net():
    return load_network(FOLDER)


@pytest.fixture(scope="module")
def quick():
    return read_case(FOLDER / f"{QUICK}.safetensors")


def changed(case, tensors=None, **settings):
    return replace(case, tensors={**case.tensors, **(tensors or {})}, settings={**case.settings, **settings})


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(net, path):
    """The whole chain against the official code: latents within max abs 1e-4 and relative L2 2e-5, and no forward
    more or less than the reference's without the last clean pass."""
    report = run_case(read_case(path), net)
    assert report.passed, report


def test_every_system_is_there():
    """An empty folder, or one that lost a system, must not look like success."""
    papers = {"2506.08009", "2412.07772", "2602.02214", "2605.15141", "2509.22622", "2509.25161"}
    cases = [read_case(path).settings for path in CASES]
    assert len(cases) >= 18
    assert papers <= {paper for paper in papers for settings in cases if paper in str(settings)}
    assert {settings["rollout"] for settings in cases} >= {"block", "many_step", "rolling"}
    assert {settings["rope_positions"] for settings in cases} >= {"absolute", "relative"}
    assert any(settings["batch"] > 1 for settings in cases)


def test_the_limits_are_the_agreed_ones():
    """A case with a generous tolerance of its own would pass anything."""
    for path in CASES:
        assert read_case(path).settings["tolerance"] == {"max_abs": 1e-4, "rel_l2": 2e-5}


def test_perturbed_latents_fail(net, quick):
    """Either measure alone must be enough: one wrong number, or a small error everywhere."""
    wanted = quick.tensors["latents"]
    spike = wanted.clone()
    spike[0, -1, 0, 0, 0] += 2e-4
    one, everywhere = (run_case(changed(quick, {"latents": t}), net) for t in (spike, wanted + 6e-5))
    assert not one.passed and one.rel_l2 <= one.limit_rel
    assert not everywhere.passed and everywhere.max_abs <= everywhere.limit_abs
    assert run_case(quick, net).passed


def test_nan_fails(net, quick):
    """NaN > limit is false: a comparison written that way lets a broken run pass."""
    latents = quick.tensors["latents"].clone()
    latents[0, 0, 0, 0, 0] = torch.nan
    assert not run_case(changed(quick, {"latents": latents}), net).passed


def test_a_wrong_number_of_forwards_fails(net, quick):
    assert not run_case(replace(quick, forwards=quick.forwards[:-2]), net).passed


@pytest.mark.parametrize("name, settings", [
    ("sf_window6", {"window": -1}),
    ("sf_window6_sink1", {"sink": 0}),
    ("sf_context_noise", {"context_noise": 0}),
    ("longlive_switch", {"global_sink": False}),
    ("longlive_infinity_switch", {"rope_positions": "absolute"}),
    ("rolling_forcing", {"window": 18}),
    ("rolling_forcing", {"sink": 2}),
    ("cf_ar_teacher", {"guidance": 1.0}),
    ("cfpp_2step", {"first_block_timesteps": None, "first_block_sigmas": None}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_setting_fails(net, name, settings):
    """Negative controls: each setting of a case is really used."""
    assert not run_case(changed(read_case(FOLDER / f"{name}.safetensors"), **settings), net).rel_l2 <= 1e-3


@pytest.mark.parametrize("key", ["policy", "rollout", "prompt_axis", "rope_positions"])
def test_unknown_kinds_are_refused(net, quick, key):
    """Running an unknown case as something else would compare apples with pears, or pass by luck."""
    with pytest.raises(ForcingError, match="'telepathy'"):
        run_case(changed(quick, **{key: "telepathy"}), net)


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(ForcingError, match="not a golden case"):
        read_case(tmp_path / "plain.safetensors")
    with pytest.raises(ForcingError, match="cannot be read"):
        read_case(tmp_path / "broken.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A folder with the weights and one good case."""
    for name in ("weights", QUICK):
        shutil.copyfile(FOLDER / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    return tmp_path


def parity(folder, *names):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(folder), *(part for name in names for part in ("--case", name))]))


def perturb(folder, name, **settings):
    """Write a second case whose latents are slightly off, or whose settings are changed."""
    source = folder / f"{QUICK}.safetensors"
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = dict(read_case(source).tensors)
    if settings:
        for key, value in settings.items():
            metadata["settings"] = metadata["settings"].replace(f'"{key}": "window"', f'"{key}": "{value}"')
    else:
        tensors["latents"] = tensors["latents"] + 1e-3
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors", metadata)


def test_command_succeeds(folder, capsys):
    assert parity(folder) == 0
    assert "1 of 1 cases pass" in capsys.readouterr().out


def test_command_fails_and_names_the_case(folder, capsys):
    """Exit status 0 on failure would make every use in scripts worthless."""
    perturb(folder, "off")
    assert parity(folder) == 1
    out = capsys.readouterr().out
    assert "1 of 2 cases pass; failed: off" in out and "FAIL off" in out
    assert parity(folder, QUICK) == 0


def test_command_reports_an_unknown_policy_as_failure(folder, capsys):
    perturb(folder, "strange", policy="telepathy")
    assert parity(folder) == 1
    assert "'telepathy' is not known" in capsys.readouterr().out


def test_command_refuses_empty_folders(tmp_path, folder):
    """No case found must not be the same as all cases pass."""
    with pytest.raises(ForcingError, match="is not a folder"):
        parity(tmp_path / "nowhere")
    with pytest.raises(ForcingError, match="No case nothing"):
        parity(folder, "nothing")
    (folder / f"{QUICK}.safetensors").unlink()
    with pytest.raises(ForcingError, match="No case at all"):
        parity(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ForcingError, match="has no weights"):
        parity(folder)
