"""Videos that come in: as a start, as a source of restyling, and tiny autoencoders that show them block by block."""
import atexit
import functools
import io
from fractions import Fraction
from types import SimpleNamespace

import av
import comfy.sd
import comfy.taesd.taehv
import comfy.utils
import folder_paths
import numpy
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.options import RolloutOptions
from forcing_pack.forcing_core.policies import RollingOptions, WindowOptions
from forcing_pack.forcing_core.saved import Saved, split
from forcing_pack.forcing_core.streaming import TinyDecodeStream
from forcing_pack.nodes.host_vae import BlockDecoder
from forcing_pack.nodes.restyle import ForcingRestyle
from forcing_pack.nodes.sampler import CausalSampler
from forcing_pack.nodes.stream import ForcingStream
from forcing_pack.nodes.video import ForcingStartVideo, size_of, taken
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import SIGMAS, TWO_STEPS, gap, guider, plain

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = RolloutOptions(cache=WindowOptions(window=6, sink=1, positions="relative"))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tiny.tiny_wan_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors", dim=4)
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


@functools.cache
def images(count=41, height=32, width=48):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(4))


def start(vae, **inputs):
    """(samples, mask of given frames, source) of the node."""
    made, source = ForcingStartVideo.execute(vae, **{"images": images(), **inputs}).result
    return made["samples"], made["noise_mask"].flatten().tolist(), source["samples"]


def file_of(pictures, times):
    """A VIDEO from a lossless file; pictures uint8."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as file:
        stream = file.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "bgr0"
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return InputImpl.VideoFromFile(buffer)


# -- start ----------------------------------------------------------------------------------------------------

def test_the_last_part_becomes_given_frames_as_the_vae_encodes_it(vae):
    """12 latent frames of 3 s asked for, 9 there: whole blocks, counted from the end."""
    samples, mask, source = start(vae, add=1.0)
    wanted = vae.encode(images()[-33:])
    assert torch.equal(source, samples[:, :, :9]) and gap(source, wanted) < 1e-5 and not samples[:, :, 9:].any()
    assert mask == [0] * 9 + [1] * 3


@pytest.mark.parametrize("inputs, wanted", [
    ({"part": "first", "length": 6, "unit": "latent frames"}, slice(0, 21)),
    ({"part": "last", "length": 6, "unit": "latent frames"}, slice(20, 41)),
    ({"length": 1.5}, slice(20, 41)),
    ({"length": 0, "block": 1}, slice(0, 41)),
    ({"length": 0, "block": 2}, slice(4, 41)),
])
def test_which_part_is_taken(vae, inputs, wanted):
    assert gap(start(vae, **inputs)[2], vae.encode(images()[wanted])) < 1e-5


def test_nothing_added_is_a_start_for_streams(vae):
    samples, mask, source = start(vae, add=0.0)
    assert torch.equal(samples, source) and mask == [0] * 9


def test_a_file_of_variable_rate_is_taken_at_the_models_rate(vae):
    """A second in which four pictures are shown for a quarter each, then 16 a second."""
    pictures = (images(20) * 255).round().byte().numpy()
    video = file_of(pictures, [0, 0.25, 0.5, 0.75, *(1 + i / 16 for i in range(16))])
    _, _, source = start(vae, images=None, video=video, length=0, block=1)
    nearest = [0] * 2 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 2 + [*range(4, 20)]
    exact = torch.from_numpy(pictures[nearest[-29:]]).float() / 255
    assert source.shape[2] == 8 and gap(source, vae.encode(exact)) < 1e-5


def test_a_trimmed_file_starts_where_it_is_cut(vae):
    pictures = (images(20) * 255).round().byte().numpy()
    video = file_of(pictures, [i / 16 for i in range(20)]).as_trimmed(0.25, 0.5625)
    _, _, source = start(vae, images=None, video=video, length=0, block=1)
    assert gap(source, vae.encode(torch.from_numpy(pictures[4:13]).float() / 255)) < 1e-5


def test_a_video_made_in_the_graph_loses_nothing(vae):
    """Its own reader would compress it first."""
    video = InputImpl.VideoFromComponents(Types.VideoComponents(images=images(), frame_rate=Fraction(32)))
    _, _, source = start(vae, images=None, video=video, length=0, block=1)
    assert gap(source, vae.encode(images()[::2])) < 1e-5


@pytest.mark.parametrize("fit, size", [("crop", (32, 48)), ("pad", (48, 64)), ("stretch", (32, 48))])
def test_odd_sizes_by_an_explicit_choice(vae, fit, size):
    odd = images(5, 37, 53)
    _, _, source = start(vae, images=odd, fit=fit, block=1)
    assert tuple(source.shape[3:]) == (size[0] // 8, size[1] // 8)
    if fit != "stretch":  # nothing is resampled
        padded = torch.zeros(5, 48, 64, 3)
        padded[:, 5:42, 5:58] = odd
        wanted = {"pad": padded, "crop": odd[:, 2:34, 2:50]}[fit]
        assert gap(source, vae.encode(wanted)) < 1e-5


def test_sizes():
    """0 keeps the shape; one side alone scales the other along."""
    heights = {fit: size_of(1920, 1080, (0, 0), fit)[1] for fit in ("crop", "pad", "stretch")}
    assert heights == {"crop": 1072, "pad": 1088, "stretch": 1088}
    assert size_of(1920, 1080, (832, 480), "crop") == (832, 480) and size_of(1920, 1080, (832, 0), "stretch") == (832, 464)
    assert size_of(10, 10, (0, 0), "crop") == (16, 16)


def test_frames_that_do_not_fill_a_block():
    assert taken(9, "last", 12, 3) == slice(0, 9) and taken(8, "first", 0, 1) == slice(5)
    with pytest.raises(ForcingError, match="has 8 frames.*a block of 3 latent frames takes 9.*longer video"):
        taken(8, "last", 0, 3)


def test_what_cannot_be_a_start_says_what_to_do(vae):
    with pytest.raises(ForcingError, match="Connect either video or images"):
        start(vae, images=None)
    with pytest.raises(ForcingError, match="no frames"):
        start(vae, images=images()[:0])
    with pytest.raises(ForcingError, match="cannot be opened.*Load a video"):
        start(vae, images=None, video=InputImpl.VideoFromFile(io.BytesIO(b"text")))
    with pytest.raises(ForcingError, match="TAEHV cannot encode block by block.*Load the Wan 2.1 VAE"):
        start(tae())


# -- going on and restyling -----------------------------------------------------------------------------------

def restyled(options, source, strength, motion=0.0):
    return ForcingRestyle.execute(CausalSampler(options), {"samples": source}, strength, motion).result[0]


def source_of(frames=9, **more):
    draw = torch.Generator().manual_seed(8)
    return torch.randn(1, tiny.CHANNELS, frames, *hostkit.SIZE, generator=draw, **more)


def test_full_strength_is_plain_generation():
    plainly = hostkit.sample(plain(), CausalSampler(PLAIN), 9)
    assert torch.equal(hostkit.sample(plain(), restyled(PLAIN, source_of(), 1.0), 9), plainly)


def test_little_strength_gives_the_source_in_the_scale_of_the_vae():
    distances = [hostkit.relative(hostkit.sample(plain(), restyled(PLAIN, source_of(), strength), 9), source_of())
                 for strength in (0.01, 0.8)]
    assert distances[0] < 0.05 < 0.5 < distances[1]


def test_restyling_comes_with_true_progress_and_leaves_the_sampler_alone():
    first = CausalSampler(PLAIN)
    how = ForcingRestyle.execute(first, {"samples": source_of()}, 0.8, 0.0).result[0]
    clip = hostkit.run(plain(), how, 9, sigmas=SIGMAS)
    assert [tick[:2] for tick in clip.ticks][-1] == (7, 8) and first.restyle is None  # 3 blocks of 2 steps, 2 clean passes


def test_restyling_refuses_what_it_cannot_do():
    with pytest.raises(ForcingError, match="32x32 pixels.*Connect the same LATENT"):
        hostkit.sample(plain(), restyled(PLAIN, torch.zeros(1, 16, 9, 4, 4), 0.8), 9)
    with pytest.raises(ForcingError, match="preset self-forcing"):
        restyled(RolloutOptions(cache=RollingOptions(window=9)), source_of(), 0.8)
    with pytest.raises(ForcingError, match="SIGMAS have to be whole"):
        hostkit.sample(plain(), restyled(PLAIN, source_of(), 0.8), 9, sigmas=(0.7, 0.4, 0.0))
    with pytest.raises(ForcingError, match="Only a causal rollout restyles"):
        ForcingRestyle.execute(SimpleNamespace(), {"samples": source_of()}, 0.5, 0.0)
    with pytest.raises(ForcingError, match="latents of a video"):
        ForcingRestyle.execute(CausalSampler(PLAIN), {"samples": torch.zeros(1, 4, 8, 8)}, 0.5, 0.0)


@pytest.fixture
def streamed(monkeypatch, tmp_path, vae):
    """streamed(seconds, sampler, latent): pictures of the lossless file."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    node = ForcingStream.PREPARE_CLASS_CLONE(None)
    node.hidden = SimpleNamespace(prompt={}, extra_pnginfo={}, unique_id="1")

    def make(seconds, how, latent):
        out = node.execute(SimpleNamespace(seed=3), guider(plain()), how, torch.tensor(TWO_STEPS), latent, vae, seconds, 16.0,
                           "a", "mkv lossless")
        with av.open(out.result[0].get_stream_source()) as container:
            return numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return make


def decoded(vae, latents):
    return (vae.decode(latents)[0] * 255).round().numpy()


def test_a_stream_goes_on_with_a_video(streamed, vae):
    latent = ForcingStartVideo.execute(vae, images=images(), length=6, unit="latent frames").result[0]
    made = streamed(2.0, CausalSampler(PLAIN), latent)
    whole = hostkit.sample(plain(), CausalSampler(PLAIN), sigmas=TWO_STEPS, start=latent["samples"][:, :, :9],
                           mask=latent["noise_mask"][:, :, :9])
    assert len(made) == 33 and numpy.abs(made - decoded(vae, whole)).max() <= 1


def test_a_stream_restyles_and_goes_on_behind_the_source(streamed, vae):
    how = restyled(PLAIN, source_of(6), 0.8, 0.1)
    made = streamed(2.0, how, {"samples": hostkit.latent(3)})
    whole = hostkit.sample(plain(), how, 9, sigmas=TWO_STEPS)
    assert len(made) == 33 and numpy.abs(made - decoded(vae, whole)).max() <= 1


# -- tiny autoencoders ----------------------------------------------------------------------------------------

@functools.cache
def tae(dtype=torch.float32):
    """A TAEHV of random weights, opened as Load VAE does."""
    net, draw = comfy.taesd.taehv.TAEHV(latent_channels=16), torch.Generator().manual_seed(6)
    state = {name: tiny._vae_values(name, value.shape, draw).to(dtype) for name, value in net.state_dict().items()}
    return comfy.sd.VAE(sd=state)


atexit.register(tae.cache_clear)  # before ComfyUI is taken apart


@functools.cache
def latents(frames=10):
    return torch.randn(1, 16, frames, 4, 6, generator=torch.Generator().manual_seed(9))


@functools.cache
def at_once():
    return tae().first_stage_model.decode(latents())


@pytest.mark.parametrize("sizes", [[1] * 10, [2] * 5, [3, 3, 3, 1], [1, 3, 3, 3], [5, 4, 1], [10]])
def test_a_tiny_vae_decodes_any_split_exactly(sizes):
    stream = TinyDecodeStream(tae().first_stage_model)
    parts = [stream.push(part) for part in latents().split(sizes, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
    assert torch.equal(torch.cat(parts, dim=2), at_once()) and at_once().std() > 0.05


def test_what_a_tiny_vae_remembers_does_not_grow():
    stream, seen = TinyDecodeStream(tae().first_stage_model), set()
    for part in latents().split(2, dim=2):
        stream.push(part)
        seen.add((stream.nbytes, sum(frame.untyped_storage().nbytes() for frame in stream._before.values())))
    assert len(seen) == 1 and {own == held for own, held in seen} == {True}


def test_a_saved_tiny_decoder_goes_on():
    first, second = (TinyDecodeStream(tae().first_stage_model) for _ in range(2))
    begun = [first.push(latents()[:, :, :4])]
    second.load(Saved(*split(first.state())), latents())
    assert torch.equal(torch.cat([*begun, second.push(latents()[:, :, 4:])], dim=2), at_once())
    with pytest.raises(ForcingError):
        TinyDecodeStream(tae().first_stage_model).load(Saved(*split(first.state())), latents()[..., :4])


@pytest.mark.parametrize("dtype, tiny_vae, rescaled", [
    (torch.float32, "auto", False), (torch.float16, "auto", True), (torch.float32, "model", True),
    (torch.float16, "vae", False),
])
def test_the_scale_of_a_tiny_vae_is_chosen(dtype, tiny_vae, rescaled):
    """As the network itself decodes the latents of the VAE, or those of the diffusion model."""
    vae, model = tae(dtype), plain()
    decoder = BlockDecoder(vae, model, latents().shape, tiny=tiny_vae)
    made = torch.cat([part for block in latents().split(3, dim=2) for part in decoder.frames(block)])
    taken_in = model.model.process_latent_in(latents()) if rescaled else latents()
    stream = TinyDecodeStream(vae.first_stage_model)
    video = stream.push(taken_in.to(vae.vae_dtype))[0].float().clamp(0, 1).movedim(0, -1) * 255
    other = video.sub(made).abs().max()
    assert other <= 1 and made.float().std() > 5


def test_tiny_vaes_of_other_models_are_refused():
    with pytest.raises(ForcingError, match="another model than Wan 2.1"):
        TinyDecodeStream(comfy.taesd.taehv.TAEHV(latent_channels=48))
