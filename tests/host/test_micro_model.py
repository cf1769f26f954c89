"""The bundled micro model inside ComfyUI: stock loaders open its files, stock nodes take its parts, and a run makes
what the standalone rollout makes. Small random files stand in where the trained ones are missing.

Axis legend: latents [B, C, F, h, w].
"""
from dataclasses import replace

import comfy.hooks
import comfy.latent_formats
import comfy.samplers
import comfy.sd
import folder_paths
import nodes as stock
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.micro import bundle
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.options import from_preset, sigmas_of
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.standalone import make_denoiser, preset_rollout, window_options
from forcing_pack.nodes import micro
from forcing_pack.nodes.host_memory import KEY
from forcing_pack.nodes.sampler import CausalSampler
from forcing_testkit import hostkit as kit
from forcing_testkit.micro import random_bundle, trained

pytestmark = pytest.mark.usefixtures("one_thread")

CAPTION, OTHER = "a red circle moving left on a dark background", "a blue square on a light background"
FRAMES, SIZE, SEED = 6, (8, 8), 5


@pytest.fixture(autouse=True)
def as_nodes_run():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bundle.WEIGHTS if trained() else random_bundle(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def model(folder):
    return micro.network("student", folder)


@pytest.fixture(scope="module")
def clip():
    return micro.clip()


def encoded(clip, text):
    """(conditioning tensor, its dict) by the stock node."""
    (cond, extra), = stock.CLIPTextEncode().encode(clip, text)[0]
    return cond, extra


def sampled(model, clip, preset, negative=None):
    guide = kit.guider(model, *(stock.CLIPTextEncode().encode(clip, text)[0] if text is not None else None
                                for text in (CAPTION, negative)), cfg=preset.cfg)
    return kit.sample(guide, CausalSampler(from_preset(preset)), FRAMES, seed=SEED, sigmas=sigmas_of(preset), size=SIZE)


def standalone(name, folder, preset):
    """Normalised latents of the same run without ComfyUI."""
    prompts = [bundle.prompt([text]) for text in (CAPTION, "")][:1 if preset.cfg == 1 else 2]
    denoiser = make_denoiser(bundle.network(name, folder), window_options(preset), FRAMES, SIZE, prompts, preset.cfg)
    noise = BlockNoise(SEED, (1, 16), SIZE)
    return torch.cat([x0 for _, x0 in preset_rollout(preset, denoiser, FRAMES, noise)], dim=2)


def process_out(latents):
    return comfy.latent_formats.Wan21().process_out(latents)


# -- the same numbers -----------------------------------------------------------------------------------------

def test_a_run_equals_the_standalone_one(model, clip, folder):
    preset = get("self-forcing")
    wanted = process_out(standalone("student", folder, preset))
    assert kit.relative(sampled(model, clip, preset), wanted) <= 1e-5


def test_stock_loaders_open_the_files(clip, folder, monkeypatch):
    """UNETLoader and VAELoader know nothing of the pack, and their MODEL brings another shift."""
    for kind in ("diffusion_models", "vae"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(folder)], {".safetensors"}))
    for name in bundle.NETWORKS:
        assert stock.UNETLoader().load_unet(f"micro_{name}.safetensors", "default")[0].model.diffusion_model.dim == 128
    preset = get("self-forcing")
    model, = stock.UNETLoader().load_unet("micro_consistency.safetensors", "default")
    latents = sampled(model, clip, preset)
    normalised = standalone("consistency", folder, preset)
    assert kit.relative(latents, process_out(normalised)) <= 1e-5
    vae, = stock.VAELoader().load_vae(bundle.VAE)
    made = stock.VAEDecode().decode(vae, {"samples": latents})[0]
    wanted = (bundle.vae(folder).decode(normalised)[0].permute(1, 2, 3, 0) + 1) / 2
    assert made.shape == (21, 64, 64, 3) and kit.gap(made, wanted.clamp(0, 1)) < 1e-3
    assert kit.gap(stock.VAEDecode().decode(micro.vae(folder), {"samples": latents})[0], made) == 0


def test_guidance_equals_the_standalone_one(clip, folder):
    """Two conditions of 24 rows in one batch, the empty one among them."""
    preset = replace(get("self-forcing"), cfg=get(micro.TEACHER).cfg)
    made = sampled(micro.network("teacher", folder), clip, preset, negative="")
    assert kit.relative(made, process_out(standalone("teacher", folder, preset))) <= 1e-5


def test_the_stock_forward_takes_24_rows(model, clip):
    """Without our sampler this is an ordinary Wan: one step from noise, no causal order, prompt by prompt."""
    made, other = (kit.sample(kit.basic_guider(model, stock.CLIPTextEncode().encode(clip, text)[0]),
                              comfy.samplers.ksampler("euler"), 3, seed=SEED, sigmas=(1.0, 0.0), size=SIZE)
                   for text in (CAPTION, OTHER))
    assert torch.isfinite(made).all() and kit.relative(made, other) > 1e-3


# -- the parts ------------------------------------------------------------------------------------------------

def test_the_model_is_prepared_like_any_other(model):
    assert KEY in str(model.wrappers)
    assert model.get_model_object("model_sampling").shift == 5.0


def test_the_stock_text_node(clip):
    cond, extra = encoded(clip, CAPTION)
    assert cond.shape == (1, 24, 4096) and torch.equal(cond, bundle.prompt([CAPTION]))
    assert extra["pooled_output"] is None
    assert not encoded(clip, "")[0].any()


def test_unknown_words_are_refused_with_the_vocabulary(clip):
    with pytest.raises(ForcingError, match="does not know these words: furry, dog.*circle, square, triangle"):
        stock.CLIPTextEncode().encode(clip, "a furry red dog")


def test_nodes_that_change_a_clip_leave_it_working(model, clip):
    hooks = comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=1.0)
    hooked, = SetClipHooks().apply_hooks(clip, schedule_clip=True, apply_to_conds=True, hooks=hooks)
    assert encoded(hooked, CAPTION)[1]["hooks"] is hooks
    changed = [hooked, stock.CLIPSetLastLayer().set_last_layer(clip, -2)[0],
               comfy.sd.load_lora_for_models(model, clip, {}, 1.0, 1.0)[1]]
    for other in changed:
        assert torch.equal(encoded(other, CAPTION)[0], encoded(clip, CAPTION)[0])


def test_a_missing_file_is_named(tmp_path):
    for make in (lambda: micro.network("long", tmp_path), lambda: micro.vae(tmp_path)):
        with pytest.raises(ForcingError, match=r"micro_\w+.safetensors is missing. Install the package again"):
            make()
