"""Videos play, appear complete or not at all, and nothing holds all of their frames."""
import os
import sys
import weakref
from pathlib import Path

import av
import numpy
import pytest
from forcing_pack.forcing_core import media
from forcing_pack.forcing_core.demo import make
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.media import ContactSheet, check_writers, contact_sheet, save_png, write_mp4
from PIL import Image


def frames(count, height=32, width=48):
    for number in range(count):
        yield numpy.full((height, width, 3), (number * 5 % 256, 80, 200), numpy.uint8)


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream, [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(stream)]


def test_every_frame_is_there_at_its_time(tmp_path):
    assert write_mp4(tmp_path / "a.mp4", frames(41), 16) == 41
    stream, pictures = decoded(tmp_path / "a.mp4")
    assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
    assert stream.average_rate == 16 and stream.frames == 41
    assert [time for time, _ in pictures] == pytest.approx([number / 16 for number in range(41)])
    assert pictures[40][1].shape == (32, 48, 3)
    assert abs(int(pictures[40][1][16, 24, 0]) - 200) < 8
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("fps", [24, 29.97, 12.5])
def test_other_rates(tmp_path, fps):
    write_mp4(tmp_path / "a.mp4", frames(5), fps)
    assert [time for time, _ in decoded(tmp_path / "a.mp4")[1]] == pytest.approx([n / fps for n in range(5)], rel=1e-3)


def test_a_failing_source_leaves_the_old_file_alone(tmp_path):
    def failing():
        yield from frames(3)
        raise RuntimeError("the network broke")

    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="the network broke"):
        write_mp4(tmp_path / "a.mp4", failing())
    assert os.listdir(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"old"


def test_the_writer_lets_frames_go(tmp_path):
    """An encoder delays a few frames, but a long video must not gather in memory."""
    alive = weakref.WeakSet()

    class Frame(numpy.ndarray):
        def __hash__(self):
            return id(self)

    most = 0

    def watched():
        nonlocal most
        for frame in frames(60):
            frame = frame.view(Frame)
            alive.add(frame)
            most = max(most, len(alive))
            yield frame

    write_mp4(tmp_path / "a.mp4", watched())
    contact_sheet(watched())
    assert most <= 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told(tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to("/dev/full")
    monkeypatch.setattr(media, "_temporary", lambda path: link)
    with pytest.raises(ForcingError, match="disk is full"):
        write_mp4(tmp_path / "a.mp4", frames(30))
    assert not os.listdir(tmp_path)


def test_bad_requests_name_the_fix(tmp_path):
    with pytest.raises(ForcingError, match="no frames"):
        write_mp4(tmp_path / "a.mp4", frames(0))
    with pytest.raises(ForcingError, match="even width and height"):
        write_mp4(tmp_path / "a.mp4", frames(2, height=31))
    with pytest.raises(ForcingError, match="frames of one size"):
        write_mp4(tmp_path / "a.mp4", [*frames(2), *frames(1, height=16)])
    with pytest.raises(ForcingError, match="frame rate of 0"):
        write_mp4(tmp_path / "a.mp4", frames(2), 0)
    with pytest.raises(ForcingError, match="does not exist"):
        write_mp4(tmp_path / "nowhere" / "a.mp4", frames(2))
    assert not os.listdir(tmp_path)


def test_missing_modules_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ForcingError, match="pip install av"):
        write_mp4(tmp_path / "a.mp4", frames(2))
    with pytest.raises(ForcingError, match="pip install pillow"):
        contact_sheet(frames(2))


@pytest.mark.parametrize(("gone", "told"), [
    (("numpy",), "needs numpy. Install what is missing with 'pip install numpy'"),
    (("PIL", "av"), "needs pillow and av. Install what is missing with 'pip install pillow av'")])
def test_the_demo_names_what_is_missing_before_it_begins(tmp_path, monkeypatch, gone, told):
    check_writers()
    for module in gone:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ForcingError, match=told):
        make(tmp_path / "a.mp4", progress=lambda _: pytest.fail("a rollout that cannot be written"))


def test_a_contact_sheet_is_spread_over_the_video(tmp_path):
    sheet = ContactSheet(columns=3, cells=6, width=48)
    for frame in frames(41):
        sheet.add(frame)
    assert (sheet.seen, sheet.stride) == (41, 8)  # frames 0, 8, 16, 24, 32, 40
    image = sheet.image()
    assert image.size == (3 * 56 + 8, 2 * 60 + 8)
    assert image.getpixel((8 + 24, 8 + 16)) == (0, 80, 200)
    assert image.getpixel((8 + 2 * 56 + 24, 8 + 60 + 16)) == (200, 80, 200)
    save_png(image, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == image.size and os.listdir(tmp_path) == ["a.png"]


def test_small_and_empty_sheets():
    assert contact_sheet(frames(1), width=48).size == (64, 68)
    with pytest.raises(ForcingError, match="no frames"):
        contact_sheet(frames(0))
    with pytest.raises(ForcingError, match="at least 1"):
        ContactSheet(columns=0)
