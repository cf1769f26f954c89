"""Bounded, routed and merged memory inside ComfyUI: the numbers of the same rollout without it, and what is reserved."""
import comfy.latent_formats
import pytest
import torch
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.options import RolloutOptions, blocks_of, levels_from
from forcing_pack.forcing_core.policies import BoundedOptions, MergingOptions, RoutingOptions, WindowOptions
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.standalone import make_denoiser
from forcing_pack.forcing_core.wan import WanConfig, WanModel
from forcing_pack.nodes import host_memory
from forcing_testkit import hostkit, tiny

FRAMES = 12
CACHES = {"bounded": BoundedOptions(slow=3, tau=0.99), "routing": RoutingOptions(top_k=1, recent=1),
          "merging": MergingOptions(recent=1, tau=0.7)}
by_cache = pytest.mark.parametrize("cache", CACHES.values(), ids=list(CACHES))


def standalone(options, batch):
    net = WanModel(WanConfig(dim=tiny.DIM, ffn_dim=tiny.FFN_DIM, heads=hostkit.HEADS, layers=tiny.LAYERS))
    net.load_state_dict({name: tensor.float() for name, tensor in hostkit.weights().items()})
    denoiser = make_denoiser(net.eval(), options.cache, FRAMES, hostkit.SIZE,
                             [hostkit.text()[0][0].expand(batch, -1, -1)])
    with torch.no_grad(), hostkit.one_thread():
        parts = [x0 for _, x0 in block_rollout(
            denoiser, blocks_of(FRAMES, 0, options), levels_from(hostkit.TWO_STEPS, options.timesteps),
            BlockNoise(3, (batch, tiny.CHANNELS), hostkit.SIZE), block=options.block)]
    return comfy.latent_formats.Wan21().process_out(torch.cat(parts, dim=2))


def run(cache, batch=1):
    return hostkit.sample(hostkit.plain(), hostkit.sampler(cache=cache), FRAMES, batch=batch, sigmas=hostkit.TWO_STEPS)


@by_cache
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_to_standalone(cache, batch):
    """Guards the way through the host's attention; the memory is at work, or a plain window would give the same."""
    result = run(cache, batch)
    assert hostkit.relative(result, standalone(RolloutOptions(cache=cache), batch)) < 1e-4
    assert hostkit.relative(result, run(WindowOptions(None, 0, 3), batch)) > 1e-3


@by_cache
def test_reserved_bytes_are_allocated(cache, monkeypatch):
    seen, options = hostkit.watch_stores(monkeypatch), RolloutOptions(cache=cache)
    run(cache)
    guide = hostkit.guider(hostkit.plain())
    assert max(held.nbytes for held in seen) == host_memory.run_bytes(guide, options, (1, tiny.CHANNELS, FRAMES, *hostkit.SIZE))
