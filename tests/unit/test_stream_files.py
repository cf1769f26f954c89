"""Streams to files: logs inside of them, snapshots, and a power cut at any moment. With a random micro model."""
import importlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy
import pytest
import torch
from forcing_pack.forcing_core import snapshot_file
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.steering import Command, Steering
from forcing_pack.forcing_core.streaming.live import Live, Previews, kept_ranges
from forcing_pack.forcing_core.streaming.note import ROOM, read_note
from forcing_pack.forcing_core.streaming.sink import Audio, VideoSink
from forcing_testkit import streamkit
from forcing_testkit.micro import random_bundle

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = 9
SCRIPT = [{"number": 1, "block": 2, "at_frame": 21, "kind": "prompt", "text": "a blue square", "transition": "soft",
           "blocks": 3},
          {"number": 2, "block": 5, "at_frame": 57, "kind": "seed", "seed": 9}]
MANY = pytest.mark.skipif("FORCING_SLOW" not in os.environ, reason="twenty kills take minutes: set FORCING_SLOW")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_bundle(tmp_path_factory.mktemp("micro"))


def core(name):
    return importlib.import_module(f"forcing_pack.forcing_core.{name}")


def settings(weights, path, **more):
    return {"folder": str(weights), "path": str(path), "blocks": BLOCKS, "replay": SCRIPT, **more}


@torch.no_grad()
def made(weights, path, stop=None, **more):
    """A stream in this process, up to block `stop`; returns it."""
    stream = streamkit.make(core, settings(weights, path, **more))
    for block, _ in stream.run():
        if block.index + 1 == stop:
            break
    return stream


def pictures(path):
    """Frames of a file, as many as there are."""
    found = []
    try:
        with av.open(str(path)) as container:
            found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except av.error.FFmpegError:
        pass  # of a file that ends in the middle of a frame
    return numpy.stack(found) if found else numpy.zeros((0, 256, 256, 3), numpy.uint8)


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    """The uninterrupted video, lossless."""
    frames = pictures(made(weights, tmp_path_factory.mktemp("whole") / "v").sink.path)
    assert frames.shape == (12 * BLOCKS - 3, 256, 256, 3) and (frames[30] != frames[70]).any()
    return frames


def joined(weights, first, save, folder):
    """The first file, cut where the second one begins, and the second one; goes on from a snapshot."""
    second = made(weights, folder / "second", resume=save)
    before = pictures(first)
    assert len(before) >= second.recorder.start  # what the snapshot counts on is on the disk
    return numpy.concatenate([before[:second.recorder.start], pictures(second.sink.path)])


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_stream_that_goes_on_is_the_video_that_would_have_been(stop, weights, whole, tmp_path):
    """Inside and behind a soft transition, and with the second seed."""
    first = made(weights, tmp_path / "first", stop=stop + 1, save=str(tmp_path / "s"), every=stop)
    assert numpy.array_equal(joined(weights, first.sink.path, tmp_path / "s", tmp_path), whole)
    assert read_note(tmp_path / "second.mkv")["log"] == SCRIPT
    assert read_note(tmp_path / "second.mkv")["start_frame"] == max(0, 12 * stop - 3 - 32)


def test_a_snapshot_holds_no_latents_of_the_past(weights, tmp_path):
    sizes = []
    for blocks in (4, 8):
        made(weights, tmp_path / f"v{blocks}", stop=blocks + 1, save=str(tmp_path / "s"), every=blocks)
        text, tensors = snapshot_file.read(tmp_path / "s")
        sizes.append(sum(t.nbytes for name, t in tensors.items() if name != "stream/tail"))
        assert json.loads(text)["stream"]["frames"] == 12 * blocks - 3 and "latents" not in tensors
    assert sizes[0] == sizes[1]


def killed(weights, folder, after):
    """Start a stream in its own process and kill it `after` seconds behind its third block; returns the path."""
    script = Path(streamkit.__file__)
    told = settings(weights, folder / "first", save=str(folder / "s"), every=1, pause=0.02)
    process = subprocess.Popen([sys.executable, str(script), json.dumps(told)], stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.strip() == "2":
                break
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    return folder / "first.mkv"


def survives(weights, whole, folder, after):
    first = killed(weights, folder, after)
    plays = pictures(first)
    assert numpy.array_equal(plays, whole[:len(plays)])
    if json.loads(snapshot_file.read(folder / "s")[0])["rollout"]["block"][0] + 1 == BLOCKS:
        assert len(plays) >= len(whole) - 32  # it had come to its end
        return
    assert numpy.array_equal(joined(weights, first, folder / "s", folder), whole)


@pytest.mark.parametrize("after", [0.0, 0.35])
def test_a_kill_loses_nothing_before_the_snapshot(after, weights, whole, tmp_path):
    survives(weights, whole, tmp_path, after)


@MANY
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(20))
def test_a_kill_at_any_moment(number, weights, whole, tmp_path):
    survives(weights, whole, tmp_path, random.Random(number).uniform(0, 4))


def test_other_models_and_clips_cannot_be_gone_on_with(weights, tmp_path):
    made(weights, tmp_path / "first", stop=3, save=str(tmp_path / "s"), every=2)
    text, tensors = snapshot_file.read(tmp_path / "s")
    tree = json.loads(text)
    for path, value, words in [
            (("stream", "frames"), -1, "stream/frames.*out of range"), (("stream", "log"), 3, "no list"),
            (("stream", "decoder", "begun"), ["x"], "names no layers"), (("stream",), None, "stream.*missing")]:
        changed = json.loads(text)
        part = changed
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value
        snapshot_file.write(tmp_path / "t", json.dumps(changed), tensors)
        with pytest.raises(ForcingError, match=words):
            made(weights, tmp_path / "second", resume=str(tmp_path / "t"))
    del tree["stream"]
    snapshot_file.write(tmp_path / "t", json.dumps(tree), tensors)
    with pytest.raises(ForcingError, match="of a clip"):
        made(weights, tmp_path / "second", resume=str(tmp_path / "t"))


# -- notes in files -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["mp4", "webm", "mkv lossless"])
def test_a_note_changes_while_the_file_grows(kind, tmp_path):
    """It is read from the growing file, and from the finished one, whose index was written anew."""
    frames = numpy.random.default_rng(0).integers(0, 255, (80, 32, 48, 3), numpy.uint8)
    with VideoSink(tmp_path / "a", 16, kind, note={"n": 0}, metadata={"workflow": "w"}) as sink:
        assert not sink.rewrite({"n": 1})
        sink.write(frames)
        assert read_note(sink.path) == {"n": 1} and sink.rewrite({"n": 2}) and read_note(sink.path) == {"n": 2}
        assert not sink.rewrite({"n": "x" * ROOM}) and read_note(sink.path) == {"n": 2}
        sink.rewrite({"n": 3})
    assert read_note(sink.path) == {"n": 3} and sink.rewrite({"n": 4}) and read_note(sink.path) == {"n": 4}
    with av.open(str(sink.path)) as container:
        assert {key.lower(): value for key, value in container.metadata.items()}["workflow"] == "w"
    assert len(pictures(sink.path)) == 80


@pytest.mark.parametrize("kind", ["mp4", "webm", "mkv lossless"])
def test_what_is_not_in_the_tail_is_on_the_disk(kind, tmp_path):
    frames = numpy.random.default_rng(0).integers(0, 255, (150, 32, 48, 3), numpy.uint8)
    with VideoSink(tmp_path / "a", 16, kind, keep=True) as sink:
        for end in range(30, 151, 30):
            sink.write(frames[end - 30:end])
            tail = sink.tail()
            copy = tmp_path / f"copy.{sink.path.suffix}"
            copy.write_bytes(sink.path.read_bytes() if sink.path.exists() else b"")
            assert len(pictures(copy)) >= end - len(tail) and len(tail) <= 32 + 30
            assert numpy.array_equal(numpy.stack(tail), frames[end - len(tail):end])


def test_the_sound_of_a_second_file_begins_at_its_place(tmp_path):
    wave = numpy.repeat(numpy.linspace(-0.9, 0.9, 40, dtype=numpy.float32), 1000)[None]  # a level for every frame
    with VideoSink(tmp_path / "a", 16, "mkv lossless", audio=Audio(wave, 16000)) as sink:
        sink.hear_from(10)
        sink.write(numpy.zeros((16, 32, 48, 3), numpy.uint8))
    with av.open(str(sink.path)) as container:
        heard = numpy.concatenate([frame.to_ndarray().ravel() for frame in container.decode(audio=0)])
    assert len(heard) == 16000 and abs(heard[0] / 32768 - wave[0, 10000]) < 1e-2


# -- what others see ------------------------------------------------------------------------------------------

def live(now, steering=None):
    return Live("a.1", "1", "a", 16, steering or Steering(), clock=lambda: now[0])


def test_the_state_is_plain_and_counts():
    now, steering, told = [0.0], Steering(), []
    watched = live(now, steering)
    watched.tell, steering.changed = told.append, watched.changed
    assert watched.state()["status"] == "starting" and watched.state()["speed"] == 0
    for block, at in enumerate((1.0, 1.5, 2.0)):
        now[0] = at
        watched.wrote(block, 24 * (block + 1), store_bytes=5)
    state = watched.state()
    assert json.loads(json.dumps(state)) == state and len(told) == 3
    assert (state["status"], state["speed"], state["seconds"], state["store_bytes"]) == ("running", 48.0, 4.5, 5)
    assert state["buffered_seconds"] == 3.5
    steering.send(Command("stop", client="me"))
    steering.boundary(core("plan").Block(3, 9, 3))
    assert told[-1]["status"] == "stopping" and told[-1]["log"][-1]["client"] == "me"
    watched.over("no more")
    assert (told[-1]["status"], told[-1]["error"]) == ("failed", "no more")
    assert kept_ranges((0, 1, 2, 7, 8, 11)) == [[0, 3], [7, 9], [11, 12]] and kept_ranges(()) == []


def test_previews_are_small_few_and_only_for_who_asks():
    now = [100.0]
    previews = Previews(lambda: now[0])
    previews.push(0, numpy.zeros((12, 480, 832, 3), numpy.uint8))
    first, pictures_, newest = previews.after(-1)
    assert (first, len(pictures_), newest) == (11, 1, 11) and pictures_[0][:2] == b"\xff\xd8"
    for start in range(12, 412, 8):
        previews.push(start, numpy.zeros((8, 480, 832, 3), numpy.uint8))
    first, pictures_, newest = previews.after(400)
    assert (first, len(pictures_), newest) == (401, 11, 411)
    assert len(previews.after(-1)[1]) == 96 and previews._frames[0][1].shape == (160, 278, 3)
    assert previews.after(411) == (412, [], 411)
    now[0] += 60
    previews.push(412, numpy.zeros((8, 480, 832, 3), numpy.uint8))
    assert len(previews._frames) == 1
