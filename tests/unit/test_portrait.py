"""The micro portrait: it is trained on what inference shows it, its file holds all of it, and the evaluation runs it."""
import json
import math
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.__main__ import main
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.evaluate import portrait as evaluation
from forcing_pack.forcing_core.micro import face, portrait
from forcing_pack.forcing_core.micro.face_metrics import correlation
from forcing_pack.forcing_core.plan import REFERENCE
from forcing_pack.forcing_core.policies import ReferenceOptions, WindowOptions
from forcing_pack.forcing_core.schedule import CLEAN, Level
from forcing_pack.forcing_core.training import portrait as training
from forcing_pack.forcing_core.training.flow import x0_of
from forcing_pack.forcing_core.training.parallel import parallel_velocity
from forcing_pack.forcing_core.wan import TextState
from forcing_pack.forcing_core.wan.random import random_network
from forcing_testkit.forcing_corekit import gap
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS, FRAMES = 4, 13
SOME = training.Draw(3, False, False)


@pytest.fixture(scope="module")
def net():
    return portrait.silence(random_network(portrait.config(128, 2), 3))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a quick run by the command."""
    out = tmp_path_factory.mktemp("portrait")
    assert main(["train", "portrait", "--out", str(out), "--quick"]) == 0
    return out


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- what it is trained on ------------------------------------------------------------------------------------------

def test_sequence_by_hand():
    """Two blocks: references 0 and 1, clean frames 0..2 of the first block, noisy 0..3 and 3..6."""
    made = training.sequence(2, SOME)
    assert made.numbers == [0, 1, 2, 3, 3, 4, 5, 6]
    assert made.positions == [6, 9, 1, 2, 3, 1, 2, 3, 4, 4, 5, 6, 7]
    rows = ["1000000000000", "0100000000000", *["1011100000000"] * 3, *["1000011110000"] * 4, *["0111100001111"] * 4]
    assert made.mask.int().tolist() == [[int(c) for c in row] for row in rows]


def test_a_frame_that_is_alone_is_not_seen():
    made = training.sequence(2, SOME._replace(alone=True))
    tails = [8, 12]
    assert all(made.mask[tail].sum() > 1 and made.mask[:, tail].nonzero().flatten().tolist() == [tail] for tail in tails)


@pytest.mark.parametrize("ahead", [True, False], ids=["running ahead", "sink"])
def test_training_shows_what_inference_shows(net, ahead):
    """x0 of every noisy block in one forward is that of the rollout's forwards, through memory, knot and reference."""
    latents, drive, reference = draw(1, 16, FRAMES, 8, 8), draw(1, 16, FRAMES, 8, 8, seed=1), draw(1, 16, 1, 8, 8, seed=2)
    noise = draw(1, 16, FRAMES, 8, 8, seed=4)
    # lookahead and stride such that the reference is always three frames behind the block
    options = (ReferenceOptions(window=9, block=3, positions="relative", lookahead=5, stride=3) if ahead
               else WindowOptions(window=10, sink=1, block=3, positions="relative"))
    given, level = (0 if ahead else 1), Level(700.0, 0.7)
    target = portrait.driven(portrait.Portrait(net, None), options, FRAMES + given, portrait.Drive(drive, -given), ahead=1)
    target(reference, (CLEAN,), REFERENCE if ahead else 0, "clean")
    lay = training.sequence(BLOCKS, SOME if ahead else SOME._replace(ahead=None))
    noisy, begin = noise[:, :, lay.numbers], BLOCKS + 9
    x = torch.cat([reference.expand(-1, -1, BLOCKS, -1, -1), latents[:, :, :9], noisy], 2)
    driving = torch.cat([drive[:, :, :1].expand(-1, -1, BLOCKS, -1, -1), drive[:, :, :9], drive[:, :, lay.numbers]], 2)
    timesteps = torch.cat([torch.zeros(1, begin), torch.full((1, 16), 700.0)], 1)
    text = TextState(torch.zeros(1, 1, portrait.TEXT_DIM))
    velocity = parallel_velocity(net, torch.cat([x, driving], 1), timesteps, text, lay.mask, positions=lay.positions,
                                 ops=training.SILENT)
    whole = x0_of(noisy, velocity[:, :, begin:], torch.full((1, 16), 0.7))
    for b in range(BLOCKS):
        first = 3 * b
        made = target(noise[:, :, first:first + 4], (level,) * 4, first + given, "noisy")
        assert gap(made, whole[:, :, 4 * b:4 * b + 4]) < 1e-4, b
        if b < BLOCKS - 1:
            target(latents[:, :, first:first + 3], (CLEAN,) * 3, first + given, "clean")


def test_given_frames_and_hidden_ones_do_not_count(net):
    """A wrong answer for them is no error: where the truth of the last block's knot changes, the loss does not."""
    settings = replace(training.QUICK, blocks=BLOCKS, disturbed=0.0)
    latents, drive, reference = draw(1, 16, FRAMES, 8, 8), draw(1, 16, FRAMES, 8, 8, seed=1), draw(1, 16, 1, 8, 8, seed=2)
    other = latents.clone()
    other[:, :, 12] += 1

    def loss(clip, **change):
        generator = torch.Generator().manual_seed(1)
        return training.loss(net, clip, drive, reference, settings, SOME._replace(**change), generator).item()

    assert loss(other, alone=True) == loss(latents, alone=True)
    assert abs(loss(other) - loss(latents)) > 1e-3
    assert loss(latents, given=True) != loss(latents)


def test_disturbed_histories():
    clean = torch.zeros(64, 16, 4, 8, 8)
    made = training.disturbed(clean, 0.3, torch.Generator().manual_seed(1))
    assert 0.15 < made.std() < 0.35 and torch.equal(training.disturbed(clean, 0.0, torch.Generator()), clean)
    shift = made.mean((2, 3, 4))
    assert 0.1 < shift.std() < 0.3  # of whole channels, which noise alone would average away


def test_another_device_is_refused():
    with pytest.raises(ForcingError, match="Leave out --device"):
        training.PortraitTrainer(training.QUICK, "cuda")


# -- the file -------------------------------------------------------------------------------------------------------

def test_file_holds_the_network_and_the_code(net, trained, tmp_path):
    loaded = portrait.load(trained / portrait.FILE)
    report = json.loads((trained / "portrait_report.json").read_text())
    assert report["steps"] == training.QUICK.steps and report["file_bytes"] == (trained / portrait.FILE).stat().st_size
    video = next(training.clips(9, 2, 9))[0]
    assert (loaded.code.decode(loaded.code.encode(video)) - video).square().mean() < 0.02
    file = tmp_path / portrait.FILE
    save_file({k: v.contiguous() for k, v in portrait.state_dict(net, loaded.code).items()}, file)
    again = portrait.load(file).net.state_dict()
    assert again.keys() == net.state_dict().keys()
    assert all(torch.equal(again[name], value.to(torch.bfloat16).float()) for name, value in net.state_dict().items())
    assert file.stat().st_size < 1_260_000


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ForcingError, match="train portrait"):
        portrait.load(tmp_path / portrait.FILE)
    save_file({"a": torch.zeros(2)}, tmp_path / portrait.FILE)
    with pytest.raises(ForcingError, match="no micro portrait"):
        portrait.load(tmp_path / portrait.FILE)


def test_driving_latents_of_a_forward():
    drive = portrait.Drive(torch.arange(5.0).view(1, 1, 5, 1, 1), -1)
    assert drive.of(0, 3).flatten().tolist() == [0, 0, 1] and drive.of(4, 4).flatten().tolist() == [3, 4, 4, 4]
    assert drive.of(REFERENCE, 1).flatten().tolist() == [0]
    assert replace(drive, first=2).of(REFERENCE, 1).flatten().tolist() == [0]


def test_a_voice_opens_the_mouth_as_it_was_made_to():
    opening = face.track(3, 1, 96)[0, 3]
    heard = portrait.loudness(portrait.voice(opening), 16000, 112)
    assert heard.shape == (112,) and heard[96:].eq(0).all() and 0 <= heard.min() and heard.max() == 1
    assert correlation(heard[None, :96], opening[None]).item() > 0.98
    stereo = portrait.voice(opening, 48000).expand(2, -1)
    assert correlation(portrait.loudness(stereo, 48000, 96)[None], opening[None]).item() > 0.98
    assert portrait.loudness(torch.zeros(1, 16000), 16000, 16).eq(0).all()
    with pytest.raises(ForcingError, match="longer"):
        portrait.loudness(torch.zeros(1, 10), 16000, 4)


# -- the evaluation -------------------------------------------------------------------------------------------------

def test_every_way_is_measured(trained, tmp_path, capsys):
    command = ["evaluate", "--portrait", "--seconds", "6", "--captions", "1", "--weights", str(trained)]
    assert main([*command, "--json", str(tmp_path / "a.json"), "--out", str(tmp_path / "plots")]) == 0
    told = json.loads((tmp_path / "a.json").read_text())
    assert [row["settings"] for row in told["rows"]] == [evaluation.RENDERED, *evaluation.WAYS]
    assert {len(row["curve"]) for row in told["rows"]} == {math.ceil(told["seconds"])}
    rendered, *made = told["rows"]
    assert rendered["mouth"] > 0.8 and all(row["identity_first"] > 2 * rendered["identity_first"] for row in made)
    assert len({row["identity_first"] for row in made}) == len(evaluation.WAYS)  # no two ways made the same video
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"portrait.png", "portrait-sheet.png"}
    assert "no: mouth correlates" in capsys.readouterr().out


def test_seams_of_clips_are_those_of_the_clips():
    clips, blocks = evaluation.WAYS["clips"], [3] * 16
    assert evaluation.seams(clips, blocks) == [21, 18, 9] and evaluation.seams(evaluation.WAYS["knot"], blocks) == blocks


@pytest.mark.parametrize("more", [["--settings", "long"], ["--ablations"], ["--seconds", "5", "10"], ["--seconds", "0.5"]])
def test_what_it_cannot_do_is_refused(more, trained, capsys):
    assert main(["evaluate", "--portrait", "--weights", str(trained), *more]) == 1
    assert capsys.readouterr().err.startswith("error: ")
