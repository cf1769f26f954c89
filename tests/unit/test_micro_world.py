"""The generated world: seeds, time, bounces, captions, faces."""
import time

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.micro import captions, face, motion, world
from forcing_pack.forcing_core.micro.names import DIRECTIONS
from forcing_pack.forcing_core.micro.shapes import coverage, half_extents

LEVELS = list(world.LEVELS)


def centres(a, frames):
    half = half_extents(a["shape"], a["radius"])
    start = torch.stack([a["x"], a["y"]], -1)
    return half, motion.centres(a["law"], start, a["heading"], a["speed"], half, torch.arange(frames))


@pytest.mark.parametrize("level", LEVELS)
def test_a_seed_is_a_clip(level):
    one, again, other = world.sample(3, level), world.sample(3, level), world.sample(4, level)
    assert one == again and hash(one) == hash(again) and one != other
    assert torch.equal(world.render([one], 5), world.render([again], 5))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    world.batch(1, 2, frames=2), face.identities(1, 2), face.track(1, 2, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_render_shape_range_and_colours():
    video = world.render([world.sample(s) for s in range(3)], 9)
    assert video.shape == (3, 3, 9, 64, 64) and video.dtype == torch.float32
    assert -1 <= video.min() < -0.5 and 0.5 < video.max() <= 1
    assert world.render([world.sample(0)], 2, size=32).shape == (1, 3, 2, 32, 32)


@pytest.mark.parametrize("level", ["plain", "full"])
def test_a_longer_clip_has_the_shorter_as_prefix(level):
    """And a part that starts later is a part of it: long videos are rendered piece by piece."""
    clips = [world.sample(s, level) for s in range(2)]
    long = world.render(clips, 200)
    assert torch.allclose(world.render(clips, 81), long[:, :, :81], atol=1e-5)
    assert torch.allclose(world.render(clips, 20, start=150), long[:, :, 150:170], atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_things_stay_inside_and_never_jump(level):
    """Ten minutes: bounces for ever, at no more than twice the mean speed and never through a wall."""
    half, centre = centres(world.draw(5, 40, level, "all"), 9600)
    half = half.unsqueeze(2)
    assert (centre >= half - 1e-6).all() and (centre <= 64 - half + 1e-6).all()
    assert (centre[:, :, 1:] - centre[:, :, :-1]).norm(dim=-1).max() < 2 * 1.4 * 1.1


@pytest.mark.parametrize("law", range(4))
def test_things_start_in_their_captioned_direction(law):
    a = world.draw(6, 200, world.Level(laws=(world.LAWS[law],)), "all")
    _, centre = centres(a, 9)
    table = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float64)
    assert torch.equal(((centre[:, 0, 8] - centre[:, 0, 0]) @ table.T).argmax(1), a["direction"][:, 0])


@pytest.mark.parametrize("shape, area", [(0, torch.pi * 100), (1, 18.0 ** 2), (2, 23 * 23 * 0.75 ** 0.5 / 2)])
def test_coverage_is_the_area(shape, area):
    """Anti-aliased wherever the centre lies between pixels: the covered area does not flicker."""
    code = torch.tensor([shape])
    half = half_extents(code, torch.tensor([10.0], dtype=torch.float64))
    centre = torch.stack([30 + torch.linspace(0, 1, 9), 31 + torch.linspace(0, 2, 9)], -1).double()[None]
    covered = coverage(code, half, centre, 64).sum((-2, -1))
    assert torch.allclose(covered, torch.full_like(covered, float(area)), rtol=0.01)


def test_the_first_thing_hides_the_second():
    front = world.Thing(1, 0, -1, 0, 0, 9.0, 1.0, 0.0, 30.0, 30.0)
    back = world.Thing(1, 2, -1, 0, 0, 9.0, 1.0, 0.0, 33.0, 30.0)
    pixel = world.render([world.ClipSpec((front, back), 0)], 1)[0, :, 0, 30, 31]
    assert torch.allclose(pixel, world.render([world.ClipSpec((front,), 0)], 1)[0, :, 0, 30, 31])
    assert world.caption(world.ClipSpec((front, back), 0)) == (
        "a red square moving left in front of a blue square moving left on a dark background")


def test_captions_are_read_back():
    for level in LEVELS:
        for spec in world.specs(world.draw(8, 30, level, "all")):
            said = captions.parse(world.caption(spec))
            assert said.background == spec.background
            assert said.things == tuple(captions.Noun(t.colour, t.shape, t.size, t.law, t.direction)
                                        for t in spec.things)


def test_captions_by_hand():
    assert captions.parse("Purple ball") == captions.Caption((captions.Noun(4, 0),))
    assert captions.parse("a big green box moving upwards on white.").background == 1
    with pytest.raises(ForcingError, match="colours red, green"):
        captions.parse("a cat on a mat")


def test_longest_caption_fits():
    things = (world.Thing(0, 0, 0, 0, 4, 9.0, 1.0, 0.0, 30.0, 30.0), world.Thing(1, 1, 1, 1, 5, 9.0, 1.0, 0.0, 9.0, 9.0))
    text = world.caption(world.ClipSpec(things, 2))
    assert text == ("a small red circle moving up left in front of a big green square speeding up right "
                    "on a gray background")
    assert len(text.split()) <= captions.LENGTH


@pytest.mark.parametrize("level", ["plain", "full"])
def test_test_captions_are_never_trained_on(level):
    """Every colour, shape and background is trained on, one direction of each combination is not."""
    def said(split):
        a = world.draw(9, 8000, level, split)
        shown = torch.arange(a["colour"].shape[1]) < a["things"][:, None]
        keys = torch.stack([a["colour"], a["shape"], a["direction"], a["background"][:, None].expand_as(a["shape"])], -1)
        return set(map(tuple, keys[shown].tolist()))

    train, test = said("train"), said("test")
    assert not train & test
    combinations = {"plain": 6 * 3 * 2, "full": 6 * 3 * 3}[level]
    assert len(test) == combinations and len(train) == 7 * combinations


def test_batch_agrees_with_the_clips():
    video, ids, attributes = world.batch(2, 3, frames=5, level="full")
    clips = world.specs(attributes)
    assert torch.allclose(video, world.render(clips, 5), atol=1e-6)
    assert captions.text(ids) == [world.caption(c) for c in clips] and ids.shape == (3, captions.LENGTH)


def test_mistakes_are_named():
    with pytest.raises(ForcingError, match="plain"):
        world.draw(0, 1, "hard")
    with pytest.raises(ForcingError, match="train, test, all"):
        world.draw(0, 1, split="valid")


def test_a_training_batch_is_made_faster_than_it_is_learned():
    """A training step takes about a second; its clips must be a small part of that even on a busy machine."""
    world.batch(1, 8)
    start = time.process_time()
    world.batch(2, 8)
    assert time.process_time() - start < 1.0


def test_faces():
    who, drive = face.identities(3, 2), face.track(4, 2, 30)
    video = face.paint(who, drive)
    assert video.shape == (2, 3, 30, 64, 64) and video.abs().max() <= 1
    assert face.reference(who).shape == (2, 3, 64, 64)
    assert torch.allclose(face.track(4, 2, 60)[..., :30], drive, atol=1e-5)
    assert torch.allclose(face.track(4, 2, 10, start=20), drive[..., 20:], atol=1e-5)
    assert 0 <= drive[:, 3].min() and drive[:, 3].max() <= 1
    assert not torch.equal(face.reference(who)[0], face.reference(who)[1])


def test_the_mouth_follows_the_signal_and_nothing_else_does():
    who = face.identities(3, 1)
    drive = torch.zeros(1, 4, 5)
    drive[:, 3] = torch.linspace(0, 1, 5)
    video = face.paint(who, drive)[0]
    change = (video - video[:, :1]).abs().sum(0)
    assert (change.sum((1, 2)).diff() > 0).all()
    rows = change[-1].sum(1).nonzero()
    assert rows.min() > 34 and rows.max() < 52


def test_the_driver_shows_no_identity():
    drive = face.track(4, 1, 3)
    assert face.driver(drive).shape == (1, 3, 3, 64, 64)
    assert torch.equal(face.driver(drive), face.driver(drive.clone()))
