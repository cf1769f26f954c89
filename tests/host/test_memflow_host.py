"""Memories chosen by prompt or by key, inside ComfyUI: a prompt track reaches them, and the numbers are the standalone ones."""
import comfy.latent_formats
import pytest
import torch
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.options import RolloutOptions, levels_from
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import MemFlowOptions, RelaxOptions, WindowOptions, build, replayed_frames
from forcing_pack.forcing_core.rollout import Switch, block_rollout
from forcing_pack.forcing_core.wan import WanConfig, WanModel
from forcing_pack.nodes.sampler import CausalSampler
from forcing_pack.nodes.track import ForcingPromptSegment
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import TWO_STEPS, guider, plain, relative, sample, text

FRAMES, AT = 15, 9
AT_SECONDS = 2.05  # latent frame 9


def alone(cache, transition):
    net = WanModel(WanConfig(dim=tiny.DIM, ffn_dim=tiny.FFN_DIM, heads=hostkit.HEADS, layers=tiny.LAYERS))
    net.load_state_dict(hostkit.weights())
    memory = make_memory(cache, FRAMES, layers=tiny.LAYERS, grid=(hostkit.SIZE[0] // 2, hostkit.SIZE[1] // 2), head_dim=128,
                         device="cpu")
    denoiser = NetworkDenoiser(net.eval(), [Condition([text()[0][0], text(1)[0][0]], memory)])
    with torch.no_grad(), hostkit.one_thread():
        parts = [x for _, x in block_rollout(
            denoiser, layout(FRAMES, 3), levels_from(TWO_STEPS, "exact"), BlockNoise(3, (1, tiny.CHANNELS), hostkit.SIZE),
            window=replayed_frames(build(cache, FRAMES)), switches=[Switch(AT, 1, transition=transition)])]
    return comfy.latent_formats.Wan21().process_out(torch.cat(parts, dim=2))


@pytest.mark.parametrize("cache, transition", [
    (MemFlowOptions(window=8, top_k=1, active=1), "keep"), (MemFlowOptions(window=8, top_k=1), "recache"),
    (RelaxOptions(reservoir=9, candidates=2), "recache")], ids=["memflow, keep", "memflow, recache", "relax, recache"])
def test_a_change_of_prompt_equals_the_standalone_rollout(cache, transition):
    prompts = ForcingPromptSegment.execute(text(), text(1), AT_SECONDS, transition, 2).result[0]
    made = sample(guider(plain(), prompts), CausalSampler(RolloutOptions(cache=cache)), FRAMES, sigmas=TWO_STEPS)
    assert relative(made, alone(cache, transition)) <= 1e-4
    window = WindowOptions(cache.window, cache.sink, positions="relative")
    assert relative(made[:, :, AT:], alone(window, transition)[:, :, AT:]) > 1e-3
