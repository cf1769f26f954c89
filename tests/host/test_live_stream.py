"""Forcing LIVE Stream inside ComfyUI: steered by commands over the routes, written, and replayed from its file."""
import json
from types import SimpleNamespace

import av
import comfy.model_management as mm
import folder_paths
import numpy
import pytest
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.live import Autoencoder, AutoencoderConfig, LiveConfig, LiveModel
from forcing_pack.forcing_core.live.random import fill
from forcing_pack.forcing_core.micro import bundle
from forcing_pack.forcing_core.micro import live as micro
from forcing_pack.forcing_core.streaming import VideoSink
from forcing_pack.forcing_core.streaming.note import read_note
from forcing_pack.nodes import live as nodes
from forcing_pack.nodes import routes, stream_files
from forcing_pack.nodes.live_stream import ForcingLiveStream
from forcing_pack.nodes.micro_world import ForcingMicroWorld

pytestmark = pytest.mark.usefixtures("one_thread")
SECONDS, FPS = 2.0, 8.0
PLAN = {4: [{"kind": "drive", "held": "left"}], 7: [{"kind": "drive", "held": ""}, {"kind": "seed", "seed": 12}],
        9: [{"kind": "drive", "held": "forward"}], 13: [{"kind": "stop"}]}


@pytest.fixture(scope="module")
def live():
    """A micro LIVE of random weights, which moves nothing in particular, but answers to every key."""
    import torch

    net = fill(LiveModel(micro.live_config(32, 1)), 1)
    return nodes.managed(net, micro.PictureVAE(bundle.vae()), net.config, torch.float32)


@pytest.fixture(scope="module")
def image():
    return ForcingMicroWorld.execute("circle", "green", "dark").result[0]


@pytest.fixture
def run(monkeypatch, tmp_path, live, image):
    """run(plan, ...): path of the video. plan: frames written -> commands sent then."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    node = ForcingLiveStream.PREPARE_CLASS_CLONE(None)
    node.hidden = SimpleNamespace(prompt={"1": {}}, extra_pnginfo={}, unique_id="7")
    write = VideoSink.write

    def make(plan=None, length=SECONDS, real_time=False, kind="mkv lossless", **more):
        waiting = dict(plan or {})

        def watched(self, frames):
            write(self, frames)
            for at in [at for at in waiting if self.frames >= at]:
                act = waiting.pop(at)
                act() if callable(act) else send(*act)

        monkeypatch.setattr(VideoSink, "write", watched)
        out = node.execute(live, image, 3, length, FPS, real_time, "a/b", kind, 2, **more)
        monkeypatch.setattr(VideoSink, "write", write)
        return out.result[0].get_stream_source()
    yield make
    mm.interrupt_current_processing(False)


def newest():
    return routes.STREAMS.states()[0]


def send(*commands):
    for command in commands:
        routes.carry_out(routes.STREAMS, newest()["id"], json.dumps({"client": "test", **command}))


def pictures(path, form="rgb24"):
    with av.open(str(path)) as container:
        return numpy.stack([frame.to_ndarray(format=form) for frame in container.decode(video=0)])


def test_a_steered_world_is_replayed_from_its_file(run, image):
    steered, alone = run(PLAN, length=0), run()
    made, plain = pictures(steered), pictures(alone)
    assert len(made) == 13 and len(plain) == 17 == 1 + SECONDS * FPS
    assert numpy.array_equal(made[0], (image[0] * 255).round().byte().numpy())
    assert numpy.array_equal(made[:4], plain[:4]) and not numpy.array_equal(made[4], plain[4])
    note = read_note(steered)
    assert [(e["block"], e["at_frame"], e["kind"], e.get("held", "")) for e in note["log"]] == [
        (3, 4, "drive", "left"), (6, 7, "drive", ""), (6, 7, "seed", ""), (8, 9, "drive", "forward"), (12, 13, "stop", "")]
    again = run(length=0, replay=json.dumps(note))
    assert numpy.array_equal(pictures(again), made) and read_note(again)["log"] == note["log"]
    assert routes.STREAMS.script(newest()["id"]) == {"version": 1, "log": note["log"]}


def test_sixteen_bits_are_those_of_the_autoencoder(run, image):
    made = pictures(run(length=0.5, kind="mkv lossless 16 bit"), "rgb48le")
    assert made.dtype == numpy.uint16 and numpy.array_equal(made[0], (image[0] * 65535).round().numpy())
    assert (made[1:] % 257).any()  # more than eight bits
    assert numpy.abs(made / 257 - pictures(run(length=0.5))).max() <= 0.5


def test_everybody_sees_what_can_be_held(run):
    seen = []
    run({5: [{"kind": "drive", "held": "right"}], 8: lambda: seen.append(newest()), 9: [{"kind": "stop"}]})
    state, = seen
    assert state["drive"] == {"actions": ["left", "right", "forward", "back"], "held": "right", "together": False}
    assert state["status"] == "running" and state["node"] == "7" and state["window"] == {"kept": [[0, 6]], "policy": "LIVE"}
    assert state["store_bytes"] > 0 and newest()["status"] == "done" and newest()["frames"] == 9


def test_pausing_changes_no_frame(run):
    paused = run({3: [{"kind": "pause"}, {"kind": "resume"}]})
    assert numpy.array_equal(pictures(paused), pictures(run()))


def test_a_track_drives_until_a_key_is_pressed(run):
    track = nodes.ForcingActionTrack.execute(81, "1: left").result[0]
    driven = pictures(run(track=track))
    held = pictures(run(replay=json.dumps([{"number": 1, "block": 0, "at_frame": 1, "kind": "drive", "held": "left"}])))
    assert numpy.array_equal(driven, held)
    assert not numpy.array_equal(driven, pictures(run()))


def test_frames_come_when_they_are_due(run):
    import time

    began = time.monotonic()
    run(length=1.0, real_time=True)
    assert time.monotonic() - began > 7 / FPS


def test_cancel_ends_the_world_and_keeps_the_file(run):
    kept = run({6: mm.interrupt_current_processing}, length=0)
    assert len(pictures(kept)) == 6
    with pytest.raises(mm.InterruptProcessingException):
        run({1: mm.interrupt_current_processing}, length=0)
    assert newest()["status"] == "done"


def test_a_long_log_lies_beside_the_file(run, monkeypatch):
    monkeypatch.setattr("forcing_pack.forcing_core.streaming.note.ROOM", 400)
    path = run(PLAN)
    log = json.loads(open(path.replace(".mkv", ".steering.json"), encoding="utf-8").read())["log"]
    assert len(log) == 5
    monkeypatch.setattr(stream_files.args, "disable_metadata", True)
    assert read_note(run(PLAN)) == {}


@pytest.mark.parametrize(("command", "status", "fix"), [
    ({"kind": "drive", "held": "jump"}, 400, "Use left, right, forward, back"),
    ({"kind": "drive", "held": "left right"}, 400, "Hold one of them"),
    ({"kind": "drive", "held": 3}, 400, "held has to be a text"),
    ({"kind": "drive", "keys": "left"}, 400, "has no 'keys'. Leave it out"),
    ({"kind": "prompt", "text": "a red circle"}, 409, "knows no command prompt. Use one of drive"),
    ({"kind": "lora", "strength": 1.0}, 409, "knows no command lora")])
def test_commands_that_make_no_sense_are_refused_with_a_fix(run, command, status, fix):
    found = []

    def refused():
        with pytest.raises(routes.Problem, match=fix) as problem:
            send(command)
        found.append(problem.value.status)
        send({"kind": "stop"})

    run({2: refused})
    assert found == [status] and newest()["frames"] == 2


def test_a_log_of_something_else_is_refused(run):
    entry = {"number": 1, "block": 2, "at_frame": 5, "kind": "drive", "held": "left"}
    with pytest.raises(ForcingError, match="the given frames of the stream that wrote it"):
        run(replay=json.dumps([entry]))
    assert newest()["status"] == "failed" and "block 2 begins at frame 3" in newest()["error"]
    with pytest.raises(ForcingError, match="not trained on the action jump"):
        run(replay=json.dumps([entry | {"at_frame": 3, "held": "jump"}]))


def test_a_camera_is_not_steered_by_keys(image):
    import torch

    net = fill(LiveModel(LiveConfig(dim=64, heads=2, layers=1, latent=(4, 4), window=4, rope=(4, 14, 14))), 1)
    camera = nodes.managed(net, Autoencoder(AutoencoderConfig(channels=32)), net.config, torch.float32)
    node = ForcingLiveStream.PREPARE_CLASS_CLONE(None)
    node.hidden = SimpleNamespace(prompt=None, extra_pnginfo=None, unique_id="7")
    with pytest.raises(ForcingError, match="use Forcing LIVE Sampler"):
        node.execute(camera, image, 1, 1.0, 8.0, False, "a/b", "mp4")
