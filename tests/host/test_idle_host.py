"""The idle portrait in the graph: a stream of it, steered by words, replayed, and with its face."""
import json
from types import SimpleNamespace

import av
import comfy.model_management as mm
import folder_paths
import numpy
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.micro import face, idle, portrait
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.streaming import VideoSink
from forcing_pack.forcing_core.streaming.ear import RATE
from forcing_pack.forcing_core.training.portrait import code_of_faces
from forcing_pack.forcing_core.wan.random import random_network
from forcing_pack.nodes import stream as stream_node
from forcing_pack.nodes.host_conditioning import SOURCES
from forcing_pack.nodes.idle import ForcingIdlePortrait
from forcing_pack.nodes.knot import ForcingKnot
from forcing_pack.nodes.portrait import ForcingMicroPortrait
from forcing_pack.nodes.stream import ForcingStream
from forcing_testkit.hostkit import TWO_STEPS, guider, plain, sample, sampler

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL, MOTION, CLIP, REFERENCE, LATENT, VAE = range(6)
CACHE = WindowOptions(window=9, sink=0, positions="relative")


@pytest.fixture(scope="module")
def small():
    return portrait.Portrait(portrait.silence(random_network(portrait.config(128, 2), 3)), code_of_faces(8, 0))


@pytest.fixture(autouse=True)
def as_nodes_run(small, monkeypatch):
    monkeypatch.setattr(portrait, "load", lambda: small)
    with torch.inference_mode():
        yield


def sound_of(path):
    """Samples [n] of a file, or None."""
    with av.open(path) as container:
        if not container.streams.audio:
            return None
        return numpy.concatenate([frame.to_ndarray().flatten() for frame in container.decode(audio=0)]) / 32768


@pytest.fixture
def stream(monkeypatch, tmp_path):
    """stream(seconds, person=, text=, replay=, knot=, listen=): pictures of the file; heard: its sound, too."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    node = ForcingStream.PREPARE_CLASS_CLONE(None)
    node.hidden = SimpleNamespace(prompt=None, extra_pnginfo=None, unique_id="7")

    def make(seconds=1.9, person=1, text="calm", replay=(), knot=1, reference=True, listen=False, heard=False):
        out = ForcingIdlePortrait.execute(person, 1, text, listen).result
        how = ForcingKnot.execute(sampler(cache=CACHE), knot, reference=out[REFERENCE] if reference else None).result[0]
        log = json.dumps({"version": 1, "log": list(replay)}) if replay else ""
        made = node.execute(SimpleNamespace(seed=3), guider(out[MODEL], out[MOTION]), how, torch.tensor(TWO_STEPS), out[LATENT],
                            out[VAE], seconds, 16.0, "a/b", "mkv lossless", clip=out[CLIP], replay=log)
        path = made.result[0].get_stream_source()
        with av.open(path) as container:
            video = numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)
        return (video, sound_of(path)) if heard else video
    return make


def command(block, at_frame, text, transition="keep"):
    return {"number": 1, "block": block, "at_frame": at_frame, "kind": "prompt", "text": text, "transition": transition}


def test_the_reference_reaches_a_stream(stream):
    """Without it nothing says whose face it is."""
    assert not numpy.array_equal(stream(), stream(person=2))
    assert numpy.array_equal(stream(reference=False), stream(person=2, reference=False))


def test_words_steer_it_from_their_block_on(stream):
    calm, turned = stream(), stream(replay=[command(2, 21, "looks left")])
    assert len(calm) == 33 and numpy.array_equal(calm[:17], turned[:17])
    assert not numpy.array_equal(calm[25:], turned[25:])
    assert numpy.array_equal(turned, stream(replay=[command(2, 21, "looks left")]))  # a log makes the same again


@pytest.mark.parametrize("transition", ["keep", "recache", "soft"])
def test_every_transition_of_a_prompt(stream, transition):
    made = stream(replay=[command(1, 9, "nods and speaks", transition)])
    assert len(made) == 33 and numpy.isfinite(made).all()


def test_a_voice_that_comes_while_it_runs_moves_it_and_is_heard(stream, monkeypatch):
    begin = stream_node.listen

    def spoken_to(guider, fps):
        ear = begin(guider, fps)
        ear.push(0.5 * numpy.sin(numpy.arange(RATE, dtype=numpy.float32)))
        return ear

    assert stream(heard=True)[1] is None
    quiet = stream(listen=True)
    monkeypatch.setattr(stream_node, "listen", spoken_to)
    spoken, sound = stream(listen=True, heard=True)
    assert not numpy.array_equal(quiet, spoken) and len(sound) == 33 * RATE // 16
    assert numpy.abs(sound[:RATE]).max() > 0.3 and not sound[RATE + 20:].any()


def test_without_an_end(stream, monkeypatch):
    """Until Cancel, with the knot and the reference, in the memory of a window."""
    write = VideoSink.write

    def watched(self, frames):
        write(self, frames)
        if self.frames >= 60:
            mm.interrupt_current_processing()

    monkeypatch.setattr(VideoSink, "write", watched)
    endless = stream(0.0)
    assert 60 <= len(endless) < 80 and len(endless) % 12 == 9


def test_the_stream_decodes_what_the_vae_decodes(stream):
    out = ForcingIdlePortrait.execute(1, 1, "calm").result
    how = ForcingKnot.execute(sampler(cache=CACHE), 1, reference=out[REFERENCE]).result[0]
    latents = sample(guider(out[MODEL], out[MOTION]), how, 9, sigmas=TWO_STEPS, size=(8, 8))
    wanted = (out[VAE].decode(latents)[0] * 255).round().numpy()
    assert numpy.abs(stream() - wanted).max() <= 1


def test_a_run_does_not_know_of_the_one_before(small):
    """The source in the conditioning is shared; moods are not."""
    out = ForcingIdlePortrait.execute(1, 1, "calm").result
    source = out[MOTION][0][1][SOURCES]["c_concat"]
    first = source.begin()
    first.of(0, 3, idle.prompt("left"))
    again = source.begin().of(0, 3, idle.prompt("calm"))
    assert torch.equal(again, idle.Idle(small.code, 1).begin().of(0, 3, idle.prompt("calm")))


def test_the_clip_knows_the_words_and_refuses_others():
    clip = ForcingIdlePortrait.execute(1, 1, "calm").result[CLIP]
    made = clip.encode_from_tokens_scheduled(clip.tokenize("looks up"))[0][0]
    assert torch.equal(made, idle.prompt("up"))
    with pytest.raises(ForcingError, match="'sings'"):
        clip.tokenize("sings")


@pytest.mark.parametrize("node", ["idle", "micro"])
def test_another_model_is_refused_by_name(node):
    out = (ForcingIdlePortrait.execute(1, 1, "calm") if node == "idle" else ForcingMicroPortrait.execute(1, 2, 1.0)).result
    with pytest.raises(ForcingError, match="further channels.*Connect the MODEL of the node"):
        sample(guider(plain(), out[MOTION]), sampler(), 3, sigmas=TWO_STEPS)


def test_a_person_is_a_face():
    out = ForcingIdlePortrait.execute(4, 1, "calm").result
    still = face.reference(face.identities(4, 1))[0].movedim(0, -1).add(1).div(2)
    assert (out[VAE].decode(out[REFERENCE]["samples"])[0, 0] - still).abs().mean() < 0.1
