"""Clips over ComfyUI's own samplers and portrait models: what is pinned, cut, given out, and what one clip must not change.

Latents are 4x6 (48x32 pixels), clips mostly of 3 latent frames (9 of video).
"""
import atexit
import functools
from types import SimpleNamespace

import av
import comfy.model_management as mm
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.ldm.wan.model_animate import AnimateWanModel
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider, sampler_object
from comfy_extras.nodes_wan import (
    WanAnimateToVideo,
    WanInfiniteTalkToVideo,
    WanSoundImageToVideo,
    WanSoundImageToVideoExtend,
)
from forcing_pack.forcing_core.conditioning import Streamed
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.rollout.clips import Clips
from forcing_pack.forcing_core.streaming.live import Live
from forcing_pack.forcing_core.track import Segment, Track
from forcing_pack.nodes import clip_sampler, host_clips
from forcing_pack.nodes.clips import OWN, ForcingClips
from forcing_pack.nodes.host_clips import REPLACE
from forcing_pack.nodes.host_conditioning import SOURCES
from forcing_pack.nodes.host_memory import TRACK
from forcing_pack.nodes.snapshot import ForcingSnapshot
from forcing_pack.nodes.stream import ForcingStream
from forcing_testkit import hostkit, tiny
from forcing_testkit import tiny_portrait as portrait
from forcing_testkit.hostkit import TWO_STEPS, plain, relative, text
from forcing_testkit.tiny_portrait import Pooled, video

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH = 32, 48
FRAMES = 5  # latent frames: two clips of 3 that share one


@functools.cache
def animate():
    model = hostkit.load(portrait.animate_state_dict(but=["motion_encoder"]))
    model.model.diffusion_model.motion_encoder = portrait.Motion()
    return model


@functools.cache
def i2v():
    return hostkit.load(portrait.i2v_state_dict())


@functools.cache
def s2v():
    return hostkit.load(portrait.s2v_state_dict())


@functools.cache
def talk():
    return portrait.talk_patch()


for cached in (animate, i2v, s2v, talk):
    atexit.register(cached.cache_clear)


@functools.cache
def driven(frames=FRAMES, offset=0, face=True):
    """What WanAnimateToVideo makes: positive, negative, latent, trim_latent, ..."""
    length = 4 * frames - 3
    return WanAnimateToVideo.execute(
        text(), text(1), Pooled(), WIDTH, HEIGHT, length, 1, 5, offset, reference_image=video(1, WIDTH, HEIGHT),
        pose_video=video(17, WIDTH, HEIGHT, 1), face_video=video(17, 64, 64, 2) if face else None).result


def guided(model, positive, negative, cfg=2.0):
    return hostkit.guider(model, positive, negative, cfg, kind=CFGGuider)


def clips(frames=9, overlap=1, knot=0, solver="euler", **more):
    return ForcingClips.execute(sampler_object(solver), frames, overlap, knot, **more).result[0]


def sample(guide, how, frames, seed=3, **more):
    return hostkit.run(guide, how, frames, seed=seed, sigmas=TWO_STEPS, **more)


@pytest.fixture
def watched(monkeypatch):
    """Every clip of a run: what was handed over, and the input of every forward of its network."""
    seen, make = [], clip_sampler.ClipRun.make

    def watch(self, clip, handed):
        inputs, told = [], []
        seen.append(SimpleNamespace(clip=clip, handed=handed, inputs=inputs, told=told))
        net = self.guider.inner_model.diffusion_model

        def before(module, args, kwargs):
            inputs.append(args[0].clone())
            told.append({"timestep": args[1], **kwargs})
        hook = net.register_forward_pre_hook(before, with_kwargs=True)
        try:
            return make(self, clip, handed)
        finally:
            hook.remove()
    monkeypatch.setattr(clip_sampler.ClipRun, "make", watch)
    return seen


def pinned(x, noise, sigma):
    return sigma * noise + (1 - sigma) * x


# -- one clip -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("solver", ["euler", "uni_pc", "euler_ancestral"])
def test_one_clip_is_stock_sampling(solver):
    positive, negative, latent = driven(3)[:3]
    stock, ours = (sample(guided(animate(), positive, negative), how, 4, start=latent["samples"])
                   for how in (sampler_object(solver), clips(9, 1, 1, solver)))
    assert torch.equal(stock.latents, ours.latents) and stock.ticks == ours.ticks
    assert ours.latents.shape == (1, 16, 4, *hostkit.SIZE)


# -- Wan Animate --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("frames", "overlap", "knot"), [(5, 1, 0), (5, 2, 1), (4, 1, 1)])
def test_the_overlap_is_the_hand_over_before_every_forward(watched, frames, overlap, knot):
    positive, negative, latent = driven(frames)[:3]
    made = sample(guided(animate(), positive, negative), clips(9, overlap, knot), frames + 1, start=latent["samples"])
    assert made.latents.shape[2] == frames + driven(frames)[3]  # emitted as announced; WanAnimateToVideo trims the reference
    noise = torch.randn(1, 16, frames + 1, *hostkit.SIZE, generator=torch.Generator().manual_seed(3))
    assert watched[0].handed is None and len(watched) > 1
    for seen in watched[1:]:
        assert len(seen.inputs) == 2  # two steps, both conditions in one forward
        first = 1 + seen.clip.first
        for x, sigma in zip(seen.inputs, TWO_STEPS):
            assert x.shape[:3] == (2, 36, 1 + seen.clip.frames)
            over, rest = x[:, :, 1:1 + overlap], x[:, :, 1 + overlap:]
            assert torch.equal(over[:, 20:], seen.handed.expand(2, -1, -1, -1, -1)) and (over[:, 16:20] == 1).all()
            assert (rest[:, 16:20] == 0).all() and (x[:, 16:20, 0] == 1).all()
            wanted = pinned(seen.handed, noise[:, :, first:first + overlap], sigma)
            assert torch.allclose(over[:, :16], wanted.expand(2, -1, -1, -1, -1), atol=1e-5)
    ticks = [(step, total) for step, total, _ in made.ticks]
    assert ticks == [(n, 2 * len(watched)) for n in range(2 * len(watched))] + [(2 * len(watched) - 1, 2 * len(watched))]
    assert made.ticks[-1][2] == made.latents.shape


def test_a_chain_of_native_runs_gives_the_same(watched):
    """The second clip by hand: the native node's conditioning at that offset, the first clip's latents in its channels, and
    ComfyUI's inpainting for what stands in the noisy latents."""
    positive, negative, latent = driven()[:3]
    whole = sample(guided(animate(), positive, negative), clips(), 6, start=latent["samples"]).latents
    noise = torch.randn(1, 16, 6, *hostkit.SIZE, generator=torch.Generator().manual_seed(3))
    first = sample(guided(animate(), *driven(3)[:2]), sampler_object("euler"), 4, noise=noise[:, :, :4]).latents
    assert relative(whole[:, :, :4], first) < 1e-5

    def second(conds):
        values = {**conds[0][1], "concat_latent_image": conds[0][1]["concat_latent_image"].clone(),
                  "concat_mask": conds[0][1]["concat_mask"].clone()}
        values["concat_latent_image"][:, :, 1], values["concat_mask"][:, :, 1] = first[:, :, 3], 0
        values["pose_video_latent"] = driven()[0][0][1]["pose_video_latent"][:, :, 2:5]
        return [[conds[0][0], values]]
    start, mask = torch.zeros(1, 16, 4, *hostkit.SIZE), torch.ones(1, 1, 4, 1, 1)
    start[:, :, 1], mask[:, :, 1] = first[:, :, 3], 0
    at = [0, 3, 4, 5]
    guide = guided(animate(), *map(second, driven(3, offset=8)[:2]))
    chained = sample(guide, sampler_object("euler"), 4, noise=noise[:, :, at], start=start, mask=mask).latents
    assert relative(whole[:, :, 4:], chained[:, :, 2:]) < 1e-4


def test_a_knot_becomes_the_mean(monkeypatch):
    positive, negative, latent = driven()[:3]
    versions, make = [], clip_sampler.ClipRun.make
    monkeypatch.setattr(clip_sampler.ClipRun, "make", lambda self, clip, handed: versions.append(
        (clip, handed, make(self, clip, handed))) or versions[-1][2])
    made = sample(guided(animate(), positive, negative), clips(9, 2, 1), 6, start=latent["samples"]).latents
    made = animate().model.process_latent_in(made)[:, :, 1:]
    for clip, handed, x0 in versions[1:]:
        mean = (handed[:, :, 1] + x0[:, :, 1]) / 2
        assert relative(made[:, :, clip.first + 1], mean) < 1e-5 and relative(handed[:, :, 1], mean) > 1e-3


def test_slices_are_what_the_native_node_gives(watched, monkeypatch):
    """Face pixels of the second clip are those of the node with that offset; pose latents those of the whole video, which
    from a clip's second latent frame on are the node's, too."""
    got, plain_way = [], AnimateWanModel.after_patch_embedding
    monkeypatch.setattr(AnimateWanModel, "after_patch_embedding", lambda self, x, pose, face: got.append((pose, face)) or
                        plain_way(self, x, pose, face))
    positive, negative, latent = driven()[:3]
    sample(guided(animate(), positive, negative), clips(), 6, start=latent["samples"])
    whole, native = (driven(*how)[0][0][1] for how in ((FRAMES, 0), (3, 8)))
    scale = animate().model.process_latent_in
    (pose, face), second = got[-1], watched[1].clip
    assert second.first == 2 and face.shape[2] == 9 and pose.shape[2] == 3
    assert any(torch.equal(part, native["face_video_pixels"][0]) for part in face)
    assert any(torch.equal(part, torch.full_like(part, -1)) for part in face)  # the negative one
    assert torch.allclose(pose[0], scale(whole["pose_video_latent"])[0, :, 2:5], atol=1e-6)
    assert torch.allclose(pose[0, :, 1:], scale(native["pose_video_latent"])[0, :, 1:], atol=1e-5)


def test_what_is_streamed_is_the_same_and_read_in_order():
    positive, negative, latent = driven()[:3]
    asked = []

    def streamed(conds):
        values = dict(conds[0][1])
        face = values.pop("face_video_pixels")

        def make(first, count):
            asked.append((first, count))
            return face[:, :, first:first + count]
        return [[conds[0][0], {**values, SOURCES: {"face_pixel_values": Streamed(make, face.shape[2])}}]]
    held = sample(guided(animate(), positive, negative), clips(), 6, start=latent["samples"]).latents
    guide = guided(animate(), streamed(positive), streamed(negative))
    assert torch.equal(sample(guide, clips(), 6, start=latent["samples"]).latents, held)
    assert asked == [(0, 9)] * 2 + [(9, 8)] * 2
    without = driven(face=False)
    assert relative(sample(guided(animate(), *without[:2]), clips(), 6).latents, held) > 1e-3


def test_running_ahead_moves_the_reference_only(monkeypatch):
    seen, stock = [], AnimateWanModel.forward_orig
    monkeypatch.setattr(AnimateWanModel, "forward_orig", lambda self, *args, freqs=None, **kwargs: seen.append(freqs) or
                        stock(self, *args, freqs=freqs, **kwargs))
    positive, negative, latent = driven(3)[:3]
    guide, net = guided(animate(), positive, negative), animate().model.diffusion_model
    made = [sample(guide, clips(ahead=ahead), 4, start=latent["samples"]).latents for ahead in (0, 2)]
    tokens = 6
    assert torch.equal(seen[0][:, tokens:], seen[-1][:, tokens:]) and not torch.equal(seen[0], seen[-1])
    assert torch.equal(seen[-1][:, :tokens], net.rope_encode(1, *hostkit.SIZE, t_start=5, device="cpu", dtype=torch.float32))
    assert "rope_encode" not in vars(net) and relative(*made) > 1e-4


# -- InfiniteTalk ---------------------------------------------------------------------------------------------------

MASKS = (torch.cat([torch.ones(1, HEIGHT, WIDTH // 2), torch.zeros(1, HEIGHT, WIDTH // 2)], 2),)
MASKS += (1 - MASKS[0],)
LISTENED = portrait.LAYERS_HEARD + 1, portrait.FEATURES


def talking(length, speakers=1, previous=None, masks=MASKS):
    """What WanInfiniteTalkToVideo makes: model, positive, negative, latent."""
    mode = {"mode": "single_speaker"} if speakers == 1 else {
        "mode": "two_speakers", "audio_encoder_output_2": portrait.heard(*LISTENED, seed=1), "mask_1": masks[0],
        "mask_2": masks[1]}
    return WanInfiniteTalkToVideo.execute(
        mode, i2v(), talk(), text(), text(1), Pooled(), WIDTH, HEIGHT, length, portrait.heard(*LISTENED), 1,
        start_image=video(1, WIDTH, HEIGHT), previous_frames=previous, audio_scale=1.0).result


@pytest.mark.parametrize("speakers", [1, 2])
def test_infinitetalk(watched, speakers):
    model, positive, negative, latent, _ = talking(17, speakers)
    made = sample(guided(model, positive, negative, 1.0), clips(9, 1), FRAMES, start=latent["samples"]).latents
    assert made.shape[2] == FRAMES and torch.isfinite(made).all()
    second = watched[1]
    start = watched[0].inputs[0][:, 16:]
    for x, told in zip(second.inputs, second.told, strict=True):
        assert torch.equal(x[:, :16, :1], second.handed)
        assert torch.equal(x[:, 16:], start)  # the start image goes with every clip, as the node has it
        tokens = told["transformer_options"]["audio_embeds"]
        assert torch.equal(tokens, model.model_options["transformer_options"]["audio_embeds"][:, 2:5])
    extended = talking(9, speakers, previous=video(9, WIDTH, HEIGHT))[0]
    native = extended.model_options["transformer_options"]["audio_embeds"]
    assert torch.allclose(tokens[:, 1:], native[:, 1:], atol=1e-5) and tokens.shape == native.shape


def test_two_speakers_are_told_apart_in_every_clip():
    made = [sample(guided(model, positive, negative, 1.0), clips(9, 1), FRAMES).latents
            for model, positive, negative, *_ in (talking(17, 2), talking(17, 2, masks=MASKS[::-1]))]
    assert all(relative(a, b) > 1e-4 for a, b in zip(*(m.split([3, 2], dim=2) for m in made)))


# -- Wan S2V ----------------------------------------------------------------------------------------------------------

def test_s2v_is_the_native_chain_of_extensions(watched):
    """Latents of 8x8, the least that its motion latents are packed from."""
    size, heard = (8, 8), {"audio_encoder_output": portrait.heard(25, 1024), "ref_image": video(1, 64, 64)}

    def spoken(length):
        return WanSoundImageToVideo.execute(text(), text(1), Pooled(), 64, 64, length, 1, **heard).result

    noise = torch.randn(1, 16, 6, *size, generator=torch.Generator().manual_seed(5))
    whole = sample(guided(s2v(), *spoken(21)[:2]), clips(13, 2), 6, noise=noise, size=size).latents
    assert whole.shape[2] == 6 and [seen.clip.frames for seen in watched] == [4, 2]
    first = sample(guided(s2v(), *spoken(13)[:2]), sampler_object("euler"), 4, noise=noise[:, :, :4], size=size).latents
    more = WanSoundImageToVideoExtend.execute(text(), text(1), Pooled(), 5, {"samples": first}, **heard).result
    second = sample(guided(s2v(), *more[:2]), sampler_object("euler"), 2, noise=noise[:, :, 4:], size=size).latents
    assert relative(whole[:, :, :4], first) < 1e-5 and relative(whole[:, :, 4:], second) < 1e-4
    assert torch.equal(watched[1].told[0]["reference_motion"][:1], watched[1].handed)


def test_s2v_has_no_knot_and_keeps_its_reference_ahead():
    guide = hostkit.guider(s2v(), kind=CFGGuider)
    with pytest.raises(ForcingError, match="Set the knot to 0, or hand_over to 'replacement'"):
        sample(guide, clips(9, 2, 1), FRAMES, size=(8, 8))
    with pytest.raises(ForcingError, match="ahead of the clip by itself"):
        sample(guide, clips(ahead=1), 3, size=(8, 8))


# -- other models -----------------------------------------------------------------------------------------------------

def test_models_with_timesteps_of_frames(watched):
    """Wan 2.2 5B: the overlap is clean, at timestep 0."""
    model = hostkit.load(portrait.wan22_state_dict())
    sample(hostkit.guider(model, kind=CFGGuider), clips(), FRAMES, start=torch.zeros(1, 48, FRAMES, *hostkit.SIZE))
    for x, told, sigma in zip(watched[1].inputs, watched[1].told, TWO_STEPS):
        assert torch.equal(x[:, :, :1], watched[1].handed)
        assert told["timestep"].flatten().tolist() == pytest.approx([0.0, 1000 * sigma, 1000 * sigma])


def test_replacement_works_with_every_model(watched):
    made = sample(hostkit.guider(plain(), kind=CFGGuider), clips(hand_over=REPLACE), FRAMES).latents
    noise = torch.randn(1, 16, FRAMES, *hostkit.SIZE, generator=torch.Generator().manual_seed(3))
    for x, sigma in zip(watched[1].inputs, TWO_STEPS):
        assert torch.allclose(x[:, :, :1], pinned(watched[1].handed, noise[:, :, 2:3], sigma), atol=1e-6)
    assert made.shape[2] == FRAMES


def test_a_prompt_track_changes_prompts_between_clips(watched):
    """The second prompt begins in the third clip, whose first new frame (5) is the first behind it (4)."""
    track = Track((Segment(0, text(0)[0][0], frames=True), Segment(4, text(2)[0][0], frames=True)))
    guide = hostkit.guider(plain(), [[text(0)[0][0], {TRACK: track}]], kind=CFGGuider)
    sample(guide, clips(hand_over=REPLACE), 7)
    prompts = [{told["context"].sum().item() for told in seen.told} for seen in watched]
    assert len(watched) == 3 and prompts[0] == prompts[1] != prompts[2] and all(len(p) == 1 for p in prompts)


def test_bad_input_is_refused():
    guide = hostkit.guider(plain(), kind=CFGGuider)
    with pytest.raises(ForcingError, match="no place for frames that are given.*'replacement'"):
        sample(guide, clips(), FRAMES)
    with pytest.raises(ForcingError, match="Set ahead to 0; Wan Animate"):
        sample(guide, clips(ahead=1), 3)
    with pytest.raises(ForcingError, match="80 frames.*Use 77 or 81"):
        clips(80)
    with pytest.raises(ForcingError, match="at most 2"):
        clips(9, 3)
    for how in (hostkit.sampler(), clips()):
        with pytest.raises(ForcingError, match="Connect KSamplerSelect"):
            ForcingClips.execute(how, 9, 1, 0)
    with pytest.raises(ForcingError, match="must end with 0"):
        hostkit.run(guide, clips(hand_over=REPLACE), FRAMES, sigmas=(1.0, 0.5))
    with pytest.raises(ForcingError, match="carries.*time_warp"):
        sample(guided(plain(), [[text()[0][0], {SOURCES: {"time_warp": Streamed(None, 3)}}]], None, 1.0), clips(), 3)
    with pytest.raises(ForcingError, match="Only a causal rollout can be saved"):
        ForcingSnapshot.execute(clips(), "name", 1, True)
    cached = plain().clone()
    cached.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "easycache", lambda executor, *args, **kw: executor(*args, **kw))
    with pytest.raises(ForcingError, match="Remove the EasyCache node"):
        sample(hostkit.guider(cached, kind=CFGGuider), clips(hand_over=REPLACE), FRAMES)
    with pytest.raises(ForcingError, match="CausalWanModel, which is not made in clips"):
        sample(hostkit.guider(hostkit.causal(), kind=CFGGuider), clips(hand_over=REPLACE), FRAMES)


def test_an_interrupt_leaves_the_guider_as_it_was():
    guide = hostkit.guider(plain(), kind=CFGGuider)

    def stop(step, x0):
        if step == 2:
            mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException):
        sample(guide, clips(hand_over=REPLACE), FRAMES, on_tick=stop)
    assert sample(guide, clips(hand_over=REPLACE), FRAMES).latents.shape[2] == FRAMES


def test_weights_are_placed_for_a_clip(monkeypatch):
    """ComfyUI reserves for what the sampler is called with, the whole video."""
    asked = []
    monkeypatch.setattr(host_clips.mm, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(host_clips.mm, "load_models_gpu", lambda models, **how: asked.append((models[0], how)))
    patcher = plain()
    guide = SimpleNamespace(model_patcher=patcher, loaded_models=[], conds={})
    host_clips.fit_weights(guide, (1, 16, 3, *hostkit.SIZE))
    (model, how), = asked
    assert model is patcher and how["memory_required"] == patcher.model.memory_required([2, 16, 3, *hostkit.SIZE])


# -- Forcing Stream ---------------------------------------------------------------------------------------------------

@pytest.fixture
def stream(monkeypatch, tmp_path):
    """stream(seconds, guider, sampler, latent): frames of the file that Forcing Stream writes."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    path = tiny.tiny_wan_vae(tmp_path / "vae.safetensors", dim=4)
    decoder = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))
    node = ForcingStream.PREPARE_CLASS_CLONE(None)
    node.hidden = SimpleNamespace(prompt={}, extra_pnginfo={}, unique_id="7")

    def make(seconds, guide, how, latent, **more):
        out = node.execute(SimpleNamespace(seed=3), guide, how, torch.tensor(TWO_STEPS), latent, decoder, seconds, 16.0, "a/b",
                           "mkv lossless", **more)
        with av.open(out.result[0].get_stream_source()) as container:
            return sum(1 for _ in container.decode(video=0))
    return make


def test_frames_leave_as_clips_are_finished(stream, watched):
    positive, negative, latent = driven(3)[:3]  # its length does not count, and the driving video may end
    guide = guided(animate(), positive, negative)
    assert stream(1.1, guide, clips(), latent) == 17
    assert [seen.clip.frames for seen in watched] == [3, 3]
    again = [seen.inputs[0] for seen in watched]
    watched.clear()
    assert stream(0.5, guide, clips(), latent) == 9
    assert torch.equal(watched[0].inputs[0], again[0])  # a longer video begins as the shorter one


def test_the_state_says_the_prompt_that_a_clip_was_made_with(stream, watched, monkeypatch):
    """That of its first new frame: the third clip begins with frame 4 and makes those from 5 on."""
    said, wrote = [], Live.wrote
    monkeypatch.setattr(Live, "wrote", lambda self, *args, **numbers: said.append(numbers["prompt"]) or
                        wrote(self, *args, **numbers))
    track = Track((Segment(0, text(0)[0][0], frames=True, text="fox"), Segment(5, text(2)[0][0], frames=True, text="dog")))
    guide = hostkit.guider(plain(), [[text(0)[0][0], {TRACK: track}]], kind=CFGGuider)
    assert stream(1.5, guide, clips(hand_over=REPLACE), {"samples": hostkit.latent(3)}) == 25
    prompts = [{told["context"].sum().item() for told in seen.told} for seen in watched]
    assert said == ["fox", "fox", "dog"] and prompts[0] == prompts[1] != prompts[2]


def test_cancel_ends_an_endless_stream_and_keeps_it(stream, monkeypatch):
    make = clip_sampler.ClipRun.make

    def watch(self, clip, handed):
        if clip.index == 2:
            mm.interrupt_current_processing()
        return make(self, clip, handed)
    monkeypatch.setattr(clip_sampler.ClipRun, "make", watch)
    assert stream(0.0, guided(animate(), *driven(3)[:2]), clips(hand_over=OWN), driven(3)[2]) == 17


def test_a_replayed_log_stops_a_stream_and_changes_its_seed(stream, watched):
    log = ('[{"number": 1, "block": 1, "at_frame": 9, "kind": "seed", "seed": 9},'
           ' {"number": 2, "block": 2, "at_frame": 17, "kind": "stop"}]')
    guide = guided(animate(), *driven(3)[:2])
    assert stream(60.0, guide, clips(), driven(3)[2], replay=log) == 17
    changed = watched[1].inputs[0]
    watched.clear()
    stream(1.1, guide, clips(), driven(3)[2])
    assert not torch.equal(watched[1].inputs[0], changed) and len(watched) == 2


def test_the_announced_layout_of_s2v_has_no_overlap():
    assert host_clips.clips_on(s2v().model, Clips(21, 2), None) == Clips(21, 0, 0, 19)
    assert host_clips.clips_on(s2v().model, Clips(21, 2), REPLACE) == Clips(21, 2)
