"""Stage "teacher" of the micro model: the loss falls, a run can be resumed, and what it writes is a Wan checkpoint."""
import argparse
import json
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core import checkpoints
from forcing_pack.forcing_core.cli import train as command
from forcing_pack.forcing_core.micro import world
from forcing_pack.forcing_core.micro.bundle import TEXT_DIM
from forcing_pack.forcing_core.training import dit, network
from forcing_pack.forcing_core.training.pixels import foreground
from safetensors import safe_open

SMALL = replace(dit.QUICK, layers=1, lengths=(9,), steps=8)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def code():
    return dit.DitTrainer(SMALL).code


def run(trainer, steps):
    losses = []
    for _ in range(steps):
        losses.append(float(trainer.step()["loss"]))
        trainer.advance(1.0)
    return losses


def test_the_loss_falls(code):
    """On one batch: the clock stands still, so every step draws the same clips and the same noise."""
    trainer = dit.DitTrainer(replace(SMALL, empty=0.5), code=code)
    trainer.clock = replace(trainer.clock, total=101)
    losses = [float(trainer.step()["loss"]) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_resumed_run_is_the_same_run(code):
    whole, first = dit.DitTrainer(SMALL, code=code), dit.DitTrainer(SMALL, code=code)
    wanted = run(whole, 6)
    run(first, 3)
    again = dit.DitTrainer.from_state_dict(first.state_dict())
    assert run(again, 3) == wanted[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), again.net.parameters()))


def test_the_foreground_share_of_a_cell():
    video = world.batch(3, 2, 9)[0]
    shares = network.per_cell(foreground(video))
    assert shares.shape == (2, 1, 3, 8, 8) and 0 < float(shares.mean()) < 0.3
    assert torch.isclose(shares[:, :, 0].mean(), foreground(video)[:, :, 0].float().mean())


def test_the_command_writes_a_checkpoint_of_the_family(tmp_path, capsys):
    """The loader must take it for what it is: a complete Wan 2.1 text-to-video network."""
    out = tmp_path / "run"
    arguments = ["teacher", "--out", str(out), "--quick", "--layers", "1", "--steps", "3"]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(arguments)) == 0
    loaded = checkpoints.load(out / "micro_teacher.safetensors")
    assert (loaded.config.dim, loaded.config.num_layers, loaded.config.text_dim) == (128, 1, TEXT_DIM)
    with safe_open(out / "micro_teacher.safetensors", "pt") as file:
        assert json.loads(file.metadata()["forcing.training"])["steps"] == 3
    assert "after 3 steps" in capsys.readouterr().out
