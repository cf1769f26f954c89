"""Reward Forcing and Deep Forcing inside ComfyUI: the numbers and the bytes of the standalone rollout."""
import comfy.latent_formats
import folder_paths
import pytest
import torch
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.policies import DeepCompressOptions, DeepSinkOptions, EmaSinkOptions
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.standalone import make_denoiser, preset_rollout
from forcing_pack.forcing_core.wan import WanConfig, WanModel
from forcing_pack.nodes import host_memory
from forcing_pack.nodes.cache import ForcingPlanView
from forcing_pack.nodes.sampler import CausalSampler
from forcing_pack.nodes.sampling import ForcingPreset
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import plain, relative, text

SYSTEMS = {"reward-forcing": (EmaSinkOptions, 18), "deep-forcing": (DeepCompressOptions, 30),
           "deep-forcing-sink": (DeepSinkOptions, 27)}
by_system = pytest.mark.parametrize("system", SYSTEMS)
TWO_STEPS = (1.0, 0.625, 0.0)


def standalone(system, frames):
    """The preset without ComfyUI, on the same weights, prompt and noise."""
    net = WanModel(WanConfig(dim=tiny.DIM, ffn_dim=tiny.FFN_DIM, heads=hostkit.HEADS, layers=tiny.LAYERS))
    net.load_state_dict({name: tensor.float() for name, tensor in hostkit.weights().items()})
    preset, (options, _) = get(system), ForcingPreset.execute(system).result
    denoiser = make_denoiser(net.eval(), options.rollout.cache, frames, hostkit.SIZE, [text()[0][0]])
    with torch.no_grad(), hostkit.one_thread():
        noise = BlockNoise(3, (1, tiny.CHANNELS), hostkit.SIZE)
        made = torch.cat([x0 for _, x0 in preset_rollout(preset, denoiser, frames, noise)], dim=2)
    return comfy.latent_formats.Wan21().process_out(made), denoiser


@by_system
def test_a_preset_gives_what_it_gives_without_comfyui(system, monkeypatch):
    """From the node to the latents, past the window: every pass has to be the policy's own, and its queries have to
    be there in the last layer of a clean pass. The store is as large as announced."""
    kind, frames = SYSTEMS[system]
    made, sigmas = ForcingPreset.execute(system).result
    assert type(made.rollout.cache) is kind
    seen = hostkit.watch_stores(monkeypatch)
    clip = hostkit.run(plain(), made, frames, sigmas=sigmas.tolist())
    expected, denoiser = standalone(system, frames)
    assert relative(clip.latents, expected) <= 1e-5
    shape = host_memory.shape_of(plain().model, (1, 16, frames, *hostkit.SIZE))
    announced = host_memory.announced_bytes(made.rollout, shape, 4)
    assert seen[-1].nbytes == announced == denoiser.conditions[0].memory.store.nbytes
    assert len(clip.ticks) == denoiser.forwards


@by_system
def test_guidance_and_a_batch_have_memories_of_their_own(system, monkeypatch):
    """Both sides of guidance choose and blend for themselves; a batch of two is announced as such."""
    _, frames = SYSTEMS[system]
    made, _ = ForcingPreset.execute(system).result
    how = CausalSampler(host_memory.RolloutOptions(cache=made.rollout.cache))
    seen = hostkit.watch_stores(monkeypatch)
    guide = hostkit.guider(plain(), text(1), text(2), cfg=2.0)
    clip = hostkit.run(guide, how, frames, batch=2, sigmas=TWO_STEPS)
    assert bool(torch.isfinite(clip.latents).all()) and hostkit.gap(clip.latents[0], clip.latents[1]) > 0.1
    shape = host_memory.shape_of(plain().model, (2, 16, frames, *hostkit.SIZE))
    assert seen[-1].nbytes == host_memory.announced_bytes(how.rollout, shape, 4, conditions=2)


@by_system
def test_the_plan_view_node_draws_it(system, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    made, _ = ForcingPreset.execute(system).result
    _, frames = SYSTEMS[system]
    image, words, count = ForcingPlanView.execute(plain(), made, {"samples": hostkit.latent(frames)}, 1).result
    shape = host_memory.shape_of(plain().model, (1, 16, frames, *hostkit.SIZE))
    assert count == host_memory.announced_bytes(made.rollout, shape, 4) and "KV store" in words and image.shape[3] == 3
