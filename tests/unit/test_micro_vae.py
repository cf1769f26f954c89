"""The micro VAE: its format, its streaming decoder, the linear code it starts from, and its training."""
import argparse
import json
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.cli import train as command
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.micro import world
from forcing_pack.forcing_core.micro.code import cells, fit, uncells
from forcing_pack.forcing_core.micro.vae import DecodeStream, MicroVAE, load_vae, vae_bytes
from forcing_pack.forcing_core.training.loop import train
from forcing_pack.forcing_core.training.muon import MuonAdamW, is_matrix
from forcing_pack.forcing_core.training.pixels import ErrorSums, foreground, pixel_loss
from forcing_pack.forcing_core.training.state import Average, Clock, Phase
from forcing_pack.forcing_core.training.vae import CHECKPOINT, QUICK, VaeTrainer
from safetensors import safe_open

TINY = replace(QUICK, dim=4, batch=1, lengths=(5,), code_clips=8, code_steps=2, joint_steps=2, precision="float32",
               held_out=1, held_out_frames=5)


pytestmark = pytest.mark.usefixtures("one_thread")


def official_shapes(dim):
    """Names and shapes of a Wan 2.1 VAE of some width, written out from the published checkpoint's list."""
    shapes = {}

    def conv(name, c_out, c_in, *kernel):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (c_out, c_in, *kernel), (c_out,)

    def block(name, c_in, c_out):
        shapes[f"{name}.residual.0.gamma"], shapes[f"{name}.residual.3.gamma"] = (c_in, 1, 1, 1), (c_out, 1, 1, 1)
        conv(f"{name}.residual.2", c_out, c_in, 3, 3, 3)
        conv(f"{name}.residual.6", c_out, c_out, 3, 3, 3)
        if c_in != c_out:
            conv(f"{name}.shortcut", c_out, c_in, 1, 1, 1)

    def ends(part, c_in, width, head_in, c_out):
        conv(f"{part}.conv1", *((dim if part == "encoder" else width), c_in, 3, 3, 3))
        block(f"{part}.middle.0", width, width)
        shapes[f"{part}.middle.1.norm.gamma"] = (width, 1, 1)
        conv(f"{part}.middle.1.to_qkv", 3 * width, width, 1, 1)
        conv(f"{part}.middle.1.proj", width, width, 1, 1)
        block(f"{part}.middle.2", width, width)
        shapes[f"{part}.head.0.gamma"] = (head_in, 1, 1, 1)
        conv(f"{part}.head.2", c_out, head_in, 3, 3, 3)

    ends("encoder", 3, 4 * dim, 4 * dim, 32)
    ends("decoder", 16, 4 * dim, dim, 3)
    conv("conv1", 32, 32, 1, 1, 1)
    conv("conv2", 16, 16, 1, 1, 1)
    widths = {0: (1, 1), 1: (1, 1), 3: (1, 2), 4: (2, 2), 6: (2, 4), 7: (4, 4), 9: (4, 4), 10: (4, 4)}
    for place, (a, b) in widths.items():
        block(f"encoder.downsamples.{place}", a * dim, b * dim)
    for place, width in ((2, 1), (5, 2), (8, 4)):
        conv(f"encoder.downsamples.{place}.resample.1", width * dim, width * dim, 3, 3)
    for place, width in ((5, 2), (8, 4)):
        conv(f"encoder.downsamples.{place}.time_conv", width * dim, width * dim, 3, 1, 1)
    widths = {0: (4, 4), 1: (4, 4), 2: (4, 4), 4: (2, 4), 5: (4, 4), 6: (4, 4), 8: (2, 2), 9: (2, 2), 10: (2, 2),
              12: (1, 1), 13: (1, 1), 14: (1, 1)}
    for place, (a, b) in widths.items():
        block(f"decoder.upsamples.{place}", a * dim, b * dim)
    for place, width in ((3, 4), (7, 4), (11, 2)):
        conv(f"decoder.upsamples.{place}.resample.1", width * dim // 2, width * dim, 3, 3)
    for place, width in ((3, 4), (7, 4)):
        conv(f"decoder.upsamples.{place}.time_conv", 2 * width * dim, width * dim, 3, 1, 1)
    return shapes


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(3)
    return MicroVAE(4).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 16, 7, 1, 2, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def clips():
    return world.batch(5, 4, 9)[0]


# --- format

@pytest.mark.parametrize("dim", [8, 12])
def test_names_and_shapes_are_the_official_ones(dim):
    assert {name: tuple(p.shape) for name, p in MicroVAE(dim).state_dict().items()} == official_shapes(dim)


def test_official_width_has_the_official_number_of_parameters():
    """The published VAE of width 96 has 126.9 million parameters."""
    assert sum(torch.Size(shape).numel() for shape in official_shapes(96).values()) == 126_892_531


@pytest.mark.parametrize("frames, latent_frames", [(1, 1), (5, 2), (9, 3)])
def test_one_frame_and_then_four_a_latent_frame(vae, frames, latent_frames):
    video = torch.rand(1, 3, frames, 8, 16) * 2 - 1
    code = vae.encode(video)
    assert code.shape == (1, 16, latent_frames, 1, 2)
    assert vae.decode(code).shape == video.shape


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 12, 16), (1, 3, 5, 16, 20)])
def test_sizes_that_fill_no_cells_are_refused(vae, shape):
    with pytest.raises(ForcingError, match="multiples of 8"):
        vae.encode(torch.zeros(shape))


def test_rescale_changes_the_latents_and_not_the_picture(latents):
    torch.manual_seed(6)
    vae = MicroVAE(4).requires_grad_(False)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    code, made = vae.encode(video), vae.decode(latents)
    for _ in range(2):  # folding twice must compose
        mean, std = torch.randn(16), torch.rand(16) + 0.5
        vae.rescale(mean, std)
        code, latents = ((x - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1) for x in (code, latents))
    assert torch.allclose(vae.encode(video), code, atol=1e-4)
    assert torch.allclose(vae.decode(latents), made, atol=1e-4)


def test_file_keeps_weights_in_half_precision_and_metadata(vae, tmp_path):
    path = tmp_path / "vae.safetensors"
    path.write_bytes(vae_bytes(vae, {"made": "here"}))
    loaded = load_vae(path)
    assert all(torch.equal(a.half().float(), b)
               for a, b in zip(vae.state_dict().values(), loaded.state_dict().values()))
    with safe_open(path, "pt") as file:
        assert file.metadata()["made"] == "here"


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(ForcingError, match="no file"):
        load_vae(tmp_path / "absent.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ForcingError, match="no readable"):
        load_vae(tmp_path / "torn.safetensors")
    with pytest.raises(ForcingError, match="multiple of 4"):
        MicroVAE(6)


# --- causality and streaming

def test_no_frame_depends_on_later_latents(vae, latents):
    before = vae.decode(latents)
    changed = latents.clone()
    changed[:, :, 4:] += 1
    after = vae.decode(changed)
    assert torch.equal(before[:, :, :13], after[:, :, :13])  # latents 0 to 3 are frames 0 to 12
    assert not torch.allclose(before[:, :, 13:17], after[:, :, 13:17])


def test_no_latent_depends_on_later_frames(vae):
    video = torch.rand(1, 3, 13, 8, 8) * 2 - 1
    changed = video.clone()
    changed[:, :, 9:] = 0
    assert torch.equal(vae.encode(video)[:, :, :3], vae.encode(changed)[:, :, :3])


@pytest.mark.parametrize("blocks", [[1] * 7, [1, 2, 2, 2], [2, 2, 2, 1], [3, 3, 1], [1, 3, 1, 2], [7]])
def test_streaming_equals_decoding_at_once(vae, latents, blocks):
    stream = DecodeStream(vae)
    parts = [stream.push(part) for part in latents.split(blocks, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(blocks)]
    assert torch.allclose(torch.cat(parts, dim=2), vae.decode(latents), atol=1e-5)


def test_streams_of_one_network_do_not_meet(vae, latents):
    one, two = DecodeStream(vae), DecodeStream(vae)
    first = one.push(latents[:, :, :2])
    two.push(-latents[:, :, :3])
    both = torch.cat([first, one.push(latents[:, :, 2:4])], dim=2)
    assert torch.allclose(both, vae.decode(latents[:, :, :4]), atol=1e-5)


# --- the linear code

def test_cells_and_back(clips):
    assert cells(clips[:, :, 1:], 4).shape == (4, 2, 8, 8, 768)
    assert torch.equal(uncells(cells(clips[:, :, 1:], 4), 4), clips[:, :, 1:])


def test_a_cell_holds_one_square_of_pixels():
    video = torch.zeros(1, 3, 4, 16, 24)
    video[..., 8:16, 16:24] = 1
    assert cells(video, 4).sum(-1).tolist() == [[[[0, 0, 0], [0, 0, 768]]]]


def test_code_has_unit_scale_and_keeps_the_picture(clips):
    code = fit([clips])
    latents = code.encode(clips)
    rest = latents[:, :, 1:].transpose(0, 1).flatten(1)
    assert latents.shape == (4, 16, 3, 8, 8)
    assert torch.allclose(rest.mean(1), torch.zeros(16), atol=1e-3)
    # variance 1 on average, and of each number as the square root of what its direction has in the pictures
    in_pictures = code.rest.read.norm(dim=0).square() * rest.var(1)
    wanted = in_pictures.sqrt() / in_pictures.sqrt().mean()
    assert torch.allclose(rest.var(1), wanted, rtol=3e-2) and float(wanted.max() / wanted.min()) > 10
    assert ErrorSums().add(code.decode(latents), clips, foreground(clips)).psnr()[0] > 20


def test_a_picture_has_about_the_code_of_a_video_that_stands_still(clips):
    code = fit([clips])
    still = code.encode(clips[:, :, :1].expand(-1, -1, 5, -1, -1))
    first, rest = still[:, :, 0], still[:, :, 1]
    assert (first - rest).square().mean() < 0.5 * (first.square().mean() + rest.square().mean()) / 2


def test_code_needs_clips_with_motion(clips):
    with pytest.raises(ForcingError, match="no motion"):
        fit([clips[:, :, :1]])
    with pytest.raises(ForcingError, match="no clips"):
        fit([])


# --- losses

def test_foreground_is_what_differs_from_the_background():
    video = torch.full((1, 3, 5, 16, 16), -0.5)
    video[:, 1, :, 4:8, 4:8] = 0.5
    mask = foreground(video)
    assert mask.sum() == 5 * 16 and mask[0, 0, 2, 5, 5]


def test_pixel_loss_by_hand():
    video = torch.zeros(1, 1, 1, 1, 2)
    made, mask = torch.tensor([2.0, 1.0]).view_as(video), torch.tensor([True, False]).view_as(video)
    # (3 (4 + 0.5 * 2) + 1 (1 + 0.5)) / 2 pixels / mean weight 2
    assert pixel_loss(made, video, mask, weight=3.0, l1=0.5).item() == pytest.approx(16.5 / 4)
    assert ErrorSums().add(made, video, mask).psnr() == pytest.approx((2.0412, 0.0), abs=1e-3)


# --- optimiser and run state

def test_gains_and_biases_are_no_matrices():
    vae = MicroVAE(4)
    assert is_matrix(vae.conv2.weight) and not is_matrix(vae.conv2.bias)
    assert not is_matrix(vae.encoder.head[0].gamma)


def test_muon_turns_a_convolution_by_its_flattened_step():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3, 3))
    flat = torch.nn.Parameter(weight.detach().clone().flatten(1))
    grad = torch.randn_like(weight)
    weight.grad, flat.grad = grad.clone(), grad.flatten(1)
    MuonAdamW([weight], muon_lr=0.02, weight_decay=0.01).step(0.5)
    torch.optim.Muon([flat], lr=0.01, momentum=0.95, weight_decay=0.01).step()
    assert torch.equal(weight.detach().flatten(1), flat.detach())


def test_average_follows_the_weights():
    layer = torch.nn.Linear(1, 1, bias=False)
    average = Average(layer, 0.5)
    start = layer.weight.item()
    layer.weight.data += 1
    average.update(layer, step=100)
    average.copy_to(layer)
    assert layer.weight.item() == pytest.approx(start + 0.5)


def test_clock_counts_steps_or_minutes():
    phases = (Phase("a", 4, 0.75, 1, 0), Phase("b", 2, 0.25, 1, 0))
    clock = Clock().after_step(3.0)
    assert clock.progress(phases, None) == 0.25
    assert clock.progress(phases, 0.1) == pytest.approx(3 / 4.5)
    assert clock.seconds_left(phases, None) == pytest.approx(15)
    assert clock.seconds_left(phases, 0.1) == pytest.approx(3)
    assert clock.next_phase() == Clock(phase=1, total=1)


# --- training

@pytest.mark.parametrize("phase", [0, 1])
def test_training_lowers_the_loss_of_a_fixed_batch(phase, monkeypatch):
    trainer = VaeTrainer(replace(TINY, noise=0.0))
    video = world.batch(9, 1, 5)[0]
    monkeypatch.setattr(trainer, "batch", lambda: video)
    trainer.clock = Clock(phase=phase, total=50)
    losses = [trainer.step()[0].item() for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def test_encoder_and_decoder_learn_apart_and_then_together():
    """Together, every other step: in between the decoder reads the code itself."""
    trainer = VaeTrainer(TINY)
    grads = {}
    for phase, total in ((0, 1), (1, 2), (1, 3)):
        trainer.clock = Clock(phase=phase, total=total)
        _, made, _ = trainer.losses(trainer.batch())
        made.square().mean().backward()
        grads[phase, total] = trainer.vae.encoder.conv1.weight.grad
    assert grads[0, 1] is None and grads[1, 2] is None and grads[1, 3] is not None


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = VaeTrainer(TINY)
    assert train(whole, tmp_path / "whole.pt")
    steps = iter([False, False, True])
    first = VaeTrainer(TINY)
    assert not train(first, tmp_path / CHECKPOINT, stop=lambda: next(steps))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    second = VaeTrainer.from_state_dict(state)
    assert second.clock.total == 3 and train(second, tmp_path / CHECKPOINT)
    assert all(torch.equal(a, b) for a, b in zip(whole.vae.parameters(), second.vae.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(whole.average.weights, second.average.weights))


# --- the command

@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Parsed arguments of `train vae --quick --out tmp_path ...`, made tiny."""
    monkeypatch.setattr(command.vae, "QUICK", TINY)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return lambda *more: parser.parse_args(["vae", "--quick", "--out", str(tmp_path), *more])


def test_command_writes_weights_and_report_and_resumes(arguments, tmp_path, capsys):
    assert command.run(arguments()) == 0
    report = json.loads((tmp_path / "vae_report.json").read_text())
    assert report["steps"] == 4 and report["held_out"]["psnr"] > 0
    with safe_open(tmp_path / "micro_vae.safetensors", "pt") as file:
        training = json.loads(file.metadata()["forcing.training"])
    assert training["settings"]["dim"] == 4 and training["steps"] == 4
    assert load_vae(tmp_path / "micro_vae.safetensors").dim == 4
    assert "s/step" in capsys.readouterr().err
    with pytest.raises(ForcingError, match="--resume"):
        command.run(arguments())
    with pytest.raises(ForcingError, match="dim 4, not 8"):
        command.run(arguments("--resume", "--dim", "8"))
    assert command.run(arguments("--resume")) == 0
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf"])
def test_a_senseless_time_limit_is_refused(arguments, text, capsys):
    with pytest.raises(SystemExit):
        arguments("--minutes", text)


def test_torn_checkpoint_is_named(arguments, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"torn")
    with pytest.raises(ForcingError, match="no checkpoint"):
        command.run(arguments("--resume"))
