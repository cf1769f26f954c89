"""Rollouts inside this process's ComfyUI: tiny models, conditions, guiders, and what a run did.

Axis legend: latents [B, C, F, H, W]. Everything goes through the calls that SamplerCustomAdvanced makes.
"""
import atexit
import contextlib
import functools
import weakref
from dataclasses import dataclass, field

import comfy.latent_formats
import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.memory import Memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.options import RolloutOptions, blocks_of, levels_from
from forcing_pack.forcing_core.policies import build
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.rope import Rope
from forcing_pack.forcing_core.store import Store
from forcing_pack.forcing_core.wan import WanConfig, WanModel
from forcing_pack.nodes import host
from forcing_pack.nodes.guiding import CausalGuider
from forcing_pack.nodes.sampler import CausalSampler
from forcing_testkit import tiny

SIGMAS = (1.0, 0.9375, 0.8333333134651184, 0.625, 0.0)  # 4 steps at shift 5, as BasicScheduler "simple" makes them
TWO_STEPS = (1.0, 0.625, 0.0)
SIZE = (4, 6)  # latent: 6 tokens a frame
HEADS = tiny.DIM // 128


@functools.cache
def weights():
    """State dict of the tiny network; not to be changed."""
    return tiny.wan_state_dict()


def load(state=None, metadata=None, **options):
    """A MODEL with copies of these weights (the tiny network's by default)."""
    copies = {name: tensor.clone() for name, tensor in (state or weights()).items()}
    return comfy.sd.load_diffusion_model_state_dict(copies, model_options=options, metadata=metadata)


@functools.cache
def plain():
    """MODEL of a file without metadata, as most users have it. Shared: clone before changing it."""
    return load()


@functools.cache
def causal():
    """MODEL of the same weights, marked so that core's AR sampler takes it. Shared: clone before changing it."""
    return load(metadata=tiny.CAUSAL_METADATA)


for cached in (plain, causal):
    # while ComfyUI's modules still are what they were: its patchers run code when they go
    atexit.register(cached.cache_clear)


@functools.cache
def text(seed=0, batch=1):
    """Conditioning of a prompt, or of `batch` different ones."""
    draw = torch.Generator().manual_seed(1000 + seed)
    return [[torch.randn(batch, 512, tiny.TEXT_DIM, generator=draw), {}]]


def guider(model, positive=None, negative=None, cfg=1.0, kind=CausalGuider):
    made = kind(model)
    sides = {"positive": positive or text(), "negative": negative}
    made.inner_set_conds({name: cond for name, cond in sides.items() if cond is not None})
    made.set_cfg(cfg)
    return made


def basic_guider(model, positive=None):
    """Core's BasicGuider, which brings no reservation of its own."""
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    made = Guider_Basic(model)
    made.set_conds(positive or text())
    return made


def sampler(**options):
    return CausalSampler(RolloutOptions(**options))


@contextlib.contextmanager
def one_thread():
    """Tiny tensors on a busy machine: threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Clip:
    """latents: what the graph gets. ticks: (step, total, shape of x0) of every call of the progress callback."""

    latents: torch.Tensor | None = None
    ticks: list = field(default_factory=list)


def latent(frames, batch=1, size=SIZE):
    return torch.zeros(batch, tiny.CHANNELS, frames, *size)


def run(source, how, frames=6, *, seed=3, batch=1, sigmas=SIGMAS, size=SIZE, start=None, mask=None, noise=None,
        on_tick=None):
    """One run as SamplerCustomAdvanced makes it. source: a MODEL or a guider; start: latents instead of empty ones;
    noise: instead of RandomNoise's; on_tick: called with (step, x0) like a previewer."""
    guide = source if isinstance(source, comfy.samplers.CFGGuider) else guider(source)
    start = latent(frames, batch, size) if start is None else start
    clip = Clip()

    def callback(step, x0, x, total):
        clip.ticks.append((step, total, tuple(x0.shape)))
        if on_tick is not None:
            on_tick(step, x0)

    noise = comfy.sample.prepare_noise(start, seed) if noise is None else noise
    with one_thread():
        clip.latents = guide.sample(noise, start, how, torch.tensor(sigmas), denoise_mask=mask, callback=callback,
                                    disable_pbar=True, seed=seed)
    return clip


def sample(source, how, frames=6, **settings):
    """Only the latents of `run`."""
    return run(source, how, frames, **settings).latents


@contextlib.contextmanager
def forwards(model):
    """List of the shapes of all network inputs while the block lasts."""
    seen = []
    embedding = model.model.diffusion_model.patch_embedding
    hook = embedding.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    try:
        yield seen
    finally:
        hook.remove()


@dataclass(frozen=True)
class Held:
    """What the stores of all conditions were after one forward. `refs` are weak, to stores and to their buffers."""

    nbytes: int
    dtype: torch.dtype
    refs: tuple


def watch_stores(monkeypatch):
    """List that gets a Held after every forward of every rollout until the test ends."""
    seen, forward = [], host.HostDenoiser.__call__

    def call(self, *args):
        out = forward(self, *args)
        stores = [memory.store for memory in self.memories.values()]
        buffers = [data.v for store in stores for data in store._data]
        seen.append(Held(sum(store.nbytes for store in stores), buffers[0].dtype,
                         tuple(map(weakref.ref, [*stores, *buffers]))))
        return out

    monkeypatch.setattr(host.HostDenoiser, "__call__", call)
    return seen


def gap(a, b):
    """Largest absolute difference."""
    return float((a - b).abs().max())


def relative(a, b):
    """L2 distance from b, in units of b."""
    return float((a - b).norm() / b.norm())


def standalone(options, frames, texts=None, *, guidance=1.0, seed=3, batch=1, sigmas=SIGMAS, size=SIZE, given=None,
               state=None):
    """The same rollout without ComfyUI: our network, our denoiser. given: latents in the graph's scale."""
    net = WanModel(WanConfig(dim=tiny.DIM, ffn_dim=tiny.FFN_DIM, heads=HEADS, layers=tiny.LAYERS))
    net.load_state_dict({name: tensor.float() for name, tensor in (state or weights()).items()})
    grid = size[0] // 2, size[1] // 2

    def condition(context):
        policy = build(options.cache, frames)
        store = Store(tiny.LAYERS, policy.capacity, grid[0] * grid[1], policy.keys)
        return Condition([context.expand(batch, -1, -1)], Memory(policy, store, Rope(grid, tiny.DIM // HEADS)))

    contexts = [cond[0][0] for cond in (texts or [text()])]
    denoiser = NetworkDenoiser(net.eval(), [condition(context) for context in contexts], guidance)
    form = comfy.latent_formats.Wan21()
    given = None if given is None else form.process_in(given)
    blocks = blocks_of(frames, 0 if given is None else given.shape[2], options)
    parts = [] if given is None else [given]
    with torch.no_grad(), one_thread():
        parts += [x0 for _, x0 in block_rollout(denoiser, blocks, levels_from(sigmas, options.timesteps),
                                                BlockNoise(seed, (batch, tiny.CHANNELS), size), context=given,
                                                block=options.block)]
    return form.process_out(torch.cat(parts, dim=2))


def merged(factors, strength=1.0):
    """The tiny weights with low-rank factors (name -> (down, up)) added, computed in float32."""
    state = dict(weights())
    for name, (down, up) in factors.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + strength * (up @ down)
    return state


def factors(rank=4, scale=0.5, seed=9):
    """Random low-rank factors for every self-attention query and feed-forward input of the tiny network."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(tiny.LAYERS):
        for name, rows in (("self_attn.q", tiny.DIM), ("self_attn.k", tiny.DIM), ("ffn.0", tiny.FFN_DIM)):
            made[f"blocks.{layer}.{name}"] = (scale * torch.randn(rank, tiny.DIM, generator=draw) / tiny.DIM ** 0.5,
                                              torch.randn(rows, rank, generator=draw) / rank ** 0.5)
    return made
