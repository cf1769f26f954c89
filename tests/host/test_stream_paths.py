"""Streams that decode beside the sampler, that are gone on with on every path, and that say which prompt rules."""
import contextlib
import functools
import json
import threading
import time
from types import SimpleNamespace

import av
import comfy.model_management as mm
import comfy.sd
import comfy.taesd.taehv
import comfy.utils
import folder_paths
import numpy
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.options import RolloutOptions
from forcing_pack.forcing_core.policies import RollingOptions, WindowOptions
from forcing_pack.forcing_core.streaming import DecodeStream, VideoSink
from forcing_pack.forcing_core.streaming.note import read_note
from forcing_pack.nodes import host_overlap, routes
from forcing_pack.nodes import snapshot as snapshots
from forcing_pack.nodes.knot import ForcingKnot
from forcing_pack.nodes.latents import with_given
from forcing_pack.nodes.restyle import ForcingRestyle
from forcing_pack.nodes.sampler import CausalSampler
from forcing_pack.nodes.stream import ForcingStream
from forcing_pack.nodes.stream_files import words_of
from forcing_pack.nodes.track import ForcingPromptTrack
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import TWO_STEPS, guider, plain

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = RolloutOptions(cache=WindowOptions(window=6, sink=1, positions="relative"))
WORDS, THREAD = {"fox": 1, "dog": 2}, "forcing-decode_0"


class Clip:
    """A text encoder without a patcher, which therefore encodes between two blocks."""

    def tokenize(self, text):
        return WORDS[text]

    def encode_from_tokens_scheduled(self, tokens):
        return [[hostkit.text(tokens)[0][0], {"pooled_output": None}]]


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """{"wan", "tiny"}, of random weights."""
    path = tiny.tiny_wan_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors", dim=4)
    net, draw = comfy.taesd.taehv.TAEHV(latent_channels=16), torch.Generator().manual_seed(6)
    state = {name: tiny._vae_values(name, value.shape, draw) for name, value in net.state_dict().items()}
    yield {"wan": comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path))), "tiny": comfy.sd.VAE(sd=state)}


@pytest.fixture
def run(monkeypatch, tmp_path, vaes):
    """run(how, ...): path of the video, of five blocks unless told otherwise."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    node = ForcingStream.PREPARE_CLASS_CLONE(None)
    node.hidden = SimpleNamespace(prompt={}, extra_pnginfo={}, unique_id="7")

    def make(how=None, *, vae="wan", guide=None, latent=None, length=3.6, kind="mkv lossless", **more):
        out = node.execute(SimpleNamespace(seed=3), guide or guider(plain()), how or CausalSampler(PLAIN),
                           torch.tensor(TWO_STEPS), {"samples": hostkit.latent(3)} if latent is None else latent, vaes[vae],
                           length, 16.0, "a/b", kind, **more)
        return out.result[0].get_stream_source()
    yield make
    mm.interrupt_current_processing(False)


def pictures(path, form="rgb24"):
    with av.open(str(path)) as container:
        return numpy.stack([frame.to_ndarray(format=form) for frame in container.decode(video=0)])


def the_stream():
    return routes.STREAMS.running(routes.STREAMS.states()[0]["id"])


def decoding(monkeypatch, act):
    """Call act(number of the block) before a block is decoded, in the thread that does it."""
    push, count = DecodeStream.push, [0]

    def watched(self, latents):
        count[0] += 1
        act(count[0])
        return push(self, latents)
    monkeypatch.setattr(DecodeStream, "push", watched)


# -- decoding beside the sampler ------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [PLAIN, RolloutOptions(block=2, cache=RollingOptions(window=9, sink=2))],
                         ids=["chunks", "rolling"])
def test_the_same_file_and_one_thread_that_decodes(monkeypatch, run, options):
    names = []
    decoding(monkeypatch, lambda block: names.append(threading.current_thread().name))
    start = torch.randn(1, 16, 2, *hostkit.SIZE, generator=torch.Generator().manual_seed(21))
    latent = with_given(start, 2 + options.block) if options.block == 2 else None
    one = pictures(run(CausalSampler(options), latent=latent))
    assert {*names} == {threading.current_thread().name}
    names.clear()
    other = pictures(run(CausalSampler(options), latent=latent, overlap="on"))
    assert numpy.array_equal(one, other) and one.std() > 10
    assert len(names) > 3 and {*names[1:]} == {THREAD}  # the first one loads the VAE where it is not
    assert THREAD not in {thread.name for thread in threading.enumerate()}


def test_a_block_is_sampled_while_the_one_before_is_decoded(monkeypatch, run):
    """The decoder of block n waits until block n + 1 has come out of the sampler: without a thread that never happens."""
    sampled, write = [threading.Event() for _ in range(6)], host_overlap.Overlap.write

    def came(self, latents, *more):
        next(event for event in sampled if not event.is_set()).set()
        write(self, latents, *more)
    monkeypatch.setattr(host_overlap.Overlap, "write", came)
    waited = []
    decoding(monkeypatch, lambda block: 1 < block < 5 and waited.append(sampled[block].wait(60)))
    assert len(pictures(run(overlap="on"))) == 57 and waited == [True] * 3


def test_an_error_of_the_decoder_ends_the_stream_and_keeps_the_file(monkeypatch, run, tmp_path):
    def broken(block):
        if block == 3:
            raise RuntimeError("the decoder broke")
    decoding(monkeypatch, broken)
    with pytest.raises(RuntimeError, match="the decoder broke"):
        run(overlap="on", length=9.0)
    path, = tmp_path.rglob("*.mkv")
    assert len(pictures(path)) == 21 and THREAD not in {thread.name for thread in threading.enumerate()}
    state = routes.STREAMS.states()[0]
    assert (state["status"], state["error"], state["frames"]) == ("failed", "the decoder broke", 21)


def test_cancel_while_a_block_is_decoded_keeps_every_finished_one(monkeypatch, run):
    whole = pictures(run())
    decoding(monkeypatch, lambda block: block == 2 and (mm.interrupt_current_processing(), time.sleep(0.1)))
    made = pictures(run(overlap="on"))
    assert len(made) in (21, 33) and numpy.array_equal(made, whole[:len(made)])
    assert routes.STREAMS.states()[0]["status"] == "done" and routes.STREAMS.states()[0]["frames"] == len(made)


@pytest.mark.parametrize("broken", [False, True], ids=["cancel", "error"])
@pytest.mark.parametrize("overlap", ["on", "off"])
def test_what_ends_a_stream_while_it_decodes_leaves_a_snapshot(monkeypatch, run, overlap, broken):
    """Of the last block that is in the file: the second file goes on there."""
    def end(block):
        if block == 4:
            if broken:
                raise RuntimeError("the decoder broke")
            raise mm.InterruptProcessingException
    whole = pictures(run())
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="broke") if broken else contextlib.nullcontext():
        decoding(patched, end)
        run(snapshots.ForcingSnapshot.execute(CausalSampler(PLAIN), "s", 0, True).result[0], overlap=overlap)
    assert routes.STREAMS.states()[0]["frames"] == 33
    second = run(snapshots.ForcingResume.execute(CausalSampler(PLAIN), "s.safetensors").result[0])
    start = read_note(second)["start_frame"]
    assert start == 33 - 32 and numpy.array_equal(pictures(second), whole[start:])


def test_stop_and_keep_writes_what_was_sampled(monkeypatch, run):
    def stop(block):
        if block == 2:
            the_stream().steering.send(routes.read_command({"kind": "stop"}))
    decoding(monkeypatch, stop)
    path = run(overlap="on")
    stopped, = read_note(path)["log"]
    assert len(pictures(path)) == stopped["at_frame"] < 57


def test_nothing_is_decoded_while_others_are_loaded(monkeypatch, run):
    """A new prompt is encoded, a LoRA gets another strength: between two blocks, and with the decoder at rest."""
    busy, moved, write = [], [], VideoSink.write

    def slow(block):
        if block == 2:
            for command in ({"kind": "prompt", "text": "fox"}, {"kind": "prompt", "text": "dog"}):
                the_stream().steering.send(routes.read_command(command))
        busy.append(True)
        time.sleep(0.1)

    def written(self, frames):
        write(self, frames)
        busy.clear()

    encode = Clip.encode_from_tokens_scheduled
    monkeypatch.setattr(VideoSink, "write", written)
    monkeypatch.setattr(Clip, "encode_from_tokens_scheduled",
                        lambda self, tokens: moved.append(len(busy)) or encode(self, tokens))
    decoding(monkeypatch, slow)
    steered = run(overlap="on", clip=Clip())
    assert moved == [0, 0]
    monkeypatch.setattr(VideoSink, "write", write)
    again = run(clip=Clip(), replay=json.dumps(read_note(steered)))
    assert numpy.array_equal(pictures(again), pictures(steered))


@pytest.mark.parametrize("change, wanted", [
    ({}, True), ({"free": 149}, False), ({"dynamic": True}, False), ({"held": 9}, False), ({"listed": False}, False),
    ({"free": 149, "apart": True}, True), ({"dynamic": True, "apart": True}, True)])
def test_it_overlaps_only_where_nothing_has_to_move(monkeypatch, change, wanted):
    """By hand: 100 bytes for the decoder, of which it holds 10, and 60 for the model, on one card or on two."""
    how = {"free": 150, "dynamic": False, "held": 10, "listed": True, "apart": False, **change}

    def patcher(device, held=10, dynamic=False):
        return SimpleNamespace(load_device=device, is_dynamic=lambda: dynamic, loaded_size=lambda: held, model_size=lambda: 10)
    card = torch.device("cuda", 0)
    model = patcher(torch.device("cuda", 1) if how["apart"] else card, how["held"], how["dynamic"])
    vae = SimpleNamespace(device=card, patcher=patcher(card))
    listed = [vae.patcher, model] if how["listed"] else [vae.patcher]
    monkeypatch.setattr(mm, "current_loaded_models", [SimpleNamespace(model=one) for one in listed])
    monkeypatch.setattr(mm, "get_free_memory", lambda device: how["free"])
    decoder = SimpleNamespace(vae=vae, patcher=model, needed=100, stream=SimpleNamespace(nbytes=10))
    assert host_overlap.fits(decoder, lambda: 60) is wanted


# -- going on -------------------------------------------------------------------------------------------------

def picture(frames=1, seed=8):
    return torch.randn(1, 16, frames, *hostkit.SIZE, generator=torch.Generator().manual_seed(seed))


def knotted(reference):
    how = CausalSampler(PLAIN)
    return ForcingKnot.execute(how, 1, fuse=True, reference={"samples": picture()} if reference else None).result[0]


PATHS = {
    "overlap": (lambda: CausalSampler(PLAIN), {"overlap": "on"}),
    "restyle": (lambda: ForcingRestyle.execute(CausalSampler(PLAIN), {"samples": picture(12)}, 0.8, 0.1).result[0], {}),
    "knot": (functools.partial(knotted, False), {}),
    "knot and reference": (functools.partial(knotted, True), {}),
    "tiny": (lambda: CausalSampler(PLAIN), {"vae": "tiny"}),
    "16 bit": (lambda: CausalSampler(PLAIN), {"kind": "mkv lossless 16 bit"}),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_goes_on_on_every_path(run, path):
    """The first file, cut where the second one begins, and the second one are the first run's; the snapshot is of block 3."""
    make, more = PATHS[path]
    form = "rgb48le" if "kind" in more else "rgb24"
    more = {"length": 2.9, **more}
    whole = pictures(run(snapshots.ForcingSnapshot.execute(make(), "s", 3, False).result[0], **more), form)
    second = run(snapshots.ForcingResume.execute(make(), "s.safetensors").result[0], **more)
    start = read_note(second)["start_frame"]
    assert len(whole) == 45 and start == 33 - 32 and (whole[33:] != whole[21:33]).any()
    assert numpy.array_equal(pictures(second, form), whole[start:])


def test_another_depth_is_another_file(run):
    run(snapshots.ForcingSnapshot.execute(CausalSampler(PLAIN), "s", 2, False).result[0], length=2.1)
    with pytest.raises(ForcingError, match="have 8 bits a colour, this file 16.*format of the first run"):
        run(snapshots.ForcingResume.execute(CausalSampler(PLAIN), "s.safetensors").result[0], kind="mkv lossless 16 bit")


def test_snapshots_that_were_killed_are_cleaned_up(run, tmp_path):
    """Those of the same name, whatever block they count; not those of others."""
    folder = tmp_path / "snapshots"
    folder.mkdir()
    names = [f".{name}.safetensors.0123456789ab.tmp" for name in ("s2", "s17", "s", "sx", "t2")]
    for name in names:
        (folder / name).write_bytes(b"half")
    run(snapshots.ForcingSnapshot.execute(CausalSampler(PLAIN), "s%block%", 2, False).result[0], length=2.1)
    assert {path.name for path in folder.iterdir()} == {"s2.safetensors", *names[2:]}
    (folder / ".s2.safetensors.0123456789ab.tmp").write_bytes(b"half")
    run(snapshots.ForcingResume.execute(CausalSampler(PLAIN), "s2.safetensors").result[0], length=2.9)
    assert {path.name for path in folder.iterdir()} == {"s2.safetensors", *names[2:]}


# -- what is written and shown --------------------------------------------------------------------------------

@torch.no_grad()
def test_sixteen_bits_are_those_of_the_vae(run, vaes):
    wanted = vaes["wan"].decode(hostkit.sample(plain(), CausalSampler(PLAIN), 6, sigmas=TWO_STEPS))[0].numpy() * 65535
    made = pictures(run(length=1.4, kind="mkv lossless 16 bit"), "rgb48le")
    assert made.shape == wanted.shape == (21, 32, 48, 3) and numpy.abs(made - wanted).max() <= 1
    assert (made % 257).any()  # more than eight bits


def test_the_state_says_the_prompt_from_the_start(monkeypatch, run):
    """That of the track, block by block, until one is steered."""
    said, write = [], VideoSink.write

    def watched(self, frames):
        said.append(the_stream().state()["prompt"])
        if self.frames == 33:
            the_stream().steering.send(routes.read_command({"kind": "prompt", "text": "fox"}))
        write(self, frames)
    monkeypatch.setattr(VideoSink, "write", watched)
    track = ForcingPromptTrack.execute(Clip(), "0 | fox\n1 | dog", "keep").result[0]
    run(guide=guider(plain(), track), clip=Clip())
    assert said == ["fox", "fox", "fox", "dog", "dog"] and routes.STREAMS.states()[0]["prompt"] == "fox"


def test_the_words_of_a_graph():
    graph = {"9": {"inputs": {"guider": ["3:1", 0], "replay": "x"}}, "3:1": {"inputs": {"positive": ["2", 0]}},
             "2": {"inputs": {"clip": ["1", 0], "text": ["5", 0]}}, "5": {"inputs": {"value": "a fox"}},
             "8": {"inputs": {"guider": ["8", 0]}}, "7": {"inputs": {"guider": ["6", 0]}}, "6": {"inputs": {"positive": []}}}
    assert words_of(graph, "9") == "a fox"
    assert words_of(graph, "8") == words_of(graph, "7") == words_of(None, "9") == words_of(graph, None) == ""


def test_cancel_is_no_error_in_the_log(monkeypatch, run, caplog):
    """Neither where the sampler meets it nor where the VAE does, whose block is not finished then."""
    write = VideoSink.write
    with caplog.at_level("INFO"), monkeypatch.context() as patched:
        patched.setattr(VideoSink, "write", lambda self, frames: write(self, frames) or (
            self.frames == 21 and mm.interrupt_current_processing()))
        assert len(pictures(run(length=9.0))) == 21
    assert "Cancelled after 2 of 12 blocks" in caplog.text
    decoding(monkeypatch, lambda block: block == 2 and mm.interrupt_current_processing())
    with caplog.at_level("INFO"):
        assert len(pictures(run(length=9.0))) == 9
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
