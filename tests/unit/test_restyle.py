"""Restyling: a block starts from the source's own, as noisy as asked for; frames of a video found by their times."""
import io
from dataclasses import replace
from fractions import Fraction

import av
import numpy
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import Block, layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import block_rollout, calls
from forcing_pack.forcing_core.rollout.restyle import Restyle, Restyling, motion, strengths
from forcing_pack.forcing_core.schedule import Level, levels
from forcing_pack.forcing_core.solvers import consistency, unipc
from forcing_pack.forcing_core.streaming.source import Shown, constant, frames, shown
from forcing_testkit.forcing_corekit import CHANNELS, Recorder, cached, gap, latents, network

SIZE = (4, 6)
FOUR, TWO = levels([1000, 750, 500, 250], 5.0), levels([1000, 500], 5.0)
WINDOW = WindowOptions(window=6, sink=1, positions="relative")
BLOCKS = layout(9, 3)
SOURCE = latents(9, seed=5)
FIRST = Block(0, 0, 3)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def net():
    return network()


def made(net, how=None, frames=9, steps=FOUR, source=SOURCE, solver=consistency, **more):
    """(latents, calls) of a rollout, restyled where `how` is given."""
    denoiser, blocks = Recorder(cached(net, WINDOW, frames)), layout(frames, 3)
    make = {"make": Restyling(how, source, blocks).make} if how else {}
    with torch.no_grad():
        parts = [x for _, x in block_rollout(denoiser, blocks, steps, BlockNoise(3, (1, CHANNELS), SIZE), solver=solver,
                                             **make, **more)]
    return torch.cat(parts, dim=2), denoiser.calls


# -- strength -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("solver", [consistency, unipc])
def test_full_strength_is_generation_bit_for_bit(net, solver):
    steps = FOUR if solver is consistency else tuple(Level(1000 * s, s) for s in (0.9998, 0.9, 0.5))
    assert torch.equal(made(net, Restyle(1.0), steps=steps, solver=solver)[0], made(net, steps=steps, solver=solver)[0])


def test_no_strength_is_the_source_and_little_strength_near_it(net):
    """Without noise nothing is denoised; the memory is written all the same."""
    out, seen = made(net, Restyle(0.0))
    assert torch.equal(out, SOURCE) and [call.phase for call in seen] == ["clean", "clean"]
    distances = [gap(made(net, Restyle(strength))[0], SOURCE) for strength in (1e-4, 1e-2, 0.9)]
    assert distances[0] < 1e-3 < distances[1] < 0.2 < distances[2]


def test_the_start_of_a_block_and_its_steps(net):
    """By hand: 0.8 replaces the first levels and leaves those clearly below it; the mixture is that of the source."""
    _, seen = made(net, Restyle(0.8))
    noisy = [call for call in seen if call.phase == "noisy" and call.first == 3]
    assert [call.timesteps[0] for call in noisy] == pytest.approx([800, 625])
    mixed = 0.2 * SOURCE[:, :, 3:6] + 0.8 * BlockNoise(3, (1, CHANNELS), SIZE).initial(BLOCKS[1])
    assert gap(noisy[0].x, mixed) < 1e-6


def test_levels_near_the_start_are_left_out():
    run = Restyling(Restyle(0.84), SOURCE, BLOCKS)
    assert [level.sigma for level in run.levels(0, FOUR)] == pytest.approx([0.84, 0.625], abs=1e-3)
    assert run.levels(0, FOUR)[0] == Level(840.0, 0.84)
    told = Restyling(Restyle(0.84), SOURCE, BLOCKS, lambda sigma: Level(float(int(1000 * sigma)), sigma))
    assert told.levels(0, FOUR)[0].timestep == 840.0 and run.levels(0, levels([500], 5.0)) == levels([500], 5.0)


def test_memory_holds_the_restyled_blocks(net):
    """Clean passes run on what was made, not on the source."""
    out, seen = made(net, Restyle(0.7))
    clean = [call for call in seen if call.phase == "clean"]
    assert all(torch.equal(call.x, out[:, :, call.first:call.first + 3]) for call in clean) and len(clean) == 2
    assert gap(out, SOURCE) > 0.1


@pytest.mark.parametrize("how", [Restyle(0.7), Restyle(0.8, 0.3)])
def test_a_longer_video_begins_with_the_shorter_one(net, how):
    source = latents(12, seed=5)
    assert torch.equal(made(net, how, 12, source=source)[0][:, :, :9], made(net, how, 9, source=source[:, :, :9])[0])


def test_behind_the_source_generation_goes_on(net):
    out, seen = made(net, Restyle(0.5), source=SOURCE[:, :, :5])
    steps = [sum(call.phase == "noisy" and call.first == first for call in seen) for first in (0, 3, 6)]
    assert steps == [1, 4, 4]  # a block that the source fills in part counts as behind it
    assert torch.equal(made(net, Restyle(0.5), source=SOURCE[:, :, :3])[0], out)


def test_given_frames_keep_their_place(net):
    """The source counts frames of the whole video, given ones included."""
    blocks = layout(6, 3, given=3)
    run = Restyling(Restyle(0.0), SOURCE, blocks)
    parts = [x for _, x in block_rollout(cached(net, WINDOW, 9), blocks, FOUR, BlockNoise(3, (1, CHANNELS), SIZE),
                                         context=latents(3), make=run.make)]
    assert torch.equal(torch.cat(parts, dim=2), SOURCE[:, :, 3:])


@pytest.mark.parametrize("how, first", [(Restyle(0.7), None), (Restyle(0.9, 0.5), FOUR), (Restyle(0.0), None)])
def test_announced_forwards_are_those_that_run(net, how, first):
    source = torch.cat([SOURCE[:, :, :6], SOURCE[:, :, 5:6].expand(-1, -1, 3, -1, -1)], dim=2)
    _, seen = made(net, how, steps=TWO, source=source, first_levels=first)
    announced = Restyling(how, source, BLOCKS).calls(calls("block", BLOCKS, 2, first_steps=len(first or ())), TWO, first)
    assert [(c.phase, c.first) for c in announced] == [(c.phase, c.first) for c in seen]


# -- motion ---------------------------------------------------------------------------------------------------

def moving(*steps):
    """Latent frames, each so much above the one before."""
    return torch.tensor(steps).cumsum(0).view(1, 1, -1, 1, 1).expand(1, 2, -1, 2, 2)


def test_motion_is_the_largest_step_into_or_inside_the_block():
    clip = moving(0.0, 0.1, 0.1, 0.6, 0.0, 0.2, 3.0)
    found = [motion(clip, Block(i, 3 * i, 3)) for i in range(2)] + [motion(clip, Block(2, 6, 1)), motion(clip, Block(0, 0, 1))]
    assert found == pytest.approx([0.1, 0.6, 1.0, 0.0])


def test_motion_takes_noise_away_by_and_by():
    """By hand, as published: 0.9 of what the motion asks for and 0.1 of the block before."""
    clip = moving(*[0.0] * 3, *[2.0] * 3, *[0.0] * 3)
    found = strengths(Restyle(0.8, 0.1), clip, BLOCKS)
    assert list(found) == [0, 3, 6] and [*found.values()] == pytest.approx([0.8, 0.9 * 0.7 + 0.08, 0.72 + 0.1 * 0.71])
    assert [*strengths(Restyle(0.8), clip, BLOCKS).values()] == [0.8] * 3
    assert min(strengths(Restyle(0.1, 1.0), clip, BLOCKS).values()) == 0.01


@pytest.mark.parametrize(("name", "why"), [("rolling", "several blocks together"), ("knot", "the end of the one before"),
                                           ("per_step", "its own noise levels")])
def test_rollouts_without_starts_of_their_own_are_refused_with_the_reason(name, why):
    with pytest.raises(ForcingError, match=f"{why}.*Restyle with the preset self-forcing"):
        Restyle().check(name)
    Restyle().check("recompute")
    with pytest.raises(ForcingError, match="from 0 to 1"):
        replace(Restyle(), strength=1.1)


# -- frames by their times ------------------------------------------------------------------------------------

def clip(times, base=1000, size=(16, 16), rotation=None):
    """A lossless file whose frame i is red 10 * i and shown at times[i]."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as file:
        stream = file.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.options = *size, "bgr0", {"g": "1"}
        stream.codec_context.time_base = Fraction(1, base)
        for number, time in enumerate(times):
            picture = numpy.zeros((size[1], size[0], 3), numpy.uint8)
            picture[..., 0] = 10 * number
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * base), Fraction(1, base)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer


def reds(file, fps, part=(0, 0), which=slice(None)):
    """Numbers of the source frames that are shown."""
    seen = shown(file).part(*part)
    times = [seen.times[i] for i in seen.at(fps)][which]
    return [int(frame[0, 0, 0]) // 10 for frame in frames(file, times)]


def test_the_same_rate_gives_every_frame_once():
    """Matroska rounds times to milliseconds, which must not double or drop a frame."""
    assert reds(clip([i / 16 for i in range(20)]), 16) == list(range(20))


@pytest.mark.parametrize("rate, fps, wanted", [
    (24, 16, [0, 2, 3, 5, 6, 8, 9, 11]),
    (8, 16, [0, 1, 1, 2, 2, 3, 3, 3]),
    (30, 10, [0, 3, 6, 9]),
])
def test_other_rates_keep_the_speed(rate, fps, wanted):
    count = {24: 12, 8: 4, 30: 12}[rate]
    assert reds(clip([i / rate for i in range(count)]), fps) == wanted
    assert constant(count, rate).at(fps) == wanted


def test_variable_rates_keep_the_speed():
    """One frame stands for half a second, then four come at once."""
    times = [0, 0.5, 0.5625, 0.625, 0.6875]
    assert reds(clip(times), 16) == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 4]


def test_only_the_wanted_part_is_decoded():
    """From a key frame on; trimmed videos count from their own start."""
    file = clip([i / 16 for i in range(24)])
    assert reds(file, 16, which=slice(-5, None)) == [19, 20, 21, 22, 23]
    assert reds(file, 16, part=(0.5, 0.25)) == [8, 9, 10, 11]
    with pytest.raises(ForcingError, match="no frame behind second 9"):
        shown(file).part(9.0)


def test_a_single_frame_is_shown_once():
    assert Shown((Fraction(0),), Fraction(1, 30)).at(16) == [0] and reds(clip([0]), 16) == [0]


def test_what_is_no_video_says_what_to_do():
    with pytest.raises(ForcingError, match="cannot be opened.*Load a video file that plays"):
        shown(io.BytesIO(b"no video at all"))
    with pytest.raises(ForcingError, match="no frames"):
        constant(0, 16)
    sound = io.BytesIO()
    with av.open(sound, "w", format="matroska") as file:
        stream = file.add_stream("flac", rate=16000)
        stream.layout = "mono"
        part = av.AudioFrame.from_ndarray(numpy.zeros((1, 1024), numpy.int16), format="s16", layout="mono")
        part.sample_rate = 16000
        file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    with pytest.raises(ForcingError, match="no video stream, only sound"):
        shown(sound)
