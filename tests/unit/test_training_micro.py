"""The stages of the micro model after its teacher, and the recipe that runs all of them."""
import argparse
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.cli import train as command
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.micro import bundle, world
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.training import distil, dit, network, recipe, robust, student, vae
from forcing_pack.forcing_core.training.flow import add_noise
from forcing_pack.forcing_core.training.history import Curve
from forcing_pack.forcing_core.training.loop import train
from forcing_pack.forcing_core.training.plot import BOTTOM, COLOURS, LEFT, RIGHT, TOP, picture, ticks
from forcing_pack.forcing_core.wan import TextState

pytestmark = pytest.mark.usefixtures("one_thread")

CONSISTENCY = replace(distil.QUICK, lengths=(9,), muon_lr=0.01)
STUDENT = replace(student.QUICK, lengths=(9,), real=0.0)
LONG = replace(student.LONG_QUICK, frames=12, lengths=(9,))
RESAMPLED = replace(robust.QUICK, lengths=(33,))
STAGES = {"resampled": (robust.ResampledTrainer, RESAMPLED), "consistency": (distil.ConsistencyTrainer, CONSISTENCY),
          "student": (student.StudentTrainer, STUDENT),
          "student, with true clips": (student.StudentTrainer, replace(STUDENT, real=1.0)),
          "long": (student.LongTrainer, LONG)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The file of a teacher of one layer, some steps old."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("teacher")
    trainer = dit.DitTrainer(replace(dit.QUICK, layers=1, lengths=(9,), steps=30))
    assert train(trainer, out / "teacher.checkpoint.pt")
    network.finish(trainer, out, {})
    return out / "micro_teacher.safetensors"


def begun(name, teacher, **changes):
    kind, settings = STAGES[name]
    return distil.begin(kind, replace(settings, **changes), teacher, teacher)


def run(trainer, steps):
    losses = []
    for _ in range(steps):
        losses.append({name: float(value) for name, value in trainer.step().items()})
        trainer.advance(1.0)
    return losses


def same(one, other):
    return all(torch.equal(a, b) for name in one.nets
               for a, b in zip(one.nets[name].parameters(), other.nets[name].parameters()))


# --- the stages

@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_is_the_same_run(name, teacher, tmp_path):
    """Through the file: the checkpoint holds everything, the frozen networks too."""
    whole, first = begun(name, teacher), begun(name, teacher)
    wanted = run(whole, 4)
    run(first, 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = type(first).from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run(again, 2) == wanted[2:]
    assert same(whole, again)
    assert all(torch.equal(a, b) for a, b in zip(whole.average.weights, again.average.weights))
    assert {name: curve.state_dict() for name, curve in whole.history.items()} == {
        name: curve.state_dict() for name, curve in again.history.items()}


@pytest.mark.parametrize("name", STAGES)
def test_only_what_is_trained_changes(name, teacher):
    trainer = begun(name, teacher)
    before = {name: {key: value.clone() for key, value in net.state_dict().items()} for name, net in trainer.nets.items()}
    run(trainer, 2)
    changed = {name for name, net in trainer.nets.items()
               if any(not torch.equal(before[name][key], value) for key, value in net.state_dict().items())}
    assert changed == set(trainer.nets) - {"teacher"}
    if "mean" in trainer.nets:
        average = trainer.finished().state_dict()
        assert all(torch.equal(average[key], value) for key, value in trainer.nets["mean"].state_dict().items())


def test_consistency_is_learnt(teacher):
    """On one batch and one noise, from a student that is no longer consistent."""
    trainer = begun("consistency", teacher, code_seed=0)
    with torch.no_grad():
        trainer.net.head.head.weight.mul_(0.5)
    trainer.clock = replace(trainer.clock, total=101)
    losses = [float(trainer.step()["loss"]) for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_critic_learns_the_students_clips(teacher):
    """The student stands still, and with the clock its clips, noise and levels do."""
    trainer = begun("student", teacher, ahead=10 ** 6, muon_lr=0.02)
    trainer.clock = replace(trainer.clock, total=101)
    losses = [trainer.step() for _ in range(12)]
    assert all("student" not in step for step in losses)
    assert losses[-1]["critic"] < 0.8 * losses[0]["critic"]


def test_the_student_moves_to_where_the_teacher_has_more_mass(teacher):
    """A critic that is the teacher leaves guidance alone to pull; without guidance nothing pulls."""
    still = begun("student", teacher, ahead=0, guidance=0.0).step()
    pulled = begun("student", teacher, ahead=0, guidance=0.5).step()
    assert float(still["student"]) == 0 < float(pulled["student"])


def test_the_student_trains_every_few_steps_after_the_critic_is_ahead(teacher):
    losses = run(begun("student", teacher, ahead=2, critic_steps=3, steps=20), 7)
    assert [number for number, step in enumerate(losses) if "student" in step] == [2, 5]
    assert all("critic" in step for step in losses)


def test_a_forced_score_is_given_the_clean_blocks_before(teacher):
    """A block's score depends on the history before it, and not on its own clean frames or later ones."""
    net = bundle.read(teacher)
    clip, noise = torch.randn(2, 1, 16, 6, 8, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    sigmas = torch.full((1, 6), 0.7)
    text = TextState(bundle.prompt(["a red circle moving left on a dark background"]))

    def score(history):
        return student.forced_score(net, history)(add_noise(clip, noise, sigmas), 1000 * sigmas, text)

    first, second = clip.clone(), clip.clone()
    first[:, :, :3] += 1
    second[:, :, 3:] += 1
    with torch.no_grad():
        usual, other = score(clip), score(first)
        assert torch.equal(usual[:, :, :3], other[:, :, :3]) and not torch.equal(usual[:, :, 3:], other[:, :, 3:])
        assert torch.equal(usual, score(second))


def test_the_first_frame_of_a_later_window_is_an_image(teacher):
    """At frame 0 the linear code means one picture, elsewhere four."""
    trainer = begun("long", teacher, frames=12)
    video = world.batch(3, 2, 13)[0]
    latents = trainer.code.encode(video)
    image = student.as_image(trainer.code, latents[:, :, 3:4])
    shown = trainer.code.decode(image)
    assert shown.shape[2] == 1
    assert (shown - video[:, :, -1:]).square().mean() < 2 * (trainer.code.decode(latents) - video).square().mean()
    clips = []
    for total in range(8):
        trainer.clock = replace(trainer.clock, total=total)
        clip, counts = trainer.rollout(trainer.captions(), trainer.generator())
        assert clip.shape == (2, 16, 6, 8, 8) and counts[1:].all()
        clips.append(bool(counts[0]))
    assert {True, False} == set(clips)  # windows at the video's start and later ones


def test_the_steps_are_those_of_the_family():
    trainer_levels = levels(student.STEP_LIST, student.SHIFT)
    assert [round(level.timestep, 2) for level in trainer_levels] == [1000.0, 937.5, 833.33, 625.0]


# --- what a stage starts from

def test_size_and_code_come_from_the_teacher(teacher):
    trainer = begun("student", teacher, seed=5, layers=6, code_clips=256)
    assert (trainer.settings.layers, trainer.settings.code_clips, trainer.settings.code_seed) == (1, 16, 0)
    assert torch.equal(trainer.code.rest.mean, begun("consistency", teacher).code.rest.mean)


def test_weights_that_do_not_go_together_are_refused(teacher, tmp_path):
    with pytest.raises(ForcingError, match="Train that stage first"):
        distil.begin(distil.ConsistencyTrainer, CONSISTENCY, tmp_path / "none.safetensors", teacher)
    other = dit.DitTrainer(replace(dit.QUICK, layers=1, seed=1), code=begun("consistency", teacher).code)
    network.finish(other, tmp_path, {})
    with pytest.raises(ForcingError, match="different sizes, worlds or linear codes"):
        distil.begin(distil.ConsistencyTrainer, CONSISTENCY, tmp_path / "micro_teacher.safetensors", teacher)


# --- losses and their picture

def test_a_curve_keeps_its_shape_at_any_length():
    curve = Curve()
    for step in range(1000):
        curve.add(3 * step, torch.tensor(float(step)))
    points = curve.points()
    assert 128 <= len(points) < 256 and curve.stride == 4
    assert all(loss == pytest.approx(step / 3, abs=0.01) for step, loss in points)
    assert Curve(**curve.state_dict()).points() == points


def test_ticks_lie_inside():
    assert ticks(0.03, 0.6) == pytest.approx([0.05, 0.1, 0.2, 0.5])
    assert ticks(0.21, 0.22) == [0.21, 0.22]
    assert ticks(1e-4, 1.0) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_the_picture_shows_every_stage():
    """A line is where the losses are: it starts at the left on top and ends at the right at the bottom."""
    one = picture({"vae": {"loss": [[1, 1.0], [100, 0.1]]}})
    assert one.size == (360, 240)
    line = [(x, y) for x in range(360) for y in range(TOP, 240) if one.getpixel((x, y)) == COLOURS[0]]
    assert abs(line[0][0] - LEFT) < 6 and abs(line[0][1] - TOP) < 4
    assert abs(line[-1][0] - (360 - RIGHT)) < 4 and abs(line[-1][1] - (240 - BOTTOM)) < 4
    five = picture({name: {"loss": [[1, 1.0], [100, 0.1]]} for name in list(recipe.STAGES)[:5]} | {"none": {}})
    assert five.size == (3 * 360, 2 * 240)
    assert picture({"flat": {"loss": [[1, 0.5], [2, 0.5]]}}).size == (360, 240)
    with pytest.raises(ForcingError, match="no losses"):
        picture({})


# --- the recipe

@pytest.fixture
def tiny(monkeypatch):
    """Quick runs made quicker, and the VAE's left to its own tests."""
    monkeypatch.setattr(dit, "QUICK", replace(dit.QUICK, layers=1, lengths=(9,), steps=3))
    monkeypatch.setattr(distil, "QUICK", replace(CONSISTENCY, steps=3))
    monkeypatch.setattr(student, "QUICK", replace(STUDENT, steps=3))
    monkeypatch.setattr(student, "LONG_QUICK", replace(LONG, steps=3))
    monkeypatch.setattr(vae, "QUICK", replace(vae.QUICK, dim=4, code_steps=1, joint_steps=1, lengths=(5,), held_out=1,
                                              held_out_frames=5))


def arguments(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*words])


def test_all_stages_run_stop_and_go_on(tiny, tmp_path, monkeypatch, capsys):
    """Stopped after every step, the run ends with the weights of one that was never stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command.run(arguments("micro", "--out", str(whole), "--quick")) == 0
    assert "losses of all stages" in capsys.readouterr().out
    quick = recipe.Request(parts, quick=True)
    calls = 0
    while not recipe.run_all(replace(quick, resume=calls > 0), lambda text: None, stop=lambda: True):
        calls += 1
    assert calls >= 8
    for name in bundle.NETWORKS:
        one, other = bundle.network(name, whole), bundle.network(name, parts)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters())), name
        assert bundle.training(name, whole)["steps"] == 3
    assert bundle.vae(whole).dim == 4
    losses = recipe.losses(whole)
    assert {name: {key: len(points) for key, points in of.items()} for name, of in losses.items()} == {
        "vae": {"loss": 2}, "teacher": {"loss": 3}, "consistency": {"loss": 3}, "student": {"critic": 3, "student": 1},
        "long": {"critic": 3, "student": 1}}
    assert losses == recipe.losses(parts) and (whole / "loss.png").stat().st_size > 1000


def test_a_run_is_only_gone_on_with_when_asked(tmp_path):
    plan = recipe.plan(recipe.Request(tmp_path, minutes=30, given={"seed": 4}))
    assert plan == recipe.Plan(30, False, 4)
    with pytest.raises(ForcingError, match="--resume"):
        recipe.plan(recipe.Request(tmp_path))
    with pytest.raises(ForcingError, match="seed 4"):
        recipe.plan(recipe.Request(tmp_path, resume=True, given={"seed": 5}))
    assert recipe.plan(recipe.Request(tmp_path, resume=True)) == plan
    assert recipe.plan(recipe.Request(tmp_path, resume=True, minutes=60)).minutes == 60
    assert recipe.plan(recipe.Request(tmp_path / ".." / tmp_path.name, resume=True)).minutes == 60


def test_the_time_is_shared_out():
    assert sum(row.share for row in recipe.STAGES.values()) == pytest.approx(1)


def test_one_stage_alone_with_settings_of_its_own(tiny, teacher, tmp_path, capsys):
    words = ("consistency", "--out", str(tmp_path), "--quick", "--from", str(teacher), "--set", "teacher_steps=6")
    assert command.run(arguments(*words, "--steps", "2")) == 0
    assert "after 2 steps" in capsys.readouterr().out
    settings = bundle.training("consistency", tmp_path)["settings"]
    assert (settings["teacher_steps"], settings["layers"]) == (6, 1)
    with pytest.raises(ForcingError, match="no setting nonsense"):
        command.run(arguments(*words[:-1], "nonsense=1"))
    with pytest.raises(ForcingError, match="teacher_steps 6, not 7"):
        command.run(arguments(*words[:-1], "teacher_steps=7", "--resume"))
    with pytest.raises(SystemExit):
        arguments(*words[:-1], "teacher_steps")
