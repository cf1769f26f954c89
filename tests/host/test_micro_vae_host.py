"""The micro VAE inside ComfyUI: its own class and loader open our file and compute what we compute."""
import comfy.latent_formats
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.ldm.wan.vae import WanVAE
from forcing_pack.forcing_core.micro.vae import WAN_MEAN, WAN_STD, MicroVAE, load_vae, vae_bytes

SIZE = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
        "temperal_downsample": [False, True, True], "dropout": 0.0}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(1)
    vae = MicroVAE(8).requires_grad_(False).eval()
    vae.rescale(torch.randn(16) / 4, torch.rand(16) + 0.5)
    return vae


@pytest.fixture(scope="module")
def theirs(ours):
    vae = WanVAE(dim=8, **SIZE).requires_grad_(False).eval()
    vae.load_state_dict(ours.state_dict(), strict=True)
    return vae


def test_constants_are_those_of_the_latent_format():
    latent_format = comfy.latent_formats.Wan21()
    assert torch.equal(latent_format.latents_mean.flatten(), torch.tensor(WAN_MEAN))
    assert torch.equal(latent_format.latents_std.flatten(), torch.tensor(WAN_STD))


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
def test_whole_sequence_equals_the_chunks_of_the_host(ours, theirs, frames):
    latent_format = comfy.latent_formats.Wan21()
    video = torch.rand(1, 3, frames, 32, 32, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    stored = theirs.encode(video)
    latents = ours.encode(video)
    assert torch.allclose(latents, latent_format.process_in(stored), atol=1e-5)
    assert torch.allclose(ours.decode(latents), theirs.decode(latent_format.process_out(latents)), atol=1e-5)


def test_file_opens_as_a_vae_of_the_host(ours, tmp_path):
    path = tmp_path / "micro_vae.safetensors"
    path.write_bytes(vae_bytes(ours, {"forcing.training": "{}"}))
    loaded = load_vae(path)
    state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    vae = comfy.sd.VAE(sd=state, metadata=metadata)
    vae.throw_exception_if_invalid()
    pixels = torch.rand(9, 32, 32, 3, generator=torch.Generator().manual_seed(2))
    latents = comfy.latent_formats.Wan21().process_in(vae.encode(pixels))
    video = (pixels * 2 - 1).permute(3, 0, 1, 2)[None]
    assert torch.allclose(latents, loaded.encode(video), atol=1e-4)
    made = vae.decode(comfy.latent_formats.Wan21().process_out(latents))[0]
    expected = (loaded.decode(latents)[0].permute(1, 2, 3, 0) + 1) / 2
    assert torch.allclose(made, expected.clamp(0, 1), atol=1e-4)
