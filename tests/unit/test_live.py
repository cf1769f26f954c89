"""LIVE's denoiser under the rollout, its solver, its files, and what it refuses."""
import argparse
import functools
import json
import math
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forcing_pack.forcing_core.checkpoints import write_safetensors
from forcing_pack.forcing_core.cli import convert as cli
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.live import (
    ActionTrack,
    AutoencoderConfig,
    CameraTrack,
    LiveConfig,
    LiveDenoiser,
    LiveModel,
    convert,
    live_rollout,
    load,
)
from forcing_pack.forcing_core.live.camera_path import preset_path
from forcing_pack.forcing_core.live.random import fill, random_state
from forcing_pack.forcing_core.live.rollout import context_noise, live_levels
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.rollout import RolloutState
from forcing_pack.forcing_core.saved import Saved, split
from forcing_pack.forcing_core.schedule import CLEAN, Level
from forcing_pack.forcing_core.solvers import SOLVERS, dpm
from safetensors import safe_open

NAMES = Path(__file__).resolve().parents[1] / "goldens" / "live_cases" / "names.json"
SMALL = LiveConfig(dim=64, heads=2, layers=2, latent=(4, 4), window=4, rope=(4, 14, 14))
NOISE = BlockNoise(3, (1, 16), (4, 4))
FRAMES, GIVEN = 6, 1

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def net():
    return fill(LiveModel(SMALL), 1)


@pytest.fixture(scope="module")
def given():
    return torch.randn(1, 16, GIVEN, 4, 4, generator=torch.Generator().manual_seed(2))


def track(frames=GIVEN + FRAMES):
    return CameraTrack(preset_path("orbit right", frames), SMALL.latent)


def video(net, given, frames=FRAMES, **how):
    path, noise = how.pop("track", track(given.shape[2] + frames)), how.pop("noise", NOISE)
    made = live_rollout(net, path, given, frames, noise, steps=4, **how)
    return torch.cat([x0 for _, x0 in made], dim=2)


# -- solver and levels

def test_levels_are_the_published_grid():
    levels = live_levels()
    assert len(levels) == 18 and (levels[0].timestep, levels[-1].timestep) == (999.0, 149.0)
    for k, level in enumerate(levels):
        u = 0.999 * (1 - k / 18)
        assert level.sigma == pytest.approx(3 * u / (1 + 2 * u), abs=1e-6)
        assert level.timestep == math.floor(1000 * level.sigma)
    with pytest.raises(ForcingError, match="at least 2"):
        live_levels(1)


def test_the_noise_of_a_context_is_the_networks_own_where_it_has_one(net, given, monkeypatch):
    """Else that of the last step, as published: fewer steps then mean a noisier context."""
    assert context_noise(SMALL, 6) == live_levels(6)[-1] and live_levels(6)[-1].sigma > 2 * live_levels()[-1].sigma
    published, said = video(net, given), video(net, given, context_level=Level(150.0, 0.15))
    assert torch.equal(published, video(net, given, context_level=live_levels(4)[-1])) and not torch.equal(published, said)
    monkeypatch.setattr(net, "config", replace(SMALL, context=0.15))
    assert torch.equal(video(net, given), said)


def test_solver_is_exact_for_a_known_x0_and_of_second_order():
    """One point as data: any number of steps lands on it. A Gaussian: the error falls with the square of the steps."""
    target, x = torch.tensor([0.3, -1.2]).double(), torch.tensor([0.9, 0.4]).double()
    assert torch.allclose(dpm(x, live_levels(3), lambda y, level: target, None), target)

    def gaussian(y, level):  # E[x0 | y] for data of variance 1/4
        a, s = 1 - level.sigma, level.sigma
        return y * a * 0.25 / (a * a * 0.25 + s * s)

    def error(steps):
        return float((dpm(x, live_levels(steps), gaussian, None) - dpm(x, live_levels(1280), gaussian, None)).abs().max())
    assert 2.5 < error(20) / error(40) < 6 and SOLVERS["dpm"] is dpm


# -- the denoiser under the block rollout

def test_a_longer_video_begins_like_a_shorter_one(net, given):
    path = track()
    short = live_rollout(net, CameraTrack(preset_path("orbit right", 7), SMALL.latent), given, 6, NOISE, steps=4)
    first = next(iter(short))[1]
    assert torch.equal(video(net, given, track=path)[:, :, :1], first)


def test_a_camera_that_moves_elsewhere_makes_another_video(net, given):
    other = CameraTrack(preset_path("back", GIVEN + FRAMES), SMALL.latent)
    made = video(net, given)
    assert made.shape == (1, 16, FRAMES, 4, 4) and torch.isfinite(made).all()
    assert float((made - video(net, given, track=other)).abs().max()) > 1e-3


def test_only_the_window_is_seen(net, given):
    """With a window of 4, frame 6 hangs on frames 3 to 5: another start frame changes it through those alone."""
    def denoised(start):
        denoiser = LiveDenoiser(net, track(), NOISE, live_levels(4)[-1], 4)
        latents = torch.randn(1, 16, 6, 4, 4, generator=torch.Generator().manual_seed(5))
        latents[:, :, :3] = start
        for first in range(6):
            denoiser(latents[:, :, first:first + 1], (CLEAN,), first, "clean")
        return denoiser(NOISE.initial(_block(6)), (live_levels(4)[0],), 6, "noisy")
    assert torch.equal(denoised(0.0), denoised(1.0))


def _block(frame):
    from forcing_pack.forcing_core.plan import Block
    return Block(frame, frame, 1)


def test_batches_are_videos_of_their_own(net, given):
    both = torch.cat([given, -given])
    two = video(net, both, noise=_Twice())
    assert torch.allclose(two[:1], video(net, given), atol=1e-4) and float((two[0] - two[1]).abs().max()) > 1e-3


class _Twice:
    """The same noise for two videos."""

    def initial(self, block):
        return NOISE.initial(block).repeat(2, 1, 1, 1, 1)

    def renoise(self, block, step):
        return NOISE.renoise(block, step).repeat(2, 1, 1, 1, 1)


def test_blocks_of_two_frames(net, given):
    assert video(net, given, block=2).shape == (1, 16, FRAMES, 4, 4)
    with pytest.raises(ForcingError, match="blocks of 1 frame"):
        video(net, given, block=4)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_saved_run_goes_on_bit_for_bit(net, given, after):
    whole, state = video(net, given), RolloutState()
    denoiser = LiveDenoiser(net, track(), NOISE, live_levels(4)[-1], 4)
    running = live_rollout(net, track(), given, FRAMES, NOISE, steps=4, denoiser=denoiser, resume=state)
    for _ in range(after):
        next(running)
    plain, tensors = split({"memory": denoiser.state(), "rollout": state.state()})
    saved = Saved(json.loads(json.dumps(plain)), tensors)
    fresh = LiveDenoiser(net, track(), NOISE, live_levels(4)[-1], 4)
    fresh.load(saved.part("memory"))
    again = RolloutState.load(saved.part("rollout"), (1, 16, 4, 4), "cpu")
    rest = [x0 for _, x0 in live_rollout(net, track(), given, FRAMES, NOISE, steps=4, denoiser=fresh, resume=again)]
    assert torch.equal(torch.cat(rest, dim=2), whole[:, :, after:])


def test_a_flush_leaves_the_newest_frames(net):
    latents = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    denoiser = LiveDenoiser(net, track(), NOISE, live_levels(4)[-1], 4)
    denoiser(latents, (CLEAN,) * 3, 0, "clean")
    before = denoiser(NOISE.initial(_block(3)), (live_levels(4)[0],), 3, "noisy")
    denoiser.flush(1)
    after = denoiser(NOISE.initial(_block(3)), (live_levels(4)[0],), 3, "noisy")
    assert not torch.allclose(before, after, atol=1e-4) and denoiser.encodings == 2
    denoiser.forget()
    assert denoiser(NOISE.initial(_block(3)), (live_levels(4)[0],), 3, "noisy").shape == (1, 16, 1, 4, 4)
    assert denoiser.encodings == 2  # nothing left to encode


BAD = {
    "no start": (lambda net, given: video(net, given[:, :, :0]), "at least one start picture"),
    "short track": (lambda net, given: video(net, given, track=track(4)), "Make the track 7 frames long"),
    "actions": (lambda net, given: video(net, given, track=ActionTrack(torch.zeros(7, 25))), "a track of the kind camera"),
    "long window": (lambda net, given: video(net, given, window=5), "Use 2 to 4"),
    "aspect": (lambda net, given: video(net, given.repeat(1, 1, 1, 2, 1)), "pictures of 64x64 pixels"),
    "no context": (lambda net, given: LiveDenoiser(net, track(), NOISE, CLEAN, 4)(given, (CLEAN,), 3, "noisy"), "Give 3 start"),
    "prompts": (lambda net, given: LiveDenoiser(net, track(), NOISE, CLEAN, 4).replace_text(1), "knows no prompts"),
    "blend": (lambda net, given: LiveDenoiser(net, track(), NOISE, CLEAN, 4).blend_text(0, 1, 0.5), "knows no prompts"),
    "recache": (lambda net, given: LiveDenoiser(net, track(), NOISE, CLEAN, 4)(given, (CLEAN,), 0, "recache"), "no prompts"),
    "jump": (lambda net, given: LiveDenoiser(net, track(), NOISE, CLEAN, 4).jump(3, 42), "flush or cut"),
    "frames": (lambda net, given: net(given.repeat(1, 1, 5, 1, 1), torch.zeros(1, 5), torch.zeros(1, 5, 6, 4, 4)), "at most 4"),
    "condition": (lambda net, given: net(given, torch.zeros(1, 1), torch.zeros(1, 1, 25)), "camera track"),
    "heads": (lambda net, given: LiveConfig(dim=100, heads=2), "add up to a head"),
    "latent": (lambda net, given: LiveConfig(latent=(15, 16)), "divisible by 32"),
    "kind": (lambda net, given: LiveConfig(condition="smell"), "Use one of camera"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_fix(net, given, name):
    make, fix = BAD[name]
    with pytest.raises(ForcingError, match=fix):
        make(net, given)


# -- files

class _Foreign:
    """An object of somebody's package; it would make a folder when it is opened."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@functools.cache
def narrow():
    """Weights under the recorded public names, at small width."""
    recorded = json.loads(NAMES.read_text(encoding="utf-8"))["narrow"]
    return random_state(recorded["network"], 1), random_state(recorded["autoencoder"], 2)


def lightning(folder, compiled=False, tokenizer=False, masks=(2048, 2048), **changed):
    """A file in the published container: weights among everything else that a training run leaves. changed: names of the
    network with other tensors, None for a missing one."""
    network, vae = narrow()
    network = {name: t for name, t in {**network, **changed}.items() if t is not None}
    mark = "_orig_mod." if compiled else ""
    state = {f"model.{mark}{name}": t for name, t in network.items()}
    if tokenizer:
        state |= {f"tokenizer.{mark}{name}": t for name, t in vae.items()}
    state |= {f"tokenizer.{mark}perceptual_loss.lin0.weight": torch.ones(3), f"tokenizer.{mark}metrics_fid.x": torch.ones(1)}
    state |= {"train_metrics.fid.inception.w": torch.ones(2), "val_metrics.metrics_v_dpm.lpips.net.w": torch.ones(2)}
    if masks:
        state[f"model.{mark}attn_mask_sdpa"] = torch.ones(1, 1, dtype=torch.bool).expand(masks)
        state[f"model.{mark}attn_mask_cycle_forcing_sdpa_p2"] = torch.ones(8, 8, dtype=torch.bool)
    path = folder / "live-re10k.ckpt"
    torch.save({"epoch": 3, "global_step": 20500, "pytorch-lightning_version": "2.5.2", "state_dict": state,
                "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}], "callbacks": {"x": _Foreign(folder / "ran")},
                "hyper_parameters": {"network_config": _Foreign(folder / "ran")}}, path)
    return path


def vae_file(folder, key="model"):
    path = folder / "vae-kl16.ckpt"
    torch.save({key: narrow()[1]} if key else narrow()[1], path)
    return path


@pytest.mark.parametrize("compiled", [False, True])
def test_every_tensor_of_a_published_file_maps(tmp_path, compiled):
    """Nothing is missing or left over, foreign objects do not run, and the weights arrive."""
    loaded = load(lightning(tmp_path, compiled, tokenizer=True))
    network, vae = narrow()
    assert loaded.network.keys() == network.keys() and loaded.autoencoder.keys() == vae.keys()
    net, autoencoder = loaded.build()
    assert all(torch.equal(t, network[name]) for name, t in net.state_dict().items())
    assert all(torch.equal(t, vae[name]) for name, t in autoencoder.state_dict().items())
    assert loaded.config == LiveConfig(dim=64, heads=1) and loaded.autoencoder_config == AutoencoderConfig(channels=32)
    assert not (tmp_path / "ran").exists()
    assert "RealEstate10K" in loaded.report[0] and "256x256" in loaded.report[0]


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_an_autoencoder_of_its_own(tmp_path, key):
    path = lightning(tmp_path)
    alone = load(path)
    assert alone.autoencoder is None
    with pytest.raises(ForcingError, match="Give vae-kl16.ckpt too"):
        alone.build()
    assert load(path, vae_file(tmp_path, key)).autoencoder.keys() == narrow()[1].keys()


def test_conversion_and_back(tmp_path, capsys):
    """bf16 for the network, float32 for the autoencoder; through the command too, which knows the file by its name."""
    target = tmp_path / "live.safetensors"
    source = lightning(tmp_path)
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert cli.run(parser.parse_args([str(source), str(target), "--vae", str(vae_file(tmp_path))])) == 0
    assert "Wrote" in capsys.readouterr().out
    with safe_open(target, "pt") as file:
        assert file.metadata()["forcing.preset"] == "live"
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}
    assert {d for name, d in kinds.items() if name.startswith("model.")} == {torch.bfloat16}
    assert {d for name, d in kinds.items() if name.startswith("tokenizer.")} == {torch.float32}
    network, vae = narrow()
    back = load(target)
    assert all(torch.equal(back.network[name], t.bfloat16()) for name, t in network.items())
    assert all(torch.equal(back.autoencoder[name], t) for name, t in vae.items())
    with pytest.raises(ForcingError, match="exists already"):
        convert(source, target)
    with pytest.raises(ForcingError, match="no --lora"):
        cli.run(parser.parse_args([str(source), str(tmp_path / "x.safetensors"), "--causal-ar"]))


@pytest.mark.parametrize(("make", "fix"), [
    (lambda d: load(lightning(d, **{"blocks.3.attention.wo.weight": None})), r"1 missing \(blocks.3.attention.wo.weight"),
    (lambda d: load(lightning(d, surplus=torch.ones(2))), r"1 not expected \(surplus"),
    (lambda d: load(lightning(d, **{"final_layer.linear.bias": torch.ones(3)})), "of another shape"),
    (lambda d: load(lightning(d, masks=(2688, 2688))), "trained on another data set"),
    (lambda d: load(lightning(d, masks=(7040, 7040))), r"another data set \(UE Engine\)"),
    (lambda d: load(lightning(d, masks=None, **{
        "c_embedder.proj.weight": None, "c_embedder.proj.bias": None, "c_embedder.mlp.0.weight": torch.ones(64, 25),
        "c_embedder.mlp.0.bias": torch.ones(64), "c_embedder.mlp.2.weight": torch.ones(64, 64),
        "c_embedder.mlp.2.bias": torch.ones(64)})), r"another data set \(Minecraft\): it takes action conditions of 25"),
    (lambda d: load(lightning(d), dataset="re20k"), "Use one of re10k"),
    (lambda d: load(vae_file(d)), "Give it as the autoencoder"),
    (lambda d: load(lightning(d), lightning(d)), "is no autoencoder of LIVE"),
    (lambda d: load(d / "nothing.ckpt"), "There is no file"),
    (lambda d: convert(lightning(d), d / "x.safetensors"), r"\(--vae\)"),
    (lambda d: convert(lightning(d), d / "x.pt"), "ends with .safetensors"),
    (lambda d: convert(lightning(d), d / "x.safetensors", dtype="fp8"), "bf16, fp16, fp32")],
    ids=["missing", "surplus", "misshaped", "minecraft masks", "ue masks", "actions", "data set", "vae alone", "no vae",
         "nothing", "vae wanted", "name", "dtype"])
def test_files_that_do_not_fit_are_refused_with_a_fix(tmp_path, make, fix):
    with pytest.raises(ForcingError, match=fix):
        make(tmp_path)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = lightning(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ForcingError, match="damaged"):
        load(path)
    program = tmp_path / "program.ckpt"
    with zipfile.ZipFile(program, "w") as archive:
        archive.writestr("program/constants.pkl", b"")
    with pytest.raises(ForcingError, match="compiled program"):
        load(program)
    other = tmp_path / "other.safetensors"
    write_safetensors({"patch_embedding.weight": torch.ones(2, 2)}, other)
    with pytest.raises(ForcingError, match="no checkpoint of LIVE"):
        load(other)
    plain = tmp_path / "old.ckpt"
    plain.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ForcingError, match="zip format"):
        load(plain)


def test_an_object_in_a_weights_place_is_not_taken(tmp_path):
    path = tmp_path / "live.ckpt"
    torch.save({"state_dict": {"model.x_embedder.proj.weight": _Foreign(tmp_path / "ran")}}, path)
    with pytest.raises(ForcingError, match="no checkpoint of LIVE"):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_the_row_of_the_table():
    row = get("live")
    assert not row.available and "LIVE nodes" in row.runs and row.licence == "Apache-2.0"
    assert (row.window, row.block, row.step_count, row.shift) == (32, 1, 18, 3.0)
    assert [file.path for file in row.files] == ["live-re10k.ckpt", "vae-kl16.ckpt"]
