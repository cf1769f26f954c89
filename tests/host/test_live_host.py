"""The LIVE nodes inside ComfyUI, on a tiny generated checkpoint: what they make is what the core makes."""
import json
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.live import Autoencoder, AutoencoderConfig, CameraTrack, LiveConfig, LiveModel, live_rollout
from forcing_pack.forcing_core.live.camera_path import preset_path
from forcing_pack.forcing_core.live.random import fill, random_state
from forcing_pack.forcing_core.micro import bundle
from forcing_pack.forcing_core.micro import live as micro
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.nodes import live as nodes
from safetensors.torch import save_file

NAMES = Path(__file__).resolve().parents[1] / "goldens" / "live_cases" / "names.json"
FRAMES, STEPS, SEED = 4, 2, 9

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published checkpoint and its autoencoder in small, where the loader node looks for them."""
    place = tmp_path_factory.mktemp("live")
    names = json.loads(NAMES.read_text(encoding="utf-8"))["narrow"]
    state = {f"model._orig_mod.{name}": t for name, t in random_state(names["network"], 1).items()}
    torch.save({"state_dict": state, "epoch": 1}, place / "live-re10k.ckpt")
    torch.save({"model": random_state(names["autoencoder"], 2)}, place / "vae-kl16.ckpt")
    before = {kind: folder_paths.folder_names_and_paths[kind] for kind in ("diffusion_models", "vae")}
    for kind, (paths, extensions) in before.items():
        folder_paths.folder_names_and_paths[kind] = ([str(place), *paths], extensions)
    yield place
    folder_paths.folder_names_and_paths.update(before)


@pytest.fixture(scope="module")
def live(folder):
    return nodes.ForcingLiveCheckpoint.execute("live-re10k.ckpt", "vae-kl16.ckpt", "fp32").result[0]


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))


def camera(frames=FRAMES, move="forward"):
    return nodes.ForcingCameraPath.execute(frames, move, 0.2, "").result


def sample(live, image, track=None, window=32, start_frames=0, seed=SEED):
    return nodes.ForcingLiveSampler.execute(live, track or camera()[0], image, seed, STEPS, window, start_frames).result[0]


def test_loaded_models_are_those_of_the_files(live):
    assert live.config == LiveConfig(dim=64, heads=1) and live.dtype == torch.float32
    assert isinstance(live.autoencoder.model, Autoencoder)
    assert live.autoencoder.model.config == AutoencoderConfig(channels=32)


@torch.no_grad()
def test_frames_are_those_of_the_core(live, image):
    made = sample(live, image)
    assert made.shape == (FRAMES, 256, 256, 3) and 0 <= float(made.min()) and float(made.max()) <= 1
    net, vae = live.network.model.cpu(), live.autoencoder.model.cpu()
    start = nodes.start_pictures(image, live.config)
    assert torch.equal(made[:1], start)
    given = vae.encode((2 * start - 1).movedim(-1, 1)).movedim(0, 1)[None]
    track = CameraTrack(preset_path("forward", FRAMES, 0.2), (16, 16))
    noise = BlockNoise(SEED, (1, 16), (16, 16))
    latents = torch.cat([x0 for _, x0 in live_rollout(net, track, given, FRAMES - 1, noise, steps=STEPS)], dim=2)
    wanted = ((vae.decode(latents[0].movedim(0, 1)) + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert torch.allclose(made[1:], wanted, atol=1e-4)
    assert float((sample(live, image, camera(move="turn right")[0]) - made).abs().max()) > 1e-3


def test_paths_come_with_a_picture():
    path, picture = camera(9, "orbit right")
    assert path.length == 9 and picture.shape[0] == 1 and picture.shape[3] == 3
    keyed = nodes.ForcingCameraPath.execute(9, "keyframes", 1.0, "0: 0 0 0\n8: 0 0 1 10").result[0]
    assert torch.allclose(keyed.centres[-1], torch.tensor([0, 0, 1.0]).double())
    lines = "\n".join(" ".join(map(repr, row)) for row in keyed.vectors().tolist())
    assert torch.equal(nodes.ForcingCameraPath.execute(2, "pose file", 1.0, lines).result[0].poses, keyed.poses)


def test_the_micro_live_is_offered_where_it_was_trained(tmp_path, monkeypatch, image):
    monkeypatch.setattr(bundle, "WEIGHTS", tmp_path)
    assert micro.CHOICE not in nodes.checkpoints()
    told = {"forcing.training": json.dumps({"settings": {"dim": 32, "layers": 1}})}
    save_file(fill(LiveModel(micro.live_config(32, 1)), 1).state_dict(), tmp_path / f"micro_{micro.SHIPPED}.safetensors", told)
    assert nodes.checkpoints()[0] == micro.CHOICE
    live = nodes.ForcingLiveCheckpoint.execute(micro.CHOICE, nodes.INSIDE, "fp32").result[0]
    left, right = (nodes.ForcingActionTrack.execute(FRAMES, f"0: {key}").result[0] for key in ("left", "right"))
    made = sample(live, image, left)
    assert made.shape == (FRAMES, 64, 64, 3) and torch.equal(made[:1], nodes.start_pictures(image, live.config))
    assert float((sample(live, image, right) - made)[1:].abs().max()) > 1e-4


@pytest.mark.parametrize(("make", "fix"), [
    (lambda live, image: sample(live, image[:, :32]), "Crop it to that aspect"),
    (lambda live, image: sample(live, image, start_frames=2), "connect a longer clip"),
    (lambda live, image: sample(live, image.repeat(4, 1, 1, 1)), "nothing to make"),
    (lambda live, image: sample(live, image, nodes.ForcingActionTrack.execute(4, "0: forward").result[0]), "the kind camera"),
    (lambda live, image: nodes.ForcingLiveCheckpoint.execute("live-re10k.ckpt", nodes.INSIDE), "Give vae-kl16.ckpt too"),
    (lambda live, image: nodes.ForcingLiveCheckpoint.execute("live-re10k.ckpt", "live-re10k.ckpt"), "no autoencoder"),
    (lambda live, image: camera(4, "turn right") and nodes.ForcingCameraPath.execute(4, "back", 50.0, ""), "Scale the path")])
def test_bad_input_is_refused_with_a_fix(folder, live, image, make, fix, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: str(folder / name))
    with pytest.raises(ForcingError, match=fix):
        make(live, image)


def test_the_default_type_is_one_the_device_has():
    assert nodes.compute_dtype("default") == (torch.float16 if mm.should_use_fp16(mm.get_torch_device()) else torch.float32)
    assert nodes.compute_dtype("bf16") == torch.bfloat16
