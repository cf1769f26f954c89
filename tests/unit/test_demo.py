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
from forcing_pack.forcing_core.demo import DemoOptions, Projection, RandomSource, make, pixel_frames
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.micro import bundle, world
from forcing_pack.forcing_core.micro.source import PROMPT, MicroSource
from forcing_pack.forcing_core.wan import WanConfig
from forcing_testkit.micro import random_bundle, trained
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
    latent = {seconds: DemoOptions(seconds).frames for seconds in (5, 5.1, 300)}
    assert [TINY.usual_preset(n) for n in latent.values()] == ["self-forcing", "longlive", "longlive-infinity"]
    micro = MicroSource()
    assert [micro.usual_preset(n) for n in latent.values()] == ["micro", "micro-endless", "micro-endless"]
    assert MicroSource(network="teacher").usual_preset(21) == "causal-forcing-ar-teacher-chunkwise"


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
    monkeypatch.setattr(command, "source_of", lambda args: TINY)
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
    words = ("--out", tmp_path / "a.mp4", "--seconds", 0.3, "--size", "48x32", "--weights", "random")
    assert command.run(arguments(*words)) == 0
    assert "weights are random" in capsys.readouterr().out
    assert pictures(tmp_path / "a.mp4")[0].shape == (32, 48, 3)


# -- the micro model ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_bundle(tmp_path_factory.mktemp("micro"))


def test_the_micro_model_is_the_default(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(command, "MicroSource", lambda prompt, network: MicroSource(prompt, network, folder))
    assert command.run(arguments("--out", tmp_path / "a.mp4", "--seconds", 0.5, "--prompt", "a blue square")) == 0
    out = capsys.readouterr().out
    assert "(micro, everything)" in out and "coloured shapes" in out
    video = pictures(tmp_path / "a.mp4")
    assert len(video) == 9 and video[0].shape == (256, 256, 3)


def test_pixels_become_squares(folder):
    """Block by block as at once, and nothing between the colours of two neighbours."""
    latents = torch.randn(1, 16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    decode = MicroSource(folder=folder).decoder()
    shown = numpy.stack([*decode(latents[:, :, :3]), *decode(latents[:, :, 3:])])
    assert shown.shape == (13, 128, 128, 3)
    small = torch.from_numpy(shown[:, ::4, ::4].copy())
    assert (shown == small.repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()).all()
    wanted = bundle.vae(folder).decode(latents)[0].permute(1, 2, 3, 0).clamp(-1, 1)
    assert float((small.float() / 127.5 - 1 - wanted).abs().max()) < 1.5 / 127.5


def test_prompt_and_network_matter(folder):
    def first(prompt, network="student"):
        source = MicroSource(prompt, network, folder)
        run = demo._Run(DemoOptions(0.2), demo.get(source.usual_preset(2)), source, lambda: False, lambda _: None)
        return next(run.pictures())

    red = first("a red circle")
    assert (red == first("The RED circle!")).all()
    assert (red != first("a blue circle")).any() and (red != first("")).any()
    assert (red != first("a red circle", "consistency")).any()


def test_guidance_has_an_empty_second_prompt(folder):
    preset = demo.get("causal-forcing-ar-teacher-chunkwise")
    source = MicroSource(network="teacher", folder=folder)
    denoiser = source.denoiser(preset, demo.window_options(preset), 3, (8, 8))
    given = [condition.prompts[0] for condition in denoiser.conditions]
    assert denoiser.guidance == 3.0 and [text.shape for text in given] == [(1, 24, 4096)] * 2
    assert torch.equal(given[0], bundle.prompt([source.prompt])) and not given[1].any()


@pytest.mark.parametrize("words, message", [
    (("--prompt", "a red dog"), "does not know these words: dog. Use only a, on,"),
    (("--weights", "random", "--prompt", "a red circle"), "follow no prompt. Leave out --prompt"),
])
def test_bad_prompts_are_refused_before_the_run(tmp_path, words, message):
    with pytest.raises(ForcingError, match=message):
        command.run(arguments("--out", tmp_path / "a.mp4", *words))
    assert not os.listdir(tmp_path)


def test_missing_weights_are_named_before_the_run(tmp_path):
    with pytest.raises(ForcingError, match="micro_student.safetensors is missing. Install the package again"):
        make(tmp_path / "a.mp4", DemoOptions(1), MicroSource(folder=tmp_path))
    assert not os.listdir(tmp_path)


def red_on_dark(video):
    """(share of dark pixels in the video, shares of red ones in its frames) of uint8 [T, H, W, 3]."""
    rest = video[..., 1:].max(-1)
    return (video.max(-1) < 90).mean(), (video[..., 0] > rest.astype(int) + 60).mean((1, 2))


def test_the_trained_student_draws_what_it_is_asked_for(tmp_path, require):
    """By default a red circle on dark ground. A generated clip of that caption says what to expect."""
    require(trained(), "the trained micro weights are not in forcing_core/micro/weights",
            "run 'python -m forcing_core train micro --out forcing_core/micro/weights', or check out the whole repository")
    video = pictures(make(tmp_path / "a.mp4", DemoOptions(5)).video)
    dark, red = red_on_dark(numpy.stack([picture[::4, ::4] for picture in video]))
    assert len(video) == 81 and dark > 0.6
    assert (red > 0.02).mean() > 0.8 and red.max() < 0.4


def test_the_measure_of_the_trained_student():
    specs = world.specs(world.draw(0, 2000, split="all"))
    firsts = (spec for spec in specs if spec.background == spec.things[0].colour == spec.things[0].shape == 0)
    spec = next(spec for spec in firsts if world.caption(spec) == PROMPT)
    clip = world.render([spec], 17)[0].permute(1, 2, 3, 0).add(1).mul(127.5).byte().numpy()
    dark, red = red_on_dark(clip)
    assert dark > 0.6 and red.min() > 0.02 and red.max() < 0.4
    assert red_on_dark(clip[..., ::-1])[1].max() < 0.02


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
        make(tmp_path / "a.mp4", DemoOptions(1, "live"), TINY)
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
        usual_preset, latent_size, denoiser = TINY.usual_preset, TINY.latent_size, TINY.denoiser

        def decoder(self):
            count = iter(range(10 ** 6))

            def decode(latents):
                for _ in range(latents.shape[2]):
                    yield from [numpy.full((32, 64, 3), 128, numpy.uint8)] * (4 if next(count) else 1)
            return decode

    made = make(Path(tmp_path / "a.mp4"), DemoOptions(0.5), Grey())
    assert made.frames == 9 and abs(int(pictures(made.video)[0].mean()) - 128) < 4
    assert demo.FPS == 16
