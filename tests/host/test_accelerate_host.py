"""Fused kernels, CUDA graphs and prefetched weights over ComfyUI's modules: when each is used, without a card."""
import sys
import types

import pytest
import torch
from forcing_pack.forcing_core.graphs import Graphs
from forcing_pack.forcing_core.kernels import PLAIN
from forcing_pack.forcing_core.options import RolloutOptions
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.nodes import host_accelerate
from forcing_pack.nodes.host_accelerate import Forwards, plain_module
from forcing_pack.nodes.sampler import CausalSampler
from forcing_testkit import hostkit
from forcing_testkit.hostkit import TWO_STEPS, load, plain, sample

CACHE = WindowOptions(4, 1, 1)


def run(model, way="off", frames=10):
    return sample(model, CausalSampler(RolloutOptions(block=1, cache=CACHE, accelerate=way)), frames, sigmas=TWO_STEPS)


class Calls:
    """A recorder that records nothing and calls again."""

    def record(self, work):
        out = work()

        def replay():
            again = work()
            if out is not None:
                out.copy_(again)
        return replay, out


class Named(torch.nn.RMSNorm):
    """Somebody's own norm."""


def test_modules_that_may_be_taken_apart():
    """ComfyUI's norms and linear layers as loaded; none with a LoRA put on when called, of another type, paged or replaced."""
    block, like = load().model.diffusion_model.blocks[0], torch.zeros(1)
    norms = [block.norm1, block.self_attn.norm_q, block.self_attn.norm_k]
    assert all(plain_module(norm, like) for norm in norms)
    assert plain_module(norms[0], like.bfloat16()) and not plain_module(norms[1], like.bfloat16())
    net = load().model.diffusion_model
    assert plain_module(net.head, like) and plain_module(net.patch_embedding, like)
    assert not plain_module(Named(4), like) and not plain_module(block, like)
    linears = [block.self_attn.q, block.ffn[0], block.ffn[2]]
    assert all(plain_module(module, like) for module in (*linears, block.ffn, block.ffn[1]))
    norms[0].forward = lambda x: x
    norms[1].weight_function = [lambda weight: 2 * weight]
    norms[2]._v = object()
    linears[0].weight_function, linears[1].bias_function = [lambda weight: weight], [lambda bias: bias]
    linears[2].register_forward_pre_hook(lambda *_: None)
    assert not any(plain_module(module, like) for module in (*norms, *linears))


@pytest.mark.parametrize("patched", [False, True])
def test_graphs_in_a_run(monkeypatch, patched):
    """The same latents; what a node patched runs as always. Nothing is held when the run is over."""
    used = []
    monkeypatch.setattr(host_accelerate, "graphs_of", lambda way, device: used.append(Graphs(Calls())) or used[-1])
    model = plain().clone()
    if patched:
        model.set_model_patch(lambda args: args["x"], "attn2_patch")
    assert torch.equal(run(model, "graphs"), run(model, "off"))
    assert not used[0].off and not used[0]._owners
    assert (used[0].replayed == 0) == patched


def test_weights_a_block_ahead(monkeypatch):
    """ComfyUI's queue is told of every block in turn and of the end, of the prompt's keys only until they are known."""
    told, fake = [], types.ModuleType("comfy.model_prefetch")
    fake.PREFETCH_QUEUES = []

    def make(queue, device, options):
        fake.PREFETCH_QUEUES.append([None, *queue, None])
        return fake.PREFETCH_QUEUES[-1]

    def pop(queue, device, module):
        queue.pop(0)
        told.append((module, None if queue[0] is None else {*queue[0].modules()}))

    fake.make_prefetch_queue, fake.prefetch_queue_pop = make, pop
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", fake)
    plainly = Forwards.run
    monkeypatch.setattr(Forwards, "run", lambda self, *args: plainly(self, *args[:-1],
                                                                     {**args[-1], "prefetch_dynamic_vbars": True}))
    model = plain()
    expected = run(model, frames=3)
    assert not told
    assert torch.equal(run(model, "prefetch", 3), expected)
    blocks = [*model.model.diffusion_model.blocks]
    forwards = 3 * len(TWO_STEPS) - 1  # two steps and a clean pass, none behind the last
    assert [module for module, _ in told] == [*blocks, None] * forwards
    keys = [block.cross_attn.k for block in blocks]
    assert all(key in wanted for key, (_, wanted) in zip(keys, told))
    assert all(key not in wanted for key, (_, wanted) in zip(keys, told[len(blocks) + 1:]))
    assert all(block.self_attn.k in wanted and block.cross_attn.q in wanted
               for block, (_, wanted) in zip(blocks, told[len(blocks) + 1:]))
    assert not fake.PREFETCH_QUEUES


def test_kernels_of_a_cpu_in_a_run(monkeypatch):
    """The same latents as by calling every module; core's numbers to the last bit where they are asked for."""
    used, plainly = [], host_accelerate.kernels_of
    monkeypatch.setattr(host_accelerate, "kernels_of", lambda *args: used.append(plainly(*args)) or used[-1])
    ours = run(plain())
    assert len(used) == 1 and used[0] is not PLAIN
    exact = CausalSampler(RolloutOptions(block=1, cache=CACHE, noise=host_accelerate.EXACT))
    sample(plain(), exact, 10, sigmas=TWO_STEPS)
    assert len(used) == 1
    monkeypatch.setattr(host_accelerate, "kernels_of", lambda *args: PLAIN)
    assert 0 < hostkit.relative(ours, run(plain())) <= 1e-5


def test_modules_are_looked_at_again_when_they_were_patched(monkeypatch):
    """A strength that changes while a stream runs gives a patcher another uuid."""
    made = []
    monkeypatch.setattr(host_accelerate, "kernels_of", lambda *args: made.append(args) or PLAIN)
    patcher = types.SimpleNamespace(load_device=torch.device("cpu"), patches_uuid=1, is_dynamic=lambda: False)
    forwards = Forwards(RolloutOptions(block=1), patcher, False)
    forwards._found(), forwards._found()
    patcher.patches_uuid = 2
    forwards._found()
    assert len(made) == 2
    forwards.free()
    assert forwards._kernels is PLAIN
