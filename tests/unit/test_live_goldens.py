"""LIVE against recorded runs of the public implementation, and whether the comparison can say no.

Axis legend: recorded tensors [B, F, C, H, W], ours [B, C, F, H, W].
"""
import json
from math import prod
from pathlib import Path

import pytest
import torch
from forcing_pack.forcing_core.live import (
    Autoencoder,
    AutoencoderConfig,
    CameraPath,
    CameraTrack,
    LiveConfig,
    LiveDenoiser,
    LiveModel,
    PoseTrack,
    live_rollout,
)
from forcing_pack.forcing_core.live.checkpoint import expected_shapes
from forcing_pack.forcing_core.live.config import CONDITIONS
from forcing_pack.forcing_core.live.random import fill
from forcing_pack.forcing_core.live.rollout import live_levels
from forcing_pack.forcing_core.parity.case import RecordedNoise, read_case
from forcing_pack.forcing_core.schedule import Level

FOLDER = Path(__file__).resolve().parents[1] / "goldens" / "live_cases"
LIMITS = {"max_abs": 1e-4, "rel_l2": 2e-5}

pytestmark = pytest.mark.usefixtures("one_thread")


def case(name):
    found = read_case(FOLDER / f"{name}.safetensors")
    assert found.settings["tolerance"] == LIMITS and found.settings["commit"].startswith("20c82a9")
    return found


def config_of(settings):
    made = {key: tuple(value) if isinstance(value, list) else value for key, value in settings["network"].items()}
    return LiveConfig(**made, condition_dim=CONDITIONS[made["condition"]])


def filled(module, settings):
    """The module with the recorded weights, which are drawn anew."""
    assert {name: tuple(shape) for name, shape in settings["names"].items()} == {
        name: tuple(t.shape) for name, t in module.state_dict().items()} if "names" in settings else True
    net = fill(module, settings["seed"])
    total = float(sum(t.double().abs().sum() for t in net.state_dict().values()))
    assert total == pytest.approx(settings["checksum"], rel=1e-12), "the random generator draws other weights than it did"
    return net


def path_of(vectors):
    return CameraPath(vectors[:, :4].double(), vectors[:, 4:].unflatten(1, (3, 4)).double())


def gap(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def agrees(made, wanted):
    return gap(made, wanted) <= LIMITS["rel_l2"] and float((made - wanted).abs().max()) <= LIMITS["max_abs"]


@pytest.mark.parametrize("size", ["published", "narrow"])
def test_every_weight_of_the_public_definition_is_ours(size):
    """Names and shapes, nothing missing and nothing left over, at the published sizes too."""
    recorded = json.loads((FOLDER / "names.json").read_text(encoding="utf-8"))[size]
    config, vae = {"published": (LiveConfig(), AutoencoderConfig()),
                   "narrow": (LiveConfig(dim=64, heads=1), AutoencoderConfig(channels=32))}[size]
    for part, kind, sizes in (("network", LiveModel, config), ("autoencoder", Autoencoder, vae)):
        assert expected_shapes(kind, sizes) == {name: tuple(shape) for name, shape in recorded[part].items()}
    if size == "published":
        assert round(sum(map(prod, expected_shapes(LiveModel, config).values())) / 1e6) == 772


@pytest.mark.parametrize("condition", ["camera", "pose"])
def test_forward(condition):
    """A whole window of two videos whose frames have levels of their own."""
    found = case(f"forward_{condition}")
    net, t = filled(LiveModel(config_of(found.settings)), found.settings), found.tensors
    made = net(t["x"].transpose(1, 2), t["timesteps"], t["condition"]).transpose(1, 2)
    assert agrees(made, t["velocity"]), gap(made, t["velocity"])
    other = net(t["x"].transpose(1, 2), t["timesteps"], t["condition"].flip(1)).transpose(1, 2)
    assert not agrees(other, t["velocity"])


@pytest.mark.parametrize("condition", ["camera", "pose"])
def test_conditions(condition):
    found = case(f"forward_{condition}")
    for poses, wanted in zip(found.tensors["poses"], found.tensors["condition"]):
        path = path_of(poses)
        track = CameraTrack(path, tuple(wanted.shape[2:])) if condition == "camera" else PoseTrack(path)
        assert float((track.window(0, len(poses)) - wanted).abs().max()) <= 1e-6


def test_norms_are_rounded_as_in_public(monkeypatch):
    """Without the rounding to float16 the case fails, so it is seen."""
    found = case("forward_camera")
    net, t = filled(LiveModel(config_of(found.settings)), found.settings), found.tensors
    monkeypatch.setattr(torch.Tensor, "half", lambda x: x)
    made = net(t["x"].transpose(1, 2), t["timesteps"], t["condition"]).transpose(1, 2)
    assert LIMITS["rel_l2"] < gap(made, t["velocity"]) < 1e-3


def test_context_gives_the_numbers_of_the_whole_window():
    """Keys of earlier frames computed first, later frames behind them."""
    found = case("forward_camera")
    net, t = filled(LiveModel(config_of(found.settings)), found.settings), found.tensors
    x, wanted = t["x"].transpose(1, 2), t["velocity"].transpose(1, 2)
    for held in (1, 3, 4):
        context = net.remember(x[:, :, :held], t["timesteps"][:, :held], t["condition"][:, :held])
        made = net(x[:, :, held:], t["timesteps"][:, held:], t["condition"][:, held:], context)
        assert agrees(made, wanted[:, :, held:])


def test_autoencoder():
    found = case("autoencoder")
    settings, t = found.settings, found.tensors
    sizes = {**settings["autoencoder"], "multiples": tuple(settings["autoencoder"]["multiples"])}
    vae = filled(Autoencoder(AutoencoderConfig(**sizes, scale=settings["scale"])), settings)
    assert agrees(vae.encode(t["pictures"]), t["mean"])
    assert agrees(vae.encode(t["pictures"], t["noise"]), t["latents"]) and not agrees(t["mean"], t["latents"])
    assert agrees(vae.decode(t["latents"]), t["decoded"])


class Newest(RecordedNoise):
    """Of a context's noise as much as a shorter window asks for."""

    def renoise(self, block, step):
        return super().renoise(block, step)[:, :, -block.frames:]


@pytest.fixture(scope="module")
def recorded():
    found = case("rollout")
    return found, filled(LiveModel(config_of(found.settings)), found.settings)


def rolled(recorded, **changes):
    """(latents, denoiser) of the recorded run through the block rollout."""
    found, net = recorded
    settings = found.settings
    track = CameraTrack(path_of(found.tensors["poses"]), net.config.latent)
    levels = live_levels(settings["steps"])
    how = {"track": track, "context_level": levels[-1], "window": settings["window"], **changes}
    denoiser = LiveDenoiser(net, noise=Newest(found), **how)
    made = live_rollout(net, how["track"], found.given, settings["frames_generated"], RecordedNoise(found),
                        steps=settings["steps"], denoiser=denoiser)
    return torch.cat([x0 for _, x0 in made], dim=2).transpose(1, 2), denoiser


def test_rollout(recorded):
    """The public loop over eight frames with a window of five: sliding context, its noise, relative cameras and 18 steps of
    the solver, through the block rollout. One pass over the context stands for the reference's repeated ones."""
    found, _ = recorded
    made, denoiser = rolled(recorded)
    assert agrees(made, found.tensors["latents"]), gap(made, found.tensors["latents"])
    assert denoiser.forwards == found.settings["forwards_count"] == 18 * 6 and denoiser.encodings == 6
    assert {frames for frames, _ in found.forwards} == {3, 4, 5}  # the window fills and then slides
    assert {t for _, timesteps in found.forwards for t in timesteps if t < 200} == {149.0}


@pytest.mark.parametrize("change", [
    {"context_level": Level(149.0, 0.0)}, {"context_level": Level(0.0, live_levels()[-1].sigma)}, {"window": 4}],
    ids=["no noise", "another timestep", "shorter window"])
def test_a_rollout_with_another_context_fails(recorded, change):
    found, _ = recorded
    assert not agrees(rolled(recorded, **change)[0], found.tensors["latents"])


def test_a_rollout_under_cameras_of_the_whole_video_fails(recorded):
    """Conditions count from the window's first frame, not from the video's."""
    found, net = recorded
    track = CameraTrack(path_of(found.tensors["poses"]), net.config.latent)

    class Whole:
        kind, length = "camera", track.length

        def window(self, first, frames):
            return track.window(0, first + frames)[first:]

    made, _ = rolled(recorded, track=Whole())
    wanted = found.tensors["latents"]
    assert agrees(made[:, :3], wanted[:, :3]) and not agrees(made[:, 4:], wanted[:, 4:])


def test_nan_fails(recorded):
    found, _ = recorded
    latents = found.tensors["latents"].clone()
    latents[0, 0, 0, 0, 0] = torch.nan
    assert not agrees(latents, found.tensors["latents"]) and agrees(found.tensors["latents"], found.tensors["latents"])
