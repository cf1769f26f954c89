"""The demo writes the frames it promises, stops cleanly, and its parts can be replaced."""
import os
import signal
from argparse import ArgumentParser
from pathlib import Path

import av
import numpy
import pytest
import torch
from forcing_pack.forcing_core import demo
from forcing_pack.forcing_core.cli import demo as command
from forcing_pack.forcing_core.demo import DemoOptions, Projection, RandomSource, choose_preset, make, pixel_frames
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.wan import WanConfig
from PIL import Image

TINY = RandomSource(WanConfig(dim=64, ffn_dim=32, heads=2, layers=2, text_dim=8, text_len=4, freq_dim=32), (32, 16))


pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def arguments(*words):
    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.mark.parametrize("seconds, latent, pixel", [(0.01, 1, 1), (0.0625, 1, 1), (0.1, 2, 5), (1, 5, 17), (5, 21, 81),
                                                    (15, 61, 241)])
def test_lengths(seconds, latent, pixel):
    assert DemoOptions(seconds).frames == latent and pixel_frames(latent) == pixel


def test_the_preset_follows_the_length():
    assert choose_preset(DemoOptions(5)).name == "self-forcing"
    longer = choose_preset(DemoOptions(5.1))
    assert (longer.name, longer.window, longer.sink) == ("longlive", 12, 3)
    assert choose_preset(DemoOptions(300)).name == "longlive-infinity"
    assert choose_preset(DemoOptions(5, "causal-forcing-framewise")).block == 1


def test_a_video_and_a_contact_sheet(tmp_path):
    seen = []
    made = make(tmp_path / "a.mp4", DemoOptions(1), TINY, progress=seen.append)
    assert (made.frames, made.wanted, made.stopped, made.preset) == (17, 17, False, "self-forcing")
    video = pictures(made.video)
    assert len(video) == 17 and video[0].shape == (16, 32, 3)
    assert numpy.stack(video).std() > 10
    assert Image.open(made.sheet).width > 100
    assert [(p.block, p.blocks, p.frames) for p in seen] == [(1, 2, 9), (2, 2, 17)]
    assert seen[0].store_bytes == 2 * 5 * 2 * 64 * 2 * 4  # layers, frames, tokens, width, keys and values, float32
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "a.png"]


def test_the_seed_decides(tmp_path):
    first, again, other = (make(tmp_path / f"{n}.mp4", DemoOptions(0.3, seed=seed), TINY).video.read_bytes()
                           for n, seed in enumerate((1, 1, 2)))
    assert first == again != other


@pytest.mark.parametrize("preset", ["longlive", "longlive-infinity", "causal-forcing++-1step", "causvid-3step"])
def test_other_systems_run(tmp_path, preset):
    assert make(tmp_path / "a.mp4", DemoOptions(3.2, preset), TINY).frames == 53


def test_stopping_keeps_what_was_made(tmp_path):
    seen = []
    made = make(tmp_path / "a.mp4", DemoOptions(5), TINY, progress=seen.append, stop=lambda: len(seen) == 2)
    assert made.stopped and (made.frames, made.wanted) == (21, 81)
    assert len(pictures(made.video)) == 21 and made.sheet.exists()


def test_stopping_before_the_first_block_writes_nothing(tmp_path):
    made = make(tmp_path / "a.mp4", DemoOptions(1), TINY, stop=lambda: True)
    assert made.stopped and made.video is None and not os.listdir(tmp_path)
    assert command.summary(made) == ["Stopped before the first block was finished: nothing was written."]


def test_ctrl_c_leaves_a_playable_file_and_says_130(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "RandomSource", lambda: TINY)
    show = command.show
    monkeypatch.setattr(command, "show", lambda p: (show(p), p.block == 2 and os.kill(os.getpid(), signal.SIGINT)))
    before = signal.getsignal(signal.SIGINT)
    assert command.run(arguments("--out", tmp_path / "a.mp4")) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert len(pictures(tmp_path / "a.mp4")) == 21
    out, err = capsys.readouterr()
    assert out.startswith("Stopped after 21 of 81 frames.")
    assert err.splitlines()[1].startswith("block 2 of 7   21 frames")


def test_the_command_says_that_the_weights_are_random(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "RandomSource", lambda: TINY)
    assert command.run(arguments("--out", tmp_path / "a.mp4", "--seconds", 0.3, "--size", "48x32")) == 0
    assert "weights are random" in capsys.readouterr().out
    assert pictures(tmp_path / "a.mp4")[0].shape == (32, 48, 3)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e9])
def test_bad_seconds(seconds):
    with pytest.raises(ForcingError, match="more than 0 and at most 3600"):
        DemoOptions(seconds)


@pytest.mark.parametrize("text", ["256", "256x", "ax16", "1x2x3", "-16x16"])
def test_bad_size_texts(text):
    with pytest.raises(ForcingError, match="for example 256x144"):
        command.size(text)


def test_bad_sizes_places_and_presets(tmp_path):
    with pytest.raises(ForcingError, match="Use 256x144"):
        make(tmp_path / "a.mp4", DemoOptions(1, size=(250, 140)), TINY)
    with pytest.raises(ForcingError, match="end with .mp4"):
        make(tmp_path / "a.avi", DemoOptions(1), TINY)
    with pytest.raises(ForcingError, match="does not exist"):
        make(tmp_path / "nowhere" / "a.mp4", DemoOptions(1), TINY)
    with pytest.raises(ForcingError, match="cannot be run here"):
        make(tmp_path / "a.mp4", DemoOptions(1, "rolling-forcing"), TINY)
    assert not os.listdir(tmp_path)


def test_the_projection_is_orthonormal_and_does_not_look_ahead():
    decode, latents = Projection(16), torch.randn(1, 16, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(decode.basis.T @ decode.basis, torch.eye(3), atol=1e-6)
    parts = [*decode(latents[:, :, :2]), *decode(latents[:, :, 2:])]
    whole = list(Projection(16)(latents))
    assert len(whole) == 17 and whole[0].shape == (32, 48, 3) and whole[0].dtype == numpy.uint8
    assert all((a == b).all() for a, b in zip(parts, whole, strict=True))


def test_another_source_is_used(tmp_path):
    """A trained model brings its own network, size and decoder."""
    class Grey:
        notice, channels, size = "grey", 16, (64, 32)
        latent_size, denoiser = TINY.latent_size, TINY.denoiser

        def decoder(self):
            count = iter(range(10 ** 6))

            def decode(latents):
                for _ in range(latents.shape[2]):
                    yield from [numpy.full((32, 64, 3), 128, numpy.uint8)] * (4 if next(count) else 1)
            return decode

    made = make(Path(tmp_path / "a.mp4"), DemoOptions(0.5), Grey())
    assert made.frames == 9 and abs(int(pictures(made.video)[0].mean()) - 128) < 4
    assert demo.FPS == 16
