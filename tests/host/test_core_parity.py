"""Bit for bit the numbers of core's own AR sampler, on the same weights, noise and sigmas."""
import functools

import comfy.samplers
import pytest
import torch
from forcing_testkit import hostkit, tiny

MODELS = {"plain file": hostkit.plain, "causal file": hostkit.causal}


def ours(block, **options):
    return hostkit.sampler(block=block, noise="comfy", **options)


def with_start(model, frames=1):
    """What core's ARVideoI2V node makes of a MODEL: a start latent among its transformer options."""
    model = model.clone()
    start = torch.randn(1, 16, frames, *hostkit.SIZE, generator=torch.Generator().manual_seed(77))
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": start}
    return model


@functools.cache
def core(block, frames, seed=3, batch=1, start=False):
    model = with_start(hostkit.causal()) if start else hostkit.causal()
    native = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": block})
    plain_guider = hostkit.guider(model, kind=comfy.samplers.CFGGuider)
    return hostkit.sample(plain_guider, native, frames, seed=seed, batch=batch)


@pytest.mark.parametrize("file", MODELS)
@pytest.mark.parametrize("block", [1, 3])
def test_text_to_video(block, file):
    """Guards the whole forward: a plain file has to give what core only gives for files with causal metadata."""
    result = hostkit.sample(MODELS[file](), ours(block), 6)
    assert torch.equal(result, core(block, 6))


@pytest.mark.parametrize("file", MODELS)
@pytest.mark.parametrize("block", [1, 3])
def test_image_to_video_by_cores_own_node(block, file):
    """Guards ARVideoI2V graphs: the start latent seeds the store and is returned in front, untouched."""
    result = hostkit.sample(with_start(MODELS[file]()), ours(block), 7)
    assert torch.equal(result, core(block, 7, start=True))
    assert not torch.equal(result, core(block, 7))


def test_batch_of_two():
    """Guards samples of a batch swapping or sharing their keys."""
    result = hostkit.sample(hostkit.plain(), ours(3), 6, batch=2)
    assert torch.equal(result, core(3, 6, batch=2))
    assert not torch.equal(result[0], result[1])


@pytest.mark.parametrize("seed", [0, 11, 2**40])
def test_seeds_give_what_they_give_in_core(seed):
    """Guards reuse of old seeds, also of the zero that a missing seed would become."""
    result = hostkit.sample(hostkit.plain(), ours(3), 6, seed=seed)
    assert torch.equal(result, core(3, 6, seed=seed))
    assert not torch.equal(result, core(3, 6))


def test_short_last_block():
    """Core cuts the last block to what is left; with allow_tail so do we."""
    result = hostkit.sample(hostkit.plain(), ours(3, allow_tail=True), 8)
    assert torch.equal(result, core(3, 8))


def test_sigmas_of_the_graph_are_the_ones_used():
    """Guards a hard-wired schedule: other sigmas have to agree with core as well."""
    sigmas = (1.0, 0.7, 0.3, 0.0)
    native = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 3})
    expected = hostkit.sample(hostkit.causal(), native, 6, sigmas=sigmas)
    assert torch.equal(hostkit.sample(hostkit.plain(), ours(3), 6, sigmas=sigmas), expected)


def test_global_random_state_is_left_alone():
    """Core reseeds torch's global generator in every step; nodes after ours must not depend on that."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    noise = torch.zeros(1, 16, 6, *hostkit.SIZE)
    guide = hostkit.guider(hostkit.plain())
    guide.sample(noise, noise, ours(3), torch.tensor(hostkit.SIGMAS), disable_pbar=True, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("block", [1, 3])
def test_in_the_compute_type_of_a_graphics_card(block):
    """Rotation, modulation and store in bfloat16, as on a card: one rounding elsewhere would show at once."""
    models = []
    for metadata in (None, tiny.CAUSAL_METADATA):
        model = hostkit.load({name: value.bfloat16() for name, value in hostkit.weights().items()}, metadata,
                             dtype=torch.bfloat16)
        model.set_model_compute_dtype(torch.bfloat16)
        models.append(model)
    native = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": block})
    theirs = hostkit.sample(hostkit.guider(models[1], kind=comfy.samplers.CFGGuider), native, 6)
    assert torch.equal(hostkit.sample(models[0], ours(block), 6), theirs)
    assert not torch.equal(theirs, core(block, 6))
