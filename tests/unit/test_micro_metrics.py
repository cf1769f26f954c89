"""Measures from pixels: perfect clips score 1, every planted fault is found, decoded pictures do not fool them."""
import math

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.micro import metrics, temporal, world
from forcing_pack.forcing_core.micro.names import BACKGROUNDS, COLOURS
from forcing_pack.forcing_core.micro.observe import NONE, background_of, colour_names, components, frames_of, observe
from torch.nn.functional import conv2d, pad

BLOCKS = [3] * 3
FRAMES = 33


def decoded(video, seed=0, sigma=1.2, noise=0.1):
    """As a VAE would return it: blurred edges, noise, an error of colour."""
    generator = torch.Generator().manual_seed(seed)
    ruler = torch.arange(-4, 5).float()
    kernel = torch.exp(-ruler ** 2 / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, 9)
    flat = pad(frames_of(video).reshape(-1, 1, 64, 64), (4, 4, 4, 4), mode="replicate")
    soft = conv2d(conv2d(flat, kernel), kernel.transpose(2, 3)).view(frames_of(video).shape)
    tint = 0.06 * torch.randn((len(video), 1, 3, 1, 1), generator=generator)
    return frames_of(soft + tint + noise * torch.randn(soft.shape, generator=generator))


def clips(n=4, seed=1, frames=FRAMES, **more):
    spec = world.specs(world.draw(seed, n, split="all", **more))
    return spec, world.render(spec, frames)


def square(colour=0, x=20.0, speed=0.5, heading=0.0, shape=1, radius=10.0):
    return world.Thing(shape, colour, -1, 0, 1, radius, speed, heading, x, 32.0)


def one(thing, background=0):
    return world.ClipSpec((thing,), background)


@pytest.mark.parametrize("damage", [lambda v: v, decoded], ids=["clean", "decoded"])
def test_perfect_clips_score_one(damage):
    spec, video = clips()
    scores = metrics.report(damage(video), spec, BLOCKS)
    for name in ("caption_accuracy", "colour_accuracy", "colour", "shape", "one_object", "background", "direction",
                 "frame_accuracy"):
        assert scores[name] == 1, name
    assert scores["drift"] < 0.03 and scores["area_drift"] < 0.03 and scores["lost"] == 0
    assert scores["repeats"] == 0 and scores["frozen"] == 0 and scores["shape_changes"] == 0
    assert 0.7 < scores["seam_ratio"] < 1.3 and 0.9 < scores["seam_change"] < 1.1
    assert 0.5 < scores["speed"] < 1.5


@pytest.mark.parametrize("sigma, noise", [(0, 0), (1.2, 0.1), (2.0, 0.15)])
def test_classifiers(sigma, noise):
    """More than 99 % of single frames, wherever the thing is."""
    a = world.draw(2, 120, split="all")
    video = world.paint(a, 1, start=7)
    seen = observe(frames_of(decoded(video, 0, sigma, noise) if sigma else video))
    assert (seen.shape[..., 0] == a["shape"]).float().mean() > 0.99
    assert (seen.colour[..., 0] == a["colour"]).float().mean() > 0.99
    assert (seen.objects == 1).float().mean() > 0.99
    if not sigma:
        area = seen.area[:, 0, 0] / a["radius"][:, 0].float() ** 2
        assert torch.allclose(area, torch.tensor([3.14, 3.24, 2.29])[a["shape"][:, 0]], rtol=0.05)


def test_shapes_at_the_border():
    """Touching the border is no fault; a thing that is cut by it keeps its colour and is not judged for its shape."""
    inner = observe(frames_of(world.render([one(square(x=9.0, shape=s, radius=9.0 / (1, 0.9, 1.15)[s]))
                                            for s in range(3)], 1)))
    assert inner.edge.all() and inner.shape.flatten().tolist() == [0, 1, 2]
    spec = [one(square(shape=s, speed=0.01)) for s in range(3)]
    video = world.render(spec, 40)
    video[:, :, 30:, :, :49] = video[:, :, 30:, :, 15:].clone()
    scores = metrics.caption_scores(observe(frames_of(video)), spec)
    assert scores["caption_accuracy"] == 1


def test_what_is_no_shape():
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    r = torch.hypot(x, y)
    masks = [(r < 14) & (r > 8), (x / 16) ** 2 + (y / 10) ** 2 < 1, (r < 13) & (x > 0), (x.abs() < 13) & (y.abs() < 6)]
    frames = torch.stack(masks)[:, None].float() * torch.tensor([1.9, -0.1, -0.1])[:, None, None] - 0.9
    assert (observe(frames).shape == NONE).all()


def test_colours_by_name():
    named = torch.tensor(list(COLOURS.values()))
    for light in (0.8, 1.0):
        assert colour_names(named * light).tolist() == list(range(6))
    assert (colour_names(torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.9, 0.9], [0.0, 0.0, 0.0]])) == NONE).all()


def test_background_under_a_thing_at_the_border():
    frame = frames_of(world.render([one(square(x=9.0), background=2)], 1))[0] * 0.5 + 0.5
    assert torch.allclose(background_of(frame)[0], torch.tensor(BACKGROUNDS["gray"]), atol=1e-3)


def naive_components(mask):
    """Flood fill, one pixel at a time."""
    todo, count = {tuple(p) for p in mask.nonzero().tolist()}, 0
    while todo:
        count += 1
        stack = [todo.pop()]
        while stack:
            y, x = stack.pop()
            near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & todo
            todo -= near
            stack += near
    return count


def test_components_against_flood_fill():
    generator = torch.Generator().manual_seed(4)
    masks = torch.rand(6, 24, 24, generator=generator) < torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.0])[:, None, None]
    snake = torch.zeros(24, 24, dtype=torch.bool)
    snake[::2] = True
    snake[1::4, 0] = snake[3::4, -1] = True
    for mask, label in zip([*masks, snake], components(torch.stack([*masks, snake])), strict=True):
        assert torch.equal(label.view(24, 24) > 0, mask)
        assert len(set(label.tolist()) - {0}) == naive_components(mask)


@pytest.mark.parametrize("damage", [lambda v: v, decoded], ids=["clean", "decoded"])
def test_wrong_colour_and_shape(damage):
    spec, video = [one(square(0)), one(square(0))], world.render([one(square(2)), one(square(0, shape=0))], 12)
    scores = metrics.caption_scores(observe(frames_of(damage(video))), spec)
    assert (scores["caption_accuracy"], scores["colour_accuracy"]) == (0, 0.5)
    assert (scores["colour"], scores["shape"], scores["one_object"]) == (0.5, 0.5, 1)


def test_one_bad_frame_spoils_a_clip():
    spec, video = clips(2)
    video[0, :, 20] = world.render([one(square(3 if spec[0].things[0].colour != 3 else 4))], 1)[0, :, 0]
    scores = metrics.caption_scores(observe(frames_of(video)), spec)
    assert scores["colour"] == 0.5 and scores["caption_accuracy"] == 0.5
    assert scores["frame_accuracy"] == pytest.approx(1 - 1 / (2 * FRAMES))


@pytest.mark.parametrize("second", [square(0, x=50.0, radius=4.0), square(4, x=50.0)], ids=["same", "other"])
def test_two_objects_where_one_is_asked_for(second):
    spec = one(square(0, x=15.0, speed=0.1))
    video = decoded(world.render([world.ClipSpec((*spec.things, second), 0)], 3))
    scores = metrics.caption_scores(observe(frames_of(video)), [spec])
    assert scores["one_object"] == 0 and scores["caption_accuracy"] == 0


def test_nothing_to_see():
    spec = one(square())
    seen = observe(torch.full((1, 20, 3, 64, 64), -0.84))
    scores = metrics.caption_scores(seen, [spec])
    assert scores["caption_accuracy"] == scores["shape"] == scores["direction"] == 0 and scores["background"] == 1
    assert temporal.drift(seen)["lost"].item() == 1 and temporal.drift(seen)["drift"].item() == 1


def test_captions_of_two_things():
    spec = world.specs(world.draw(31, 6, world.Level(two=1.0, radius=(6.0, 7.5)), "all"))
    video = world.render(spec, 21)
    assert metrics.report(video, spec, [5, 1])["caption_accuracy"] > 0.8
    swapped = [world.ClipSpec(tuple(world.Thing(**{**t.__dict__, "colour": (t.colour + 1) % 6}) for t in c.things),
                              c.background) for c in spec]
    assert metrics.report(video, swapped, [5, 1])["caption_accuracy"] == 0


def test_drift_is_a_distance():
    """Red fades towards the dark background by 0.3 in RGB, the background rises by 0.1."""
    video = world.render([one(square(speed=0.1))], 64)
    rise = torch.linspace(0, 1, 4).repeat_interleave(16)[:, None, None]
    seen = observe(frames_of(video + 2 * 0.1 / 3 ** 0.5 * rise))
    drift = temporal.drift(seen)
    assert drift["drift"].item() == pytest.approx(0.2, abs=0.01)  # the thing and the background, 0.1 each
    curves = temporal.drift_curves(seen)
    assert curves["background"][0].tolist() == pytest.approx([0, 0.0333, 0.0667, 0.1], abs=0.003)
    assert drift["area_drift"].item() < 0.02


def test_area_drift():
    grown = torch.cat([world.render([one(square(speed=0.1, radius=r))], 16) for r in (10.0, 11.0, 12.0)], 2)
    assert temporal.drift(observe(frames_of(grown)))["area_drift"].item() == pytest.approx(0.44, abs=0.03)


def test_seams():
    assert temporal.seam_frames([3, 3, 3]) == [9, 21]
    assert temporal.seam_frames([1, 3, 3]) == [1, 13]
    assert temporal.seam_frames([4]) == []


@pytest.mark.parametrize("same_phase", [False, True])
def test_jumps_at_seams(same_phase):
    """A jump of two pixels at every seam, and the same jumps inside blocks."""
    spec = [one(square(x=20.0, speed=0.3))]

    def jump(frames):
        video = world.render(spec, FRAMES)
        for frame in frames:
            video[..., frame:, :, :] = video[..., frame:, :, :].roll(2, -1)
        return video

    def ratio(video):
        return temporal.seam_ratio(observe(frames_of(video)), BLOCKS, same_phase)

    assert ratio(decoded(jump([9, 21]))) > 5
    assert ratio(decoded(jump([5, 17]))) < 0.5
    assert 0.6 < ratio(decoded(jump([]))) < 1.5
    assert temporal.seam_change(frames_of(jump([9, 21])), BLOCKS) > 2
    assert metrics.report(decoded(jump([9, 21])), spec, BLOCKS)["caption_accuracy"] == 1


def test_brightness_jump_at_seams():
    video = world.render([one(square())], FRAMES)
    video[:, :, 9:21] += 0.05
    assert temporal.seam_change(frames_of(video), BLOCKS) > 3


def test_blocks_have_to_fit():
    with pytest.raises(ForcingError, match="make 33 frames, but the clip has 32"):
        temporal.seam_ratio(observe(torch.zeros(1, 32, 3, 64, 64)), BLOCKS)
    assert math.isnan(temporal.seam_ratio(observe(torch.zeros(1, 9, 3, 64, 64)), [3]))


@pytest.mark.parametrize("damage", [lambda v: v, decoded], ids=["clean", "decoded"])
def test_loops(damage):
    spec = [one(square(speed=0.7, heading=0.4)), one(square(2, speed=0.9, heading=2.0))]
    video = world.render(spec, 120)
    loop = torch.cat([video[:, :, :40]] * 3, 2)
    still = video[:, :, :1].expand(-1, -1, 60, -1, -1)
    assert temporal.repeats(frames_of(damage(video)))["repeats"].max() == 0
    assert temporal.repeats(frames_of(damage(loop)))["repeats"].min() > 0.6
    assert temporal.repeats(frames_of(still))["repeats"].min() == 1
    assert temporal.repeats(frames_of(still))["frozen"].min() == 1


@pytest.mark.parametrize("sizes", [[1, 12, 20], [32, 1]])
def test_a_clip_that_is_seen_in_pieces(sizes):
    """Nothing of a video has to be kept for the measures of its pixels."""
    clip = frames_of(world.render([one(square()), one(square(2, speed=0.9))], FRAMES))
    pixels = temporal.Pixels()
    for part in clip.split(sizes, 1):
        pixels.push(part)
    whole, seen = temporal.repeats(clip), temporal.repeats(pixels)
    assert pixels.frames == FRAMES and all(torch.equal(seen[name], value) for name, value in whole.items())
    assert temporal.seam_change(pixels, BLOCKS) == pytest.approx(temporal.seam_change(clip, BLOCKS), rel=1e-5)
    plain = (clip[:, 1:] - clip[:, :-1]).abs().mean((2, 3, 4))
    assert torch.allclose(pixels.steps, plain) and pixels.small.shape == (2, FRAMES, 768)


def test_switch_delay():
    """Red until frame 25, green from then on; asked for at frame 20. A short flash of green does not count."""
    red, green = (world.render([one(square(c, speed=0.1))], 60) for c in (0, 1))
    video = torch.cat([red[:, :, :25], green[:, :, 25:]], 2)
    video[:, :, 21:23] = green[:, :, 21:23]
    seen = observe(frames_of(torch.cat([video, red, green])))
    new = one(square(1))
    assert metrics.switch_delay_frames(seen, [new] * 3, 20) == [5, None, 0]


def test_first_run():
    assert temporal.first_run([False, True, True, False, True, True, True], 3) == 4
    assert temporal.first_run([False, True, True], 3) == 1
    assert temporal.first_run([True, False], 3) is None


def test_jitter():
    spec = one(square(speed=0.4))
    smooth = world.render([spec], 30)
    rough = smooth.clone()
    rough[:, :, ::2] = rough[:, :, ::2].roll(1, -1)
    a, b = (temporal.motion(observe(frames_of(v))) for v in (smooth, rough))
    assert a["jitter"].item() < 0.1 and b["jitter"].item() == pytest.approx(2, abs=0.3)
    assert a["speed"].item() == pytest.approx(0.4, abs=0.03)


def test_captions_in_any_form():
    spec, video = clips(3, frames=9)
    seen = observe(frames_of(video))
    texts = [world.caption(c) for c in spec]
    assert metrics.caption_scores(seen, texts) == metrics.caption_scores(seen, spec)
    assert metrics.caption_scores(seen, metrics.wanted(texts))["caption_accuracy"] == 1
