"""ComfyUI's S2V network over causal rollouts: sound and control by block, and pictures that every forward has in view."""
import functools

import comfy.lora
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_audio_encoder import AudioEncoderEncode
from comfy_extras.nodes_wan import WanSoundImageToVideo
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.policies import RecencyOptions, WindowOptions
from forcing_pack.nodes import host_s2v
from forcing_pack.nodes.host_memory import run_bytes, shape_of
from forcing_pack.nodes.sampling import ForcingPreset
from forcing_testkit import densekit, hostkit, tiny, tiny_s2v
from forcing_testkit.forcing_corekit import gap
from forcing_testkit.hostkit import TWO_STEPS, guider, sampler, text
from forcing_testkit.testnodes.voice import Ear
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention

FRAMES, SIZE, TOKENS = 9, (8, 8), 16
EXACT = {"block": 3, "noise": "comfy"}  # with which the time embedding is computed as ComfyUI computes it
ALL = ("sound", "control", "reference", "motion")
sample = functools.partial(hostkit.sample, size=SIZE, sigmas=TWO_STEPS)


@pytest.fixture(scope="module")
def model():
    return hostkit.load(tiny_s2v.s2v_state())


@functools.cache
def drawn(frames=48):
    """Values that WanSoundImageToVideo sets, by what they are; not to be changed."""
    draw = torch.Generator().manual_seed(70)
    return {"sound": torch.randn(1, tiny_s2v.SOUND_LAYERS, tiny_s2v.SOUND_DIM, 4 * frames, generator=draw),
            "control": torch.randn(1, 16, frames, *SIZE, generator=draw),
            "reference": torch.randn(1, 16, 1, *SIZE, generator=draw),
            "motion": torch.randn(1, 16, 19, *SIZE, generator=draw)}


def spoken(frames=FRAMES, parts=ALL, seed=0, **changes):
    """Conditioning with these parts for so many latent frames."""
    given = {**{name: drawn()[name] for name in parts}, **changes}
    values = {"audio_embed": given["sound"][..., :4 * frames] if "sound" in given else None,
              "control_video": given["control"][:, :, :frames] if "control" in given else None,
              "reference_latents": [given["reference"]] if "reference" in given else None,
              "reference_motion": given.get("motion")}
    return [[text(seed)[0][0], {name: value for name, value in values.items() if value is not None}]]


# -- against ComfyUI's own forward -----------------------------------------------------------------------------

def attention(ends, pictures):
    """ComfyUI's attention where a frame sees up to its block's end and all pictures, and pictures see each other."""
    frames, total = ends[-1], ends[-1] * TOKENS + pictures
    until = torch.tensor([next(end for end in ends if f < end) for f in range(frames)])
    mask = torch.zeros(total, total, dtype=torch.bool)
    video = (torch.arange(frames)[None] < until[:, None]).repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
    mask[:frames * TOKENS, :frames * TOKENS] = video
    mask[:, frames * TOKENS:] = True

    def attend(func, q, k, v, heads, *args, **kwargs):
        parts = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        own = mask if q.shape[1] == k.shape[1] == total else None
        return scaled_dot_product_attention(*parts, attn_mask=own).transpose(1, 2).flatten(2)
    return attend


def stock(model, condition, x, times, **options):
    """ComfyUI's velocity for frames [1, 16, F, h, w] at these timesteps, with what it encodes of the conditioning."""
    values, frames = condition[0][1], x.shape[2]
    made = model.model.extra_conds(noise=x, device="cpu", **values)
    given = {name: made[name].cond for name in host_s2v.EXTRAS if name in made}
    if "control_video" in given:
        given["control_video"] = given["control_video"][:, :, :frames]
    with torch.no_grad(), hostkit.one_thread():
        return model.model.diffusion_model(x, torch.tensor([times]), condition[0][0], transformer_options=options, **given)


def largest_gap(model, seen, condition, pictures):
    """As `densekit.largest_gap`, for a network with pictures."""
    clean, ends, worst = [], [], 0.0
    for phase, first, levels, x, x0 in seen:
        if phase == "clean":
            clean.append(x)
            ends.append(first + x.shape[2])
            continue
        inside = torch.cat([*clean, x], dim=2)
        times = [0.0] * first + [level.timestep for level in levels]
        velocity = stock(model, condition, inside, times,
                         optimized_attention_override=attention([*ends, inside.shape[2]], pictures))
        expected = x - levels[-1].sigma * velocity[:, :, first:]
        worst = max(worst, gap(x0, expected) / float(expected.abs().max()))
    return worst


@pytest.mark.parametrize(("parts", "pictures"), [
    (ALL, 40), (("sound",), 0), (("control", "reference"), 16), (("sound", "motion"), 24)],
    ids=["all", "sound", "reference", "motion"])
def test_a_rollout_equals_the_stock_model_under_a_dense_mask(model, parts, pictures, monkeypatch):
    """Guards slices of the sound and what its encoder looks back at, the kept pictures and their places, marks of tokens."""
    seen = densekit.watch_forwards(monkeypatch)
    condition = spoken(parts=parts)
    sample(guider(model, condition), sampler(**EXACT), FRAMES)
    assert [call[:2] for call in seen if call[0] == "noisy"] == [("noisy", f) for f in (0, 0, 3, 3, 6, 6)]
    assert largest_gap(model, seen, condition, pictures) <= 1e-5
    for name in parts:  # each matters
        other = spoken(parts=parts, **{name: drawn()[name].flip(1) + 0.5})
        assert largest_gap(model, seen[:1], other, pictures) > 1e-3, name


@pytest.mark.parametrize("parts", [("sound",), ("sound", "control")], ids=len)
def test_the_first_block_is_what_the_stock_model_makes_of_its_own_conditioning(model, parts, monkeypatch):
    """No mask at all: a video of one block. Pictures differ from it in that they do not look at the video."""
    seen = densekit.watch_forwards(monkeypatch)
    sample(guider(model, spoken(parts=parts)), sampler(**EXACT), FRAMES)
    for _, _, levels, x, x0 in seen[:2]:
        expected = x - levels[-1].sigma * stock(model, spoken(3, parts), x, [level.timestep for level in levels])
        assert gap(x0, expected) / float(expected.abs().max()) <= 1e-5


def test_the_first_block_needs_only_its_own_conditioning(model):
    long = sample(guider(model, spoken()), sampler(), FRAMES)
    assert torch.equal(long[:, :, :3], sample(guider(model, spoken(3)), sampler(), 3))
    sound = torch.cat([drawn()["sound"][..., :12], -drawn()["sound"][..., 12:]], dim=3)
    other = sample(guider(model, spoken(sound=sound)), sampler(), FRAMES)
    assert torch.equal(other[:, :, :3], long[:, :, :3]) and hostkit.relative(other[:, :, 3:6], long[:, :, 3:6]) > 1e-2


# -- long videos -----------------------------------------------------------------------------------------------

def test_a_long_video_under_a_window_and_guidance(model):
    """The reference moves on (30 + 3 frames at the end), and both sides keep pictures of their own."""
    cache = WindowOptions(window=6, sink=0, positions="relative")
    positive = spoken(24)
    quiet = [[text(2)[0][0], {**positive[0][1], "audio_embed": 0 * positive[0][1]["audio_embed"]}]]
    made = sample(guider(model, positive, quiet, cfg=2.0), sampler(cache=cache), 24)
    absolute = sample(guider(model, positive, quiet, cfg=2.0), sampler(cache=WindowOptions(window=6)), 24)
    assert torch.isfinite(made).all() and hostkit.relative(made, absolute) < 1e-4  # distances are all that counts
    swapped = sample(guider(model, quiet, positive, cfg=2.0), sampler(cache=cache), 24)
    assert hostkit.relative(swapped, made) > 1e-2


def test_the_reference_is_shown_once_a_run_and_bytes_are_announced(model, monkeypatch):
    shown, show, kept = [], host_s2v.show, []
    monkeypatch.setattr(host_s2v, "show", lambda *args: shown.append(1) or show(*args))
    clear = host_s2v.Views.clear
    monkeypatch.setattr(host_s2v.Views, "clear", lambda self: kept.extend(p.nbytes for p in self.kept) or clear(self))
    seen = hostkit.watch_stores(monkeypatch)
    guide = guider(model, spoken())
    sample(guide, sampler(), FRAMES)
    assert len(shown) == 1
    guide.conds = {"positive": [{**spoken()[0][1]}]}
    assert run_bytes(guide, sampler().rollout, (1, 16, FRAMES, *SIZE)) == max(held.nbytes for held in seen) + sum(kept)
    assert shape_of(model.model, (1, 16, FRAMES, *SIZE)).layers == tiny_s2v.LAYERS


# -- what is refused -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "frames", "match"), [
    (lambda: text(), 3, "neither. Send the prompt through WanSoundImageToVideo"),
    (lambda: spoken(6), 9, "lasts for 6 latent frames and the video has 9. Set the length of WanSoundImageToVideo to 33"),
    (lambda: spoken(3, sound=torch.zeros(1, 13, 768, 12)), 3, "13 layers of 768 features.*25 of 1024.*wav2vec2_large"),
])
def test_conditioning_that_does_not_fit_is_refused(model, make, frames, match):
    with pytest.raises(ForcingError, match=match):
        sample(guider(model, make()), sampler(), frames)


def test_a_voice_for_another_model_is_refused():
    with pytest.raises(ForcingError, match="no S2V model, so the voice would do nothing. Load Wan 2.2 S2V"):
        sample(guider(hostkit.plain(), spoken(3)), sampler(), 3)


def test_memories_that_attend_in_their_own_way_are_refused(model):
    with pytest.raises(ForcingError, match="choose the policy window"):
        sample(guider(model, spoken()), sampler(cache=RecencyOptions(window=9, sink=0, recent=3)), FRAMES)


# -- Live Avatar -----------------------------------------------------------------------------------------------

LENGTH = 57  # frames of video: 15 latent frames, more than the window of 12


@pytest.fixture(scope="module")
def avatar(model, tmp_path_factory):
    """What Forcing Live Avatar makes of the model and a file as published."""
    import folder_paths
    from forcing_pack.nodes.live_avatar import ForcingLiveAvatar

    path = tmp_path_factory.mktemp("loras") / "liveavatar.safetensors"
    save_file(tiny_s2v.live_avatar_lora(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "get_full_path_or_raise", lambda folder, name: str(path))
        return ForcingLiveAvatar.execute(model, path.name).result[0]


def test_every_factor_changes_a_weight_and_counts_as_published(avatar):
    """Nothing is missing and nothing left over: of 5 layers of 10, and 12 x 4 of the attention to the voice."""
    factors = tiny_s2v.live_avatar_lora()
    assert len(avatar.patches) == len(factors) // 2 == 98
    name = "audio_injector.injector.1.q"
    up, down = (factors[f"{name}.lora_{side}.default.weight"] for side in "BA")
    key = f"diffusion_model.{name}.weight"
    made = comfy.lora.calculate_weight(avatar.patches[key], avatar.model.state_dict()[key].clone(), key)
    assert torch.allclose(made, tiny_s2v.s2v_state()[f"{name}.weight"] + 64 / 8 * up @ down, atol=1e-4)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return comfy.sd.VAE(sd=load_file(tiny.tiny_wan_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors")))


def speak(model, vae, volume, length=LENGTH):
    """Latents of a picture and a sound of 4 s at 44100 Hz, through ComfyUI's own nodes and ours, as in the workflow."""
    wave = volume * torch.sin(torch.arange(4 * 44100) / 9000)[None, None]
    heard = AudioEncoderEncode.execute(Ear(), {"waveform": wave, "sample_rate": 44100}).result[0]
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(71))
    positive, negative, latent = WanSoundImageToVideo.execute(
        text(), text(2), vae, 64, 64, length, 1, ref_image=picture, audio_encoder_output=heard,
        ref_motion=picture.repeat(73, 1, 1, 1)).result
    how, sigmas = ForcingPreset.execute("live-avatar").result
    return hostkit.run(guider(model, positive, negative), how, start=latent["samples"], sigmas=sigmas.tolist())


def test_a_picture_speaks_from_end_to_end(avatar, vae, monkeypatch):
    seen = densekit.watch_forwards(monkeypatch)
    clip = speak(avatar, vae, 1.0)
    assert clip.latents.shape == (1, 16, 15, 8, 8) and torch.isfinite(clip.latents).all()
    assert [(call[0], call[1]) for call in seen] == [("noisy", first) for first in range(0, 15, 3) for _ in range(4)]
    assert len(clip.ticks) == 20
    assert torch.equal(speak(avatar, vae, 1.0).latents, clip.latents)
    assert hostkit.relative(speak(avatar, vae, 0.2).latents, clip.latents) > 1e-2
    assert torch.equal(speak(avatar, vae, 1.0, 33).latents, clip.latents[:, :, :9])
    with hostkit.one_thread():
        assert vae.decode(clip.latents).shape[-4:] == (LENGTH, 64, 64, 3)
