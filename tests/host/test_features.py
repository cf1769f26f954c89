"""What ComfyUI's users combine with a model - guidance, batches, fp8, LoRA, compile - also works in a rollout."""
import itertools

import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_custom_sampler import BasicGuider, BasicScheduler
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.options import RolloutOptions
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.nodes.guiding import ForcingGuider
from forcing_pack.nodes.host_memory import announced_bytes, element_size, shape_of
from forcing_pack.nodes.latents import ForcingExtend, ForcingStartImage
from forcing_pack.nodes.loading import ForcingLoadCheckpoint
from forcing_pack.nodes.sampler import CausalSampler
from forcing_pack.nodes.sampling import ForcingPreset
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import TWO_STEPS, plain, relative, sample, sampler, standalone, text

FREE = {"cond and uncond in one batch": 1e15, "one after the other": 0}


# -- the same rollout without ComfyUI -------------------------------------------------------------------------

CACHES = {
    "everything": WindowOptions(),
    "window with sink": WindowOptions(window=7, sink=2),
    "relative": WindowOptions(window=6, sink=1, positions="relative"),
    "relative, compact": WindowOptions(window=6, sink=1, positions="relative", compact=True),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("block", [1, 3])
def test_rollout_in_comfyui_equals_the_standalone_one(block, cache):
    """Guards what only the host side does: dtypes, timesteps, latent scale, keys per condition."""
    options = RolloutOptions(block=block, cache=CACHES[cache])
    result = sample(plain(), CausalSampler(options), 9, sigmas=TWO_STEPS)
    assert relative(result, standalone(options, 9, sigmas=TWO_STEPS)) <= 1e-5


def test_cache_policy_reaches_the_run():
    """Guards against CACHES all giving one result, which would make the test above empty."""
    results = [sample(plain(), sampler(cache=cache), 9, sigmas=TWO_STEPS) for cache in list(CACHES.values())[:3]]
    assert all(relative(a, b) > 1e-3 for a, b in itertools.combinations(results, 2))


# -- guidance and conditions ----------------------------------------------------------------------------------

@pytest.mark.parametrize("memory", FREE)
def test_guidance_has_a_store_for_each_side(monkeypatch, memory):
    """Core's AR sampler fails here (B5); sharing one store would mix the prompts. ComfyUI batches the two sides
    only where memory allows, so both ways have to give v_neg + 3*(v_pos - v_neg)."""
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: FREE[memory])
    guide = hostkit.guider(plain(), text(1), text(2), cfg=3.0)
    calls = []
    hook = plain().model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    try:
        result = sample(guide, sampler(), 6)
    finally:
        hook.remove()
    # 4 steps, a clean pass, 4 steps
    assert calls == ([2] * 9 if FREE[memory] else [1] * 18)
    assert relative(result, standalone(RolloutOptions(), 6, [text(1), text(2)], guidance=3.0)) <= 1e-4
    assert relative(result, sample(hostkit.guider(plain(), text(1)), sampler(), 6)) > 1e-2


def test_guidance_without_a_negative_prompt_is_refused():
    """ComfyUI takes zeros for the missing answer: the picture would silently be 3 times too strong."""
    with pytest.raises(ForcingError, match="Connect one, or set cfg to 1"):
        ForcingGuider.execute(plain(), text(), 3.0)


def test_two_positive_conditions_are_averaged():
    """Core's AR sampler fails with a second positive condition (B5)."""
    result = sample(hostkit.guider(plain(), text(1) + text(2)), sampler(), 6)
    mean = standalone(RolloutOptions(), 6, [text(1), text(2)], guidance=0.5)
    assert relative(result, mean) <= 1e-4


def test_every_sample_of_a_batch_has_its_own_prompt():
    """Guards text keys being cached for one sample and broadcast to the others."""
    both = sample(hostkit.guider(plain(), text(4, batch=2)), sampler(), 6, batch=2)
    assert relative(both, standalone(RolloutOptions(), 6, [text(4, batch=2)], batch=2)) <= 1e-5
    first = [[text(4, batch=2)[0][0][:1], {}]]
    alone = sample(hostkit.guider(plain(), first), sampler(), 6, batch=2)
    assert relative(both[0], alone[0]) <= 1e-5
    assert relative(both[1], alone[1]) > 1e-3


def test_mixed_batch_and_single_conditions():
    """A negative prompt for one is repeated to the batch of the positive ones."""
    guide = hostkit.guider(plain(), text(4, batch=2), text(2), cfg=2.0)
    expected = standalone(RolloutOptions(), 6, [text(4, batch=2), text(2)], guidance=2.0, batch=2)
    assert relative(sample(guide, sampler(), 6, batch=2), expected) <= 1e-4


def start_latent(frames=1, batch=1):
    return torch.randn(batch, 16, frames, *hostkit.SIZE, generator=torch.Generator().manual_seed(21))


def test_one_start_image_for_a_batch_of_two_by_cores_node():
    """Core's ARVideoI2V fails with a batch (B5): the image of one has to be expanded."""
    model = plain().clone()
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": start_latent()}
    result = sample(model, sampler(), 7, batch=2)
    expected = standalone(RolloutOptions(), 7, batch=2, given=start_latent().expand(2, -1, -1, -1, -1))
    assert relative(result, expected) <= 1e-5
    assert not torch.equal(result[0, :, 1:], result[1, :, 1:])


def test_core_basic_guider_and_ours_agree():
    """Our guider only adds the reservation; graphs with core's guiders must not differ."""
    ours = ForcingGuider.execute(plain(), text(), 1.0).result[0]
    core = BasicGuider.execute(plain(), text()).result[0]
    assert torch.equal(sample(ours, sampler(), 6), sample(core, sampler(), 6))


# -- weights --------------------------------------------------------------------------------------------------

def test_fp8_weights_keep_the_store_in_the_compute_type(monkeypatch):
    """Core's AR sampler makes its cache in the storage type and fails (B5). The result has to be that of the
    same, rounded weights in the compute type."""
    eighth = hostkit.load(dtype=torch.float8_e4m3fn)
    assert eighth.model.diffusion_model.blocks[0].self_attn.q.weight.dtype == torch.float8_e4m3fn
    compute = eighth.model.get_dtype_inference()
    seen = hostkit.watch_stores(monkeypatch)
    result = sample(eighth, sampler(), 6)
    assert {held.dtype for held in seen} == {compute} and compute.itemsize >= 2
    assert torch.isfinite(result).all()
    own = dict(eighth.model.diffusion_model.state_dict())
    same = hostkit.load({name: tensor.to(compute) for name, tensor in own.items()}, dtype=compute)
    assert relative(result, sample(same, sampler(), 6)) <= (1e-5 if compute == torch.float32 else 5e-2)
    assert relative(result, sample(plain(), sampler(), 6)) < 0.5


def test_bf16_computation(monkeypatch):
    """What a GPU does: half the bytes, nearly the same picture. The type is set by core's ModelComputeDtype node."""
    half = plain().clone()
    half.set_model_compute_dtype(torch.bfloat16)
    seen = hostkit.watch_stores(monkeypatch)
    result = sample(half, sampler(), 6)
    shape = shape_of(half.model, (1, 16, 6, *hostkit.SIZE))
    assert seen[-1].dtype == torch.bfloat16 and seen[-1].nbytes == announced_bytes(RolloutOptions(), shape, 2)
    assert element_size(half) == 2 and element_size(plain()) == 4
    assert result.dtype == torch.float32 and relative(result, sample(plain(), sampler(), 6)) < 0.1


def style_lora():
    named = {f"diffusion_model.{name}.lora_{side}.weight": tensor for name, pair in hostkit.factors().items()
             for side, tensor in zip(("down", "up"), pair, strict=True)}
    return named | {f"diffusion_model.{name}.alpha": torch.tensor(4.0) for name in hostkit.factors()}


def test_style_lora_from_comfyuis_own_loader():
    """Guards forwards that read the raw weights past ComfyUI's patches."""
    patched = comfy.sd.load_lora_for_models(plain(), None, style_lora(), 0.75, 0.0)[0]
    result = sample(patched, sampler(), 6)
    assert relative(result, sample(hostkit.load(hostkit.merged(hostkit.factors(), 0.75)), sampler(), 6)) <= 1e-4
    before = sample(plain(), sampler(), 6)  # the shared weights are as they were
    assert relative(result, before) > 1e-2
    assert relative(before, standalone(RolloutOptions(), 6)) <= 1e-5


@pytest.fixture
def model_folders(monkeypatch, tmp_path):
    """Folder of diffusion models and of LoRAs that ComfyUI looks into."""
    for kind in ("diffusion_models", "loras"):
        (tmp_path / kind).mkdir()
        places = [str(tmp_path / kind)], {".pt", ".safetensors"}
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, places)
    return tmp_path / "diffusion_models", tmp_path / "loras"


def load_checkpoint(name, system="auto", weights="auto", weight_dtype="default", lora="none", lora_strength=1.0):
    return ForcingLoadCheckpoint.execute(name, system, weights, weight_dtype, lora, lora_strength).result[0]


CONTAINERS = {
    "self_forcing_dmd.pt": ("generator_ema", "model."),
    "causal_forcing.pt": ("generator", "model._fsdp_wrapped_module."),
    "longlive_base.pt": ("generator", "model."),
    "rewrapped.pt": ("generator_ema", "model._fsdp_wrapped_module."),
    "flat.pt": (None, ""),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_official_containers_load_as_an_ordinary_model(model_folders, name):
    """Guards the prefixes that training code leaves in front of every name; core's loader knows none of them."""
    key, prefix = CONTAINERS[name]
    tiny.tiny_wan(model_folders[0] / name, container=key, prefix=prefix)
    model = load_checkpoint(name)
    assert torch.equal(sample(model, sampler(), 3), sample(plain(), sampler(), 3))


def test_the_authors_choice_of_weights_is_taken(model_folders):
    """A file with generator and generator_ema: Self Forcing's authors use the averaged ones; a widget overrules."""
    state = {f"model.{name}": tensor for name, tensor in tiny.wan_state_dict(seed=0).items()}
    other = {f"model.{name}": tensor for name, tensor in tiny.wan_state_dict(seed=1).items()}
    torch.save({"generator": other, "generator_ema": state}, model_folders[0] / "self_forcing_dmd.pt")
    expected = sample(plain(), sampler(), 3)
    assert torch.equal(sample(load_checkpoint("self_forcing_dmd.pt"), sampler(), 3), expected)
    overruled = sample(load_checkpoint("self_forcing_dmd.pt", weights="generator"), sampler(), 3)
    assert torch.equal(overruled, sample(hostkit.load(tiny.wan_state_dict(seed=1)), sampler(), 3))


@pytest.mark.parametrize(("system", "shift"), [("self-forcing", 5.0), ("causvid-3step", 8.0)])
def test_flow_shift_of_the_system_is_set(model_folders, system, shift):
    """A plain Wan file comes with shift 8, which warps core's schedules away from what the model was trained on."""
    tiny.tiny_wan(model_folders[0] / "renamed.safetensors")
    model = load_checkpoint("renamed.safetensors", system)
    assert model.get_model_object("model_sampling").shift == shift
    if system == "self-forcing":
        simple = BasicScheduler.execute(model, "simple", 4, 1.0).result[0]
        assert torch.allclose(simple, torch.tensor(hostkit.SIGMAS), atol=1e-6)
        chosen, sigmas = ForcingPreset.execute("self-forcing").result
        assert torch.allclose(simple, sigmas, atol=1e-4)
        assert torch.isfinite(sample(model, chosen, 3, sigmas=tuple(simple.tolist()))).all()


def test_longlive_lora_in_its_original_form(model_folders):
    """LongLive's file keeps PEFT names inside generator_lora, and no alpha; silently skipped keys would leave the
    base model."""
    tiny.tiny_wan(model_folders[0] / "longlive_base.pt", container="generator", prefix="model.")
    named = {f"base_model.model.model.{name}.lora_{side}.weight": tensor for name, pair in hostkit.factors().items()
             for side, tensor in zip("AB", pair, strict=True)}
    torch.save({"generator_lora": named}, model_folders[1] / "lora.pt")
    result = sample(load_checkpoint("longlive_base.pt", lora="lora.pt"), sampler(), 6)
    assert relative(result, sample(hostkit.load(hostkit.merged(hostkit.factors())), sampler(), 6)) <= 1e-4
    assert relative(result, sample(plain(), sampler(), 6)) > 1e-2


def test_fp8_choice_of_the_loader(model_folders, monkeypatch):
    """The weights become 8 bit; the store does not."""
    tiny.tiny_wan(model_folders[0] / "self_forcing_dmd.pt", container="generator_ema", prefix="model.")
    model = load_checkpoint("self_forcing_dmd.pt", weight_dtype="fp8_e4m3fn")
    assert model.model.get_dtype() == torch.float8_e4m3fn
    seen = hostkit.watch_stores(monkeypatch)
    assert torch.isfinite(sample(model, sampler(), 3)).all()
    assert seen[-1].dtype == model.model.get_dtype_inference()


def compiled(backend):
    model = plain().clone()
    set_torch_compile_wrapper(model, backend=backend)
    return model


def test_compiled_model_gives_the_same_video(monkeypatch):
    """Guards the store being traced into the graph: compiled halves of a layer only, and they must really be used."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = sample(plain(), sampler(), 6, sigmas=TWO_STEPS)
    result = sample(compiled(counting), sampler(), 6, sigmas=TWO_STEPS)
    assert graphs and relative(result, expected) <= 1e-4
    before = len(graphs)
    assert relative(sample(compiled(counting), sampler(), 12, sigmas=TWO_STEPS)[:, :, :6], expected) <= 1e-4
    assert len(graphs) - before <= before  # a longer video compiles nothing per block


@pytest.mark.slow
def test_inductor_gives_the_same_video():
    """The backend of the TorchCompileModel node."""
    result = sample(compiled("inductor"), sampler(), 3, sigmas=TWO_STEPS)
    assert relative(result, sample(plain(), sampler(), 3, sigmas=TWO_STEPS)) <= 1e-4


# -- length ---------------------------------------------------------------------------------------------------

ENDLESS = RolloutOptions(cache=WindowOptions(window=12, sink=3, positions="relative"))


def test_more_frames_than_there_are_positions(monkeypatch):
    """1101 latent frames, 4 min 35 s: past the 1024 rows of the published table, in the store of 12 frames."""
    seen = hostkit.watch_stores(monkeypatch)
    result = sample(plain(), CausalSampler(ENDLESS), 1101, sigmas=(1.0, 0.0), size=(4, 4))
    shape = shape_of(plain().model, (1, 16, 1101, 4, 4))
    assert result.shape[2] == 1101 and torch.isfinite(result).all()
    assert {held.nbytes for held in seen} == {announced_bytes(ENDLESS, shape, 4)}
    assert announced_bytes(ENDLESS, shape, 4) == tiny.LAYERS * 12 * 4 * tiny.DIM * 4 * 3  # raw and rotated keys, values
    late = result[:, :, 1080:]
    assert late.std() > 0.5 * result[:, :, :30].std()  # still a moving picture, not a collapsed one


def test_absolute_positions_end_with_the_table():
    """Guards silent wrap-around; the message names what to do."""
    with hostkit.forwards(plain()) as calls, pytest.raises(ForcingError, match="'relative' or 'rebased'"):
        sample(plain(), sampler(), 1101, sigmas=(1.0, 0.0), size=(4, 4))
    assert calls == []


@pytest.mark.parametrize("cache", CACHES)
def test_longer_video_starts_with_the_shorter_one(cache):
    """Bit for bit: noise belongs to a block, not to the length of the clip."""
    how = sampler(cache=CACHES[cache])
    assert torch.equal(sample(plain(), how, 15)[:, :, :9], sample(plain(), how, 9))


# -- given frames ---------------------------------------------------------------------------------------------

def test_extension_keeps_the_clip_and_goes_on():
    """The given frames come back as they were, up to the rounding of ComfyUI's latent scale; the blocks count from 0
    again, so the noise - not the memory - differs from a longer run."""
    clip = sample(plain(), sampler(), 6)
    longer = ForcingExtend.execute({"samples": clip}, 1.5, "seconds", 3).result[0]
    assert longer["samples"].shape[2] == 12
    result = sample(plain(), sampler(), start=longer["samples"], mask=longer["noise_mask"], seed=4)
    assert result.shape[2] == 12 and hostkit.gap(result[:, :, :6], clip) <= 1e-5
    assert relative(result, standalone(RolloutOptions(), 12, given=clip, seed=4)) <= 1e-5
    assert relative(result[:, :, 6:9], sample(plain(), sampler(), 3, seed=4)) > 1e-2  # it saw the clip


@pytest.mark.parametrize("cache", CACHES)
def test_extension_equals_the_uninterrupted_run_under_equal_noise(monkeypatch, cache):
    """Bit for bit, in a latent scale without rounding: core's noise of block 0 under seed + 2000 is that of block 2
    under seed. Guards given frames written at other positions, or in other chunks, than the run wrote them."""
    for name in ("process_latent_in", "process_latent_out"):
        monkeypatch.setattr(type(plain().model), name, lambda self, latents: latents)
    how = sampler(cache=CACHES[cache], noise="comfy")
    noise = torch.randn(hostkit.latent(12).shape, generator=torch.Generator().manual_seed(8))
    whole = sample(plain(), how, 12, noise=noise, sigmas=TWO_STEPS)
    longer = ForcingExtend.execute({"samples": whole[:, :, :6].clone()}, 6, "latent frames", 3).result[0]
    resumed = sample(plain(), how, start=longer["samples"], mask=longer["noise_mask"], noise=noise, sigmas=TWO_STEPS,
                     seed=2003)
    assert torch.equal(resumed, whole)


def test_extension_from_the_last_frames_only():
    clip = sample(plain(), sampler(), 9)
    longer = ForcingExtend.execute({"samples": clip}, 3, "latent frames", 3, context_frames=3).result[0]
    assert torch.equal(longer["samples"][:, :, :3], clip[:, :, 6:])
    assert longer["samples"].shape[2] == 6 and not longer["samples"][:, :, 3:].any()


class Camera:
    """A VAE that shows the pixels it was asked to encode."""

    def encode(self, pixels):
        self.pixels = pixels
        frames, height, width, _ = pixels.shape
        return torch.zeros(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_start_image_of_another_shape(fit):
    """A 64x32 image, left half white, for a 32x32 video: cut, squeezed, or set between black bars."""
    image = torch.zeros(1, 32, 64, 3)
    image[:, :, :32] = 1.0
    camera = Camera()
    ForcingStartImage.execute(camera, image, {"samples": hostkit.latent(6, size=(4, 4))}, fit)
    pixels = camera.pixels
    assert pixels.shape == (1, 32, 32, 3) and pixels.min() >= 0 and pixels.max() <= 1
    rows, columns = pixels[0, :, :, 0].mean(1), pixels[0, :, :, 0].mean(0)
    if fit == "pad":
        assert rows[:7].max() == 0 and rows[-7:].max() == 0 and rows[16] == pytest.approx(0.5, abs=0.05)
    else:
        assert rows.min() > 0.4
    middle = columns[14:18].mean() / columns[:8].mean()
    assert middle == pytest.approx(0.5, abs=0.1)  # the edge stays in the middle, whatever the fit


def test_start_image_through_a_real_vae(comfy_models):
    """Encoded, put in front of the frames to generate, kept by the run, for every sample of the batch."""
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(comfy_models / "vae" / "tiny_wan_vae.safetensors")))
    image = torch.rand(1, 40, 56, 4, generator=torch.Generator().manual_seed(2))  # with an alpha channel
    with torch.no_grad():
        start = ForcingStartImage.execute(vae, image, {"samples": hostkit.latent(6, batch=2)}, "crop").result[0]
    assert start["samples"].shape == (2, 16, 7, *hostkit.SIZE)
    assert start["noise_mask"].flatten().tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert torch.equal(start["samples"][0, :, 0], start["samples"][1, :, 0]) and start["samples"][:, :, 0].any()
    result = sample(plain(), sampler(), start=start["samples"], mask=start["noise_mask"])
    assert hostkit.gap(result[:, :, 0], start["samples"][:, :, 0]) <= 1e-5
    expected = standalone(RolloutOptions(), 7, given=start["samples"][:, :, :1], batch=2)
    assert relative(result, expected) <= 1e-5


def test_start_clip_is_cut_to_whole_latent_frames():
    camera = Camera()
    clip = torch.rand(8, 32, 48, 3)
    start = ForcingStartImage.execute(camera, clip, {"samples": hostkit.latent(6)}, "crop").result[0]
    assert camera.pixels.shape[0] == 5 and start["samples"].shape[2] == 2 + 6
