"""Video files that grow: exact frames and times, playable while written and after a failure, nothing held."""
import json
import sys
import weakref

import av
import numpy
import pytest
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.streaming import FORMATS, Audio, VideoSink


def frames(count, height=32, width=48, seed=0):
    """Noise, which does not compress: [count, H, W, 3]."""
    return numpy.random.default_rng(seed).integers(0, 256, (count, height, width, 3), numpy.uint8)


def tone(seconds, rate=24000, channels=2):
    wave = numpy.sin(2 * numpy.pi * 440 * numpy.arange(int(seconds * rate)) / rate) * 0.5
    return Audio(numpy.repeat(wave[None], channels, 0).astype(numpy.float32), rate)


def decoded(path):
    """(container's metadata, video stream, times, pictures)"""
    with av.open(str(path)) as container:
        stream, found = container.streams.video[0], []
        try:
            for frame in container.decode(stream):
                found.append(frame)
        except av.error.FFmpegError:  # a cut-off file ends in half a packet
            pass
        return (dict(container.metadata), stream, [float(f.pts * f.time_base) for f in found],
                [f.to_ndarray(format="rgb24") for f in found])


def heard(path):
    with av.open(str(path)) as container:
        return sum(f.samples / f.sample_rate for f in container.decode(container.streams.audio[0]))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fps", [16, 23.976])
def test_every_frame_is_there_at_its_time(tmp_path, kind, fps):
    """Also the first one, at 0: an MP4 in fragments starts late where frames look ahead."""
    with VideoSink(tmp_path / "a", fps, kind, metadata={"prompt": {"1": {"inputs": {}}}, "workflow": "{}"}) as sink:
        for part in (1, 12, 4, 40):
            sink.write(frames(part))
    assert (sink.frames, sink.path.name) == (57, f"a.{FORMATS[kind].suffix}")
    metadata, stream, times, pictures = decoded(sink.path)
    assert times == pytest.approx([n / fps for n in range(57)], abs=1.1e-3) and pictures[0].shape == (32, 48, 3)
    assert float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
    found = {key.lower(): value for key, value in metadata.items()}
    assert json.loads(found["prompt"]) == {"1": {"inputs": {}}} and found["workflow"] == "{}"
    if kind == "mp4":
        assert stream.frames == 57  # an ordinary file in the end, with an index


def test_lossless_is_lossless_at_odd_sizes_too(tmp_path):
    wanted = frames(5, 31, 47)
    with VideoSink(tmp_path / "a", kind="mkv lossless") as sink:
        sink.write(wanted)
    assert numpy.array_equal(numpy.stack(decoded(sink.path)[3]), wanted)


@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
def test_sixteen_bits_come_back_to_the_last_one(tmp_path, size):
    """Every value, and eight bits as the value that they stand for."""
    wanted = numpy.random.default_rng(1).integers(0, 65536, (5, *size, 3), numpy.uint16)
    wanted[0].flat[:2] = 0, 65535
    with VideoSink(tmp_path / "a", kind="mkv lossless 16 bit", keep=True) as sink:
        sink.write(wanted)
        sink.write(frames(3, *size))
        assert numpy.array_equal(sink.tail()[5], frames(3, *size)[0] * numpy.uint16(257))
    with av.open(str(sink.path)) as container:
        made = numpy.stack([frame.to_ndarray(format="rgb48le") for frame in container.decode(video=0)])
    assert numpy.array_equal(made[:5], wanted) and numpy.array_equal(made[5:] / 65535, frames(3, *size) / 255)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_file_plays_while_it_is_written(tmp_path, kind):
    """What a crash leaves: all but the newest seconds."""
    sink = VideoSink(tmp_path / "a", 16, kind)
    sink.write(frames(100))
    before = decoded(sink.path)[2]
    sink.close()
    assert 60 <= len(before) < 100 and before == decoded(sink.path)[2][:len(before)]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_is_cut_to_the_pictures(tmp_path, kind, channels):
    with VideoSink(tmp_path / "a", 16, kind, audio=tone(9, channels=channels)) as sink:
        for _ in range(4):
            sink.write(frames(12))
    assert heard(sink.path) == pytest.approx(3, abs=0.1) and len(decoded(sink.path)[2]) == 48


def test_short_sound_does_not_shorten_the_pictures(tmp_path):
    with VideoSink(tmp_path / "a", audio=tone(0.5)) as sink:
        sink.write(frames(48))
    assert heard(sink.path) == pytest.approx(0.5, abs=0.1) and len(decoded(sink.path)[2]) == 48


@pytest.fixture
def small_disk():
    """Files end at 300 kB."""
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_fits_on_the_disk_plays(tmp_path, small_disk, kind):
    sink = VideoSink(tmp_path / "a", 16, kind, audio=tone(99))
    with pytest.raises(ForcingError, match=r"stopped growing after \d.* s and plays.*Choose another place"), sink:
        for seed in range(60):
            sink.write(frames(16, seed=seed))
    assert sink.path.stat().st_size <= 300_000
    played = decoded(sink.path)[2]
    assert played[:20] == pytest.approx([n / 16 for n in range(20)], abs=1.1e-3) and len(played) <= sink.frames
    with pytest.raises(ForcingError, match="is closed"):
        sink.write(frames(1))


def test_an_error_elsewhere_finishes_the_file_and_passes(tmp_path):
    with pytest.raises(RuntimeError, match="network broke"), VideoSink(tmp_path / "a") as sink:
        sink.write(frames(20))
        raise RuntimeError("the network broke")
    assert len(decoded(sink.path)[2]) == 20


def test_nothing_written_leaves_no_file(tmp_path):
    with VideoSink(tmp_path / "a"):
        pass
    assert not any(tmp_path.iterdir())


def test_memory_does_not_grow(tmp_path):
    """The encoder looks ahead, but has copies in its own format."""
    class Frames(numpy.ndarray):
        """Can be weakly referred to."""

    with VideoSink(tmp_path / "a") as sink:
        seen = []
        for _ in range(40):
            part = frames(4).view(Frames)
            sink.write(part)
            seen.append(weakref.ref(part))
            del part
            assert sum(ref() is not None for ref in seen) == 0


def test_bad_requests_name_the_fix(tmp_path, monkeypatch):
    for words, settings in (("one of mp4, webm", {"kind": "avi"}), ("frame rate of 0", {"fps": 0}),
                            ("one or two", {"audio": Audio(numpy.zeros((3, 9), numpy.float32), 8000)})):
        with pytest.raises(ForcingError, match=words):
            VideoSink(tmp_path / "a", **settings)
    with pytest.raises(ForcingError, match="even width and height, or the format 'mkv lossless'"):
        VideoSink(tmp_path / "a").write(frames(1, height=31))
    with pytest.raises(ForcingError, match="Frame 2 is 48x16.*frames of one size"), VideoSink(tmp_path / "b") as sink:
        sink.write(frames(2))
        sink.write(frames(1, height=16))
    with pytest.raises(ForcingError, match="was not written. The folder .* does not exist"):
        VideoSink(tmp_path / "nowhere" / "a").write(frames(1))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ForcingError, match="pip install av"):
        VideoSink(tmp_path / "c").write(frames(1))
