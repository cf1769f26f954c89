"""The micro portrait in the graph: its node's parts make what the standalone rollout makes, driven by the sound it gives."""
import pytest
import torch
from comfy.latent_formats import Wan21
from forcing_pack.forcing_core.conditioning import Held
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.evaluate.portrait import AHEAD
from forcing_pack.forcing_core.micro import face, portrait
from forcing_pack.forcing_core.micro.face_metrics import correlation
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import Knot, knot_rollout
from forcing_pack.forcing_core.schedule import Level
from forcing_pack.forcing_core.training.portrait import code_of_faces
from forcing_pack.forcing_core.wan.random import random_network
from forcing_pack.nodes.host_conditioning import SOURCES
from forcing_pack.nodes.knot import ForcingKnot
from forcing_pack.nodes.portrait import ForcingMicroPortrait
from forcing_testkit.hostkit import TWO_STEPS, guider, relative, sample, sampler

pytestmark = pytest.mark.usefixtures("one_thread")

SECONDS, FRAMES = 2.0, 9
LEVELS = (Level(1000.0, 1.0), Level(625.0, 0.625))
# model, conditioning, reference, latent, vae, audio, puppet
MODEL, DRIVING, REFERENCE, LATENT, VAE, AUDIO, PUPPET = range(7)


@pytest.fixture(scope="module")
def small():
    return portrait.Portrait(portrait.silence(random_network(portrait.config(128, 2), 3)), code_of_faces(8, 0))


@pytest.fixture(autouse=True)
def as_nodes_run(small, monkeypatch):
    monkeypatch.setattr(portrait, "load", lambda: small)
    with torch.inference_mode():
        yield


def parts(audio=None, motion=2, length=SECONDS):
    return ForcingMicroPortrait.execute(1, motion, length, audio).result


def test_the_graph_makes_what_the_core_makes(small):
    out = parts()
    how = ForcingKnot.execute(sampler(cache=WindowOptions(window=9, sink=0, positions="relative")), 1,
                              reference=out[REFERENCE]).result[0]
    made = sample(guider(out[MODEL], out[DRIVING]), how, FRAMES, sigmas=TWO_STEPS, size=(8, 8))
    driving, reference = out[DRIVING][0][1][SOURCES]["c_concat"].tensor, Wan21().process_in(out[REFERENCE]["samples"])
    target = portrait.driven(small, AHEAD, FRAMES, portrait.Drive(driving), ahead=1)
    expected = torch.cat([x0 for _, x0 in knot_rollout(target, layout(FRAMES, 3), LEVELS, BlockNoise(3, (1, 16), (8, 8)),
                                                       knot=Knot(1), reference=reference)], 2)
    assert out[LATENT]["samples"].shape == made.shape
    assert relative(Wan21().process_in(made), expected) < 1e-3


def test_the_driving_track_is_used():
    """A conditioning without it, or another track, makes another video."""
    out, how = parts(), sampler()
    other = ForcingMicroPortrait.execute(1, 3, SECONDS).result
    made = [sample(guider(out[MODEL], cond), how, 3, sigmas=TWO_STEPS, size=(8, 8)) for cond in (out[DRIVING], other[DRIVING])]
    assert relative(*made) > 1e-3


def test_the_vae_is_the_code(small):
    out = parts()
    picture = out[VAE].decode(out[REFERENCE]["samples"])
    still = small.code.decode(small.code.encode(face.reference(face.identities(1, 1))[:, :, None]))
    assert torch.allclose(picture[0, 0].movedim(-1, 0), still[0, :, 0].clamp(-1, 1).add(1).div(2), atol=1e-3)
    again = out[VAE].encode(out[PUPPET])
    driving = out[DRIVING][0][1][SOURCES]["c_concat"]
    assert isinstance(driving, Held) and relative(Wan21().process_in(again), driving.tensor) < 1e-3
    assert out[VAE].decode(again).shape[-4:] == out[PUPPET].shape


def test_loudness_opens_the_mouth():
    """The hum of the track comes out, and going in again it moves the mouth as before; silence keeps it shut."""
    spoken = {"motion": 4, "length": 4.0}
    out = parts(**spoken)
    assert torch.equal(out[PUPPET], parts(out[AUDIO], **spoken)[PUPPET])
    quiet = parts({"waveform": torch.zeros(1, 2, 96000), "sample_rate": 16000}, **spoken)
    drive = face.track(4, 1, out[PUPPET].shape[0])
    moved = (quiet[PUPPET] - out[PUPPET]).abs().mean((1, 2, 3))
    assert correlation(moved[None, 16:], drive[:, 3, 16:]).item() > 0.9


def opening(wave, rate, frames=65):
    return portrait.loudness(wave, rate, frames)


@pytest.mark.parametrize("rate", [11025, 44100, 48000])
def test_every_sample_rate_opens_the_mouth_alike(rate):
    """Also ten minutes on, where a picture is not a whole number of samples."""
    drive = face.track(4, 1, 9600)[0, 3]
    wave = portrait.voice(drive, 16000)
    other = torch.nn.functional.interpolate(wave[None], size=round(wave.shape[1] * rate / 16000), mode="linear")[0]
    same, again = opening(wave, 16000, 9600), opening(other, rate, 9600)
    assert (same - again).abs().max() < 0.15 and correlation(same[None, -160:], again[None, -160:]).item() > 0.99


def test_sound_that_is_short_long_silent_or_missing():
    wave = portrait.voice(face.track(4, 1, 65)[0, 3])
    short = opening(wave[:, :32000], 16000)
    assert short[:30].max() > 0 and not short[32:].any()
    assert opening(wave, 16000, 20).shape == (20,)  # the rest is not used
    assert not opening(torch.zeros(2, 65000), 16000).any()
    for samples, rate in ((0, 16000), (999, 16000), (100, 8)):
        with pytest.raises(ForcingError, match=f"{samples} samples, {rate} a second.*Connect a longer one"):
            opening(torch.zeros(1, samples), rate)
