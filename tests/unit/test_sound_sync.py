"""Sound and picture of a long stream: after ten minutes they are still within one frame of each other."""
import os
from itertools import pairwise

import av
import numpy
import pytest
from forcing_pack.forcing_core.streaming import Audio, VideoSink

SIZE, BLOCK = 32, 12  # pixels of a side; frames that a stream hands over at once
MARK = 60  # seconds between two frames that are white and clicked to


def click_track(seconds, rate):
    """[1, n]: silence with 20 ms of a tone at every MARK, in the middle of the minute."""
    wave = numpy.zeros((1, round(seconds * rate)), numpy.float32)
    click = 0.8 * numpy.sin(2 * numpy.pi * 1000 * numpy.arange(round(0.02 * rate)) / rate)
    for mark in marks(seconds):
        at = round(mark * rate)
        wave[0, at:at + len(click)] = click
    return wave


def marks(seconds):
    return [second for second in range(MARK // 2, int(seconds), MARK)] + [int(seconds) - 1]


def streamed(path, kind, seconds, fps, rate, longer=0):
    """A file of black frames with a white one at every mark, in blocks, and its click track. Returns its sink."""
    total = round(seconds * fps)
    white = {round(mark * fps) for mark in marks(seconds)}
    with VideoSink(path, fps, kind, audio=Audio(click_track(seconds + longer, rate)[:, :round((seconds + longer) * rate)],
                                                rate)) as sink:
        for start in range(0, total, BLOCK):
            numbers = range(start, min(start + BLOCK, total))
            block = numpy.zeros((len(numbers), SIZE, SIZE, 3), numpy.uint8)
            for place, number in enumerate(numbers):
                block[place] = 255 if number in white else 0
            sink.write(block)
    return sink


def seen(path):
    """(times of white frames, end of the last frame)"""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(float(f.pts * f.time_base), f.to_ndarray(format="gray").mean()) for f in container.decode(stream)]
        return [time for time, light in frames if light > 128], frames[-1][0] + float(1 / stream.average_rate)


def heard(path):
    """(beginnings of clicks, end of the sound)"""
    times, end = [], 0.0
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams.audio[0]):
            start = float(frame.pts * frame.time_base)
            wave = numpy.abs(frame.to_ndarray().astype(numpy.float32).mean(0))
            wave /= 32768 if frame.format.name.startswith("s16") else 2**31 if frame.format.name.startswith("s32") else 1
            loud = numpy.flatnonzero(wave > 0.3)
            if len(loud) and (not times or start + loud[0] / frame.sample_rate > times[-1] + 1):
                times.append(start + loud[0] / frame.sample_rate)
            end = start + frame.samples / frame.sample_rate
    return times, end


def check(path, seconds, fps):
    flashes, shown = seen(path)
    clicks, sounded = heard(path)
    wanted = marks(seconds)
    assert len(flashes) == len(clicks) == len(wanted)
    apart = [abs(click - flash) for click, flash in zip(clicks, flashes)]
    assert max(apart) <= 1 / fps, apart
    assert abs(apart[-1] - apart[0]) <= 1 / fps  # no drift either
    assert abs(shown - seconds) <= 1 / fps and abs(sounded - shown) <= 1 / fps + 0.03  # a codec's last packet may be full


MANY = pytest.mark.skipif("FORCING_SLOW" not in os.environ, reason="five times ten minutes: set FORCING_SLOW")
COMBINED = [(16, 44100), (16, 22050), (25, 48000), (25, 22050), (24000 / 1001, 44100), (30000 / 1001, 48000)]


@pytest.mark.parametrize(("fps", "rate"), COMBINED)
def test_no_drift_in_three_quarters_of_a_minute(tmp_path, fps, rate):
    sink = streamed(tmp_path / "a", "mp4", 45, fps, rate)
    check(sink.path, 45, fps)


@pytest.mark.parametrize("kind", ["webm", "mkv lossless"])
def test_other_containers(tmp_path, kind):
    check(streamed(tmp_path / "a", kind, 45, 16, 44100).path, 45, 16)


def test_ten_minutes(tmp_path):
    """16 frames and 44100 samples a second have no common frame of the sound's codec."""
    check(streamed(tmp_path / "a", "mp4", 600, 16, 44100).path, 600, 16)


@MANY
@pytest.mark.slow
@pytest.mark.parametrize(("fps", "rate"), COMBINED[1:])
def test_ten_minutes_of_every_combination(tmp_path, fps, rate):
    check(streamed(tmp_path / "a", "mp4", 600, fps, rate).path, 600, fps)


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
@pytest.mark.parametrize("fps", [16, 25, 24000 / 1001])
def test_the_sound_handed_to_the_codec_ends_with_every_block(tmp_path, monkeypatch, fps, rate):
    """Counted in samples: after each block the sound is at most one sample short of the pictures."""
    handed, rates = [0], []
    with VideoSink(tmp_path / "a", fps, audio=Audio(numpy.zeros((1, 40 * rate), numpy.float32), rate)) as sink:
        for _ in range(50):
            sink.write(numpy.zeros((BLOCK, SIZE, SIZE, 3), numpy.uint8))
            handed.append(sink._heard)
            rates.append(sink.frames / sink.rate * rate - sink._heard)
    assert all(0 <= rest < 1 for rest in rates) and all(a < b for a, b in pairwise(handed))


def test_sound_that_is_shorter_or_longer_than_the_pictures(tmp_path):
    """Documented: a short one ends, a long one is cut."""
    longer = streamed(tmp_path / "long", "mp4", 31, 16, 22050, longer=5)
    assert abs(heard(longer.path)[1] - 31) <= 0.1
    with VideoSink(tmp_path / "short", 16, audio=Audio(numpy.zeros((1, 22050), numpy.float32), 22050)) as sink:
        sink.write(numpy.zeros((48, SIZE, SIZE, 3), numpy.uint8))
    assert abs(heard(sink.path)[1] - 1) <= 0.1 and abs(seen(sink.path)[1] - 3) < 1 / 16
