"""Streaming: what comes out is the video that sampling, decoding and saving at once would give, in constant memory."""
import functools
import gc
import itertools
import json
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import av
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.model_management as mm
import comfy.sd
import comfy.utils
import folder_paths
import numpy
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.options import RolloutOptions
from forcing_pack.forcing_core.policies import RollingOptions, WindowOptions
from forcing_pack.forcing_core.streaming import DecodeStream, EncodeStream, VideoSink
from forcing_pack.forcing_core.track import Segment, Track
from forcing_pack.nodes import stream
from forcing_pack.nodes.host_memory import TRACK
from forcing_pack.nodes.latents import with_given
from forcing_pack.nodes.sampler import CausalSampler
from forcing_pack.nodes.stream import ForcingStream
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import TWO_STEPS, guider, plain, text
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")
RELATIVE = WindowOptions(window=6, sink=1, positions="relative")
PLAIN = RolloutOptions(cache=RELATIVE)
CLASSES = {"2.1": (comfy.ldm.wan.vae.WanVAE, {}), "2.2": (comfy.ldm.wan.vae2_2.WanVAE, {"dec_dim": 4})}
SIZE = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_scales": []}


# -- the VAE --------------------------------------------------------------------------------------------------

@functools.cache
def network(name, time=(False, True, True)):
    """A narrow random VAE in float64, where rounding cannot hide a mistake."""
    kind, more = CLASSES[name]
    vae, draw = kind(dim=4, temperal_downsample=list(time), **SIZE, **more), torch.Generator().manual_seed(7)
    vae.load_state_dict({key: tiny._vae_values(key, value.shape, draw) for key, value in vae.state_dict().items()})
    return vae.double().requires_grad_(False).eval()


@functools.cache
def clip(name):
    """(latents, video) of 21 latent frames: the video as the class decodes it at once."""
    latents = torch.randn(1, 16, 21, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return latents, network(name).decode(latents)


def splits(total, offset=0, step=1):
    """Lists of block sizes that sum to `total`; blocks end at offset + multiples of `step`."""
    def cut(parts):
        ends = {offset + step * end for end in itertools.accumulate(parts)}
        edges = [0, *sorted(end for end in ends if end < total), total]
        return [b - a for a, b in zip(edges, edges[1:])]
    return st.lists(st.integers(1, 5), min_size=1, max_size=total).map(cut)


@pytest.mark.parametrize("name", CLASSES)
@given(st.data())
@settings(max_examples=5, deadline=None)
def test_any_split_decodes_to_the_same_video(name, data):
    latents, video = clip(name)
    sizes = data.draw(splits(21))
    decode = DecodeStream(network(name))
    parts = [decode.push(part) for part in latents.split(sizes, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
    assert hostkit.gap(torch.cat(parts, dim=2), video) <= 1e-9


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("sizes", [[1] * 21, [3] * 7, [21]])
def test_the_splits_of_real_models(name, sizes):
    """One frame after another is where ComfyUI's own layers forget one."""
    latents, video = clip(name)
    decode = DecodeStream(network(name))
    assert hostkit.gap(torch.cat([decode.push(part) for part in latents.split(sizes, dim=2)], dim=2), video) <= 1e-9


@pytest.mark.parametrize("name", CLASSES)
@given(st.data())
@settings(max_examples=4, deadline=None)
def test_any_split_encodes_to_the_same_latents(name, data):
    video = clip(name)[1][:, :, :33]
    sizes = data.draw(splits(33, -3, 4))
    encode = EncodeStream(network(name))
    parts = [encode.push(part) for part in video.split(sizes, dim=2)]
    assert hostkit.gap(torch.cat(parts, dim=2), network(name).encode(video)) <= 1e-9


def test_caches_stay_as_large_as_they_are():
    """Also no views that would keep the frames of a whole block alive."""
    latents, decode, seen = clip("2.1")[0], DecodeStream(network("2.1")), []
    for part in latents.split(3, dim=2):
        decode.push(part)
        slots = [slot for slot in decode._half.slots if isinstance(slot, torch.Tensor)]
        seen.append((decode.nbytes, sum(slot.untyped_storage().nbytes() for slot in slots)))
    assert len({*seen}) == 1 and seen[0][0] == seen[0][1] > 0
    assert DecodeStream(network("2.1"), torch.device("cpu")).nbytes == 0


def test_other_networks_and_frame_counts_are_refused():
    with pytest.raises(ForcingError, match="Linear cannot decode block by block.*Load the Wan 2.1 VAE"):
        DecodeStream(torch.nn.Linear(1, 1))
    with pytest.raises(ForcingError, match="halves time where"):
        DecodeStream(network("2.1", (True, True, False)))
    encode = EncodeStream(network("2.1"))
    with pytest.raises(ForcingError, match="Give 1, 5, 9"):
        encode.push(torch.zeros(1, 3, 4, 16, 16).double())
    encode.push(torch.zeros(1, 3, 1, 16, 16).double())
    with pytest.raises(ForcingError, match="Give 4, 8, 12"):
        encode.push(torch.zeros(1, 3, 1, 16, 16).double())


# -- the node -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tiny.tiny_wan_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors", dim=4)
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


@pytest.fixture
def run(monkeypatch, tmp_path, vae):
    """run(seconds, ...): the path that the node wrote to."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    node = ForcingStream.PREPARE_CLASS_CLONE(None)
    node.hidden = SimpleNamespace(prompt={"1": {}}, extra_pnginfo={"workflow": {"nodes": []}}, unique_id="7")

    def make(seconds, options=PLAIN, *, guide=None, sigmas=TWO_STEPS, latent=None, how=None,
             kind="mkv lossless", **more):
        latent = {"samples": hostkit.latent(3)} if latent is None else latent
        out = node.execute(SimpleNamespace(seed=3), guide or guider(plain()), how or CausalSampler(options),
                           torch.tensor(sigmas), latent, vae, seconds, 16.0, "a/b", kind, **more)
        assert out.ui.as_dict()["images"][0]["subfolder"] == "a"
        return out.result[0].get_stream_source()
    return make


def pictures(path):
    with av.open(path) as container:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@torch.no_grad()
def saved_at_once(vae, options, frames, **more):
    """Sampling, VAE Decode and Save Video, without the file."""
    latents = hostkit.sample(plain(), CausalSampler(options), frames, sigmas=TWO_STEPS, **more)
    return (vae.decode(latents)[0] * 255).round().numpy()


@pytest.mark.parametrize("options", [
    RolloutOptions(cache=RELATIVE), RolloutOptions(block=1, cache=RELATIVE),
    RolloutOptions(block=2, cache=RollingOptions(window=9, sink=2)), RolloutOptions(independent_first=True, cache=RELATIVE),
], ids=["chunks", "frame by frame", "rolling", "first frame alone"])
def test_the_file_holds_what_sampling_and_decoding_at_once_give(run, vae, options):
    path = run(2.1, options)
    frames = {3: 9, 1: 9, 2: 10}[options.block] + options.independent_first
    wanted = saved_at_once(vae, options, frames)
    made = pictures(path)
    assert made.shape == (4 * frames - 3, 32, 48, 3) and numpy.abs(made - wanted).max() <= 1
    assert made[:-1].std() > 10 and (made[1:] != made[:-1]).any()


def test_given_frames_are_the_start(run, vae):
    start = torch.randn(1, 16, 3, *hostkit.SIZE, generator=torch.Generator().manual_seed(21))
    latent = with_given(start, 6)
    made = pictures(run(2.0, latent=latent))
    whole = torch.cat([start, torch.zeros(1, 16, 6, *hostkit.SIZE)], dim=2)
    mask = (torch.arange(9) >= 3).float().view(1, 1, 9, 1, 1)
    assert numpy.abs(made - saved_at_once(vae, RolloutOptions(cache=RELATIVE), 9, start=whole, mask=mask)).max() <= 1


def test_the_file_is_a_video_with_sound_and_the_workflow(run):
    path = run(1.0, kind="mp4", audio={"waveform": torch.zeros(1, 4, 99999), "sample_rate": 16000})
    with av.open(path) as container:
        assert json.loads(container.metadata["workflow"]) == {"nodes": []} and "prompt" in container.metadata
        assert container.streams.video[0].frames == 21 and container.streams.audio[0].channels == 1


def stop_after(monkeypatch, count):
    """Press Cancel when so many frames are written."""
    write = VideoSink.write

    def watched(self, frames):
        write(self, frames)
        if self.frames >= count:
            mm.interrupt_current_processing()

    monkeypatch.setattr(VideoSink, "write", watched)


@pytest.mark.parametrize("options", [
    RolloutOptions(cache=RELATIVE), RolloutOptions(cache=WindowOptions(window=6, positions="rebased")),
    RolloutOptions(block=2, cache=RollingOptions(window=9, sink=2, positions="rebased")),
    RolloutOptions(cache=replace(RELATIVE, compact=True), independent_first=True)])
def test_until_stopped(monkeypatch, run, vae, options):
    """Cancel keeps the file and the graph goes on; the blocks are those of a video of that length."""
    stop_after(monkeypatch, 30)
    made = pictures(run(0.0, options))
    frames = (len(made) + 3) // 4
    assert 30 <= len(made) <= 37 and len(made) % 4 == 1
    longer = {3: frames, 2: frames + 4}[options.block]  # the last blocks of a rolling video end differently
    assert numpy.abs(made - saved_at_once(vae, options, longer)[:len(made)]).max() <= 1


def test_a_track_of_prompts_runs_in_an_endless_video(monkeypatch, run):
    track = Track((Segment(0, text(0)[0][0]), Segment(0.5, text(1)[0][0], "soft", 2), Segment(1.5, text(2)[0][0])))
    stop_after(monkeypatch, 45)
    cond = [[text(0)[0][0], {TRACK: track}]]
    changed, same = pictures(run(0.0, guide=guider(plain(), cond))), pictures(run(0.0))
    assert len(changed) == len(same) == 45
    assert numpy.array_equal(changed[:9], same[:9]) and not numpy.array_equal(changed[21:], same[21:])


def test_progress_of_an_endless_video_is_that_of_a_block(monkeypatch, run):
    seen = []
    monkeypatch.setattr(stream.comfy.utils.ProgressBar, "update_absolute",
                        lambda bar, value, total=None, preview=None: seen.append((value, total, preview)))
    monkeypatch.setattr(stream, "PROGRESS_SECONDS", 0.0)
    stop_after(monkeypatch, 30)
    run(0.0)
    assert set(seen) == {(1, 3, None), (2, 3, None), (3, 3, None)}
    asked, seen[:] = len(seen), []
    monkeypatch.setattr(stream, "PROGRESS_SECONDS", 3600.0)
    stop_after(monkeypatch, 30)
    run(0.0)
    assert len(seen) == 1 < asked  # the page is not told of every step


def test_cancel_before_the_first_block_is_a_cancel(monkeypatch, run, tmp_path):
    mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException):
        run(9.0)
    assert not [*tmp_path.rglob("*.mkv")]


def test_a_full_disk_is_told_and_what_is_there_plays(monkeypatch, run, tmp_path):
    real = VideoSink._write

    def full(self, frame):
        if self.frames == 13:
            raise OSError(28, "No space left on device")
        real(self, frame)

    monkeypatch.setattr(VideoSink, "_write", full)
    with pytest.raises(ForcingError, match="stopped growing after 0.8 s.*disk is full"):
        run(9.0)
    path, = tmp_path.rglob("*.mkv")
    assert len(pictures(str(path))) == 13


@pytest.mark.parametrize("options", [RolloutOptions(cache=RELATIVE),
                                     RolloutOptions(block=2, cache=RollingOptions(window=9, sink=2))])
def test_memory_does_not_depend_on_the_length(monkeypatch, run, options):
    """Ten times the video against one. Live tensors are counted whenever frames were written; the latents of the long
    one would take 180 kB, its frames 2 MB."""
    held, peaks = [], []
    write = VideoSink.write

    def watched(self, frames):
        write(self, frames)
        gc.collect()
        held.append(sum(t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor))

    monkeypatch.setattr(VideoSink, "write", watched)
    gc.collect()
    gc.freeze()  # looking through all that other tests left would take most of the time
    try:
        for seconds in (3.0, 30.0):
            held.clear()
            tracemalloc.start()
            run(seconds, options, sigmas=(1.0, 0.0), kind="mp4")
            peaks.append((max(held), tracemalloc.get_traced_memory()[1]))
            tracemalloc.stop()
    finally:
        gc.unfreeze()
    assert len(held) > 20
    assert peaks[1][0] <= peaks[0][0] + 50_000 and peaks[1][1] <= 1.05 * peaks[0][1] + 200_000


def test_the_guider_gets_one_block_and_reserves_the_whole(monkeypatch, run, vae):
    shapes, asked = [], []
    guide = guider(plain())
    sample, load = type(guide).sample, mm.load_models_gpu
    monkeypatch.setattr(type(guide), "sample", lambda self, noise, *a, **k: shapes.append(noise.shape) or sample(
        self, noise, *a, **k))
    monkeypatch.setattr(mm, "load_models_gpu", lambda models, *a, **k: asked.append(models) or load(models, *a, **k))
    run(2.0, guide=guide)
    assert [tuple(shape) for shape in shapes] == [(1, 16, 3, *hostkit.SIZE)]
    assert {len(models) for models in asked} == {1} and asked[1][0] is vae.patcher
    assert sum(models[0] is guide.model_patcher for models in asked) == 1  # not pushed out, not loaded again


REFUSED = {
    "needs a window, and positions": dict(seconds=0.0, options=RolloutOptions()),
    "memory that does not grow": dict(seconds=0.0, options=RolloutOptions(cache=WindowOptions(positions="relative"))),
    "noise to 'per block'": dict(options=RolloutOptions(noise="reference")),
    "Connect the SAMPLER of Forcing Preset": dict(how=object()),
    "starts every block from pure noise": dict(sigmas=(0.9, 0.5, 0.0)),
    "batch_size 1": dict(latent={"samples": hostkit.latent(3, batch=2)}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_streamed_names_the_fix(run, words):
    with pytest.raises(ForcingError, match=words):
        run(**{"seconds": 9.0, **REFUSED[words]})
