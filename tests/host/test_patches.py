"""Patches, overrides and replaced modules act in every forward of a rollout, as they do in a plain sampling run."""
import collections

import pytest
import torch
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.nodes import host_ops
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import TWO_STEPS, plain, relative, sample, sampler

# 6 frames in blocks of 3: two steps, the clean pass of block 1, two steps
NOISY, CLEAN = 4, 1


def video(model, **settings):
    return sample(model, sampler(), 6, sigmas=TWO_STEPS, **settings)


def attention_patch(name, change):
    """(patched MODEL, list of (tokens, layer) that the patch was given)."""
    model, calls = plain().clone(), []

    def patch(args):
        calls.append((args["x"].shape[1], args["transformer_options"]["block_index"]))
        return change(args["x"])

    getattr(model, f"set_model_{name}")(patch)
    return model, calls


@pytest.mark.parametrize("name", ["attn1_patch", "attn2_patch"])
def test_attention_patches_run_once_a_layer_and_change_the_result(name):
    """Core's AR sampler drops every patch silently (C1). The last layer of a clean pass has no attention."""
    model, calls = attention_patch(name, lambda x: x * 0.5)
    result = video(model)
    assert len(calls) == NOISY * tiny.LAYERS + CLEAN * (tiny.LAYERS - 1)
    assert [layer for _, layer in calls[:tiny.LAYERS]] == list(range(tiny.LAYERS))
    assert relative(result, video(plain())) > 1e-3


@pytest.mark.parametrize("name", ["attn1_patch", "attn2_patch"])
def test_patch_that_returns_its_input_changes_nothing(name):
    model, calls = attention_patch(name, lambda x: x)
    assert torch.equal(video(model), video(plain())) and calls


def test_self_attention_patch_sees_queries_and_keys():
    """MultiTalk and others read q and k: the keys are all that are attended to, the queries those of the block."""
    shapes = []
    model = plain().clone()

    def patch(args):
        shapes.append((args["q"].shape[1], args["k"].shape[1], args["transformer_options"]["block_index"]))
        return args["x"]

    model.set_model_attn1_patch(patch)
    video(model)
    frame = 6
    assert shapes[:2] == [(3 * frame, 3 * frame, 0), (3 * frame, 3 * frame, 1)]
    assert shapes[-1] == (3 * frame, 6 * frame, 1)


def test_replaced_block_runs_once_a_layer_and_changes_the_result():
    """patches_replace "double_block": gets the tokens and the original block, as in the stock forward."""
    calls = collections.Counter()

    def replacement(layer, gain):
        def replace(args, extra):
            calls[layer] += 1
            out = extra["original_block"](args)
            return {"img": out["img"] if out["img"] is None else gain * out["img"]}
        return replace

    def patched(gain):
        model = plain().clone()
        for layer in range(tiny.LAYERS):
            model.set_model_patch_replace(replacement(layer, gain), "dit", "double_block", layer)
        return model

    assert torch.equal(video(patched(1.0)), video(plain()))
    assert calls == {layer: NOISY + CLEAN for layer in range(tiny.LAYERS)}
    assert relative(video(patched(1.1)), video(plain())) > 1e-3


def test_skipped_block_is_skipped():
    """Skip-layer helpers return the tokens without calling the original: its store stays unread, not broken."""
    model = plain().clone()
    model.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "double_block", 0)
    assert relative(video(model), video(plain())) > 1e-3


def with_override(override):
    model = plain().clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def test_attention_override_is_used_everywhere():
    """Core's AR forward passes no transformer_options, so overrides never act there (C1)."""
    calls = []

    def override(attention, q, k, v, *args, **kwargs):
        calls.append(k.shape[1])
        return attention(q, k, v, *args, **kwargs)

    assert torch.equal(video(with_override(override)), video(plain()))
    text_rows, frame = 512, 6
    assert calls[:4] == [3 * frame, text_rows] * tiny.LAYERS
    assert calls[-2:] == [6 * frame, text_rows]
    zeros = with_override(lambda attention, q, k, v, *args, **kwargs: torch.zeros_like(q))
    assert relative(video(zeros), video(plain())) > 1e-2


def sage_one(attention, q, k, v, *args, **kwargs):
    """SageAttention 1.x smooths its keys in place; softmax does not see it, a cache does (style 0.2)."""
    k -= k.mean(dim=1, keepdim=True)
    return attention(q, k, v, *args, **kwargs)


ROUNDING = 1e-4


def test_kernel_that_writes_to_its_keys_cannot_harm_the_store():
    """Blocks after the first read what the kernel left behind, unless it got a copy."""
    assert relative(sample(with_override(sage_one), sampler(), 12), sample(plain(), sampler(), 12)) <= ROUNDING


def test_without_the_copy_that_kernel_does_harm(monkeypatch):
    """Shows that the test above can fail."""
    monkeypatch.setattr(host_ops, "mutates_keys", lambda transformer_options: False)
    assert relative(sample(with_override(sage_one), sampler(), 12), sample(plain(), sampler(), 12)) > 10 * ROUNDING


def test_text_keys_survive_such_a_kernel_too(monkeypatch):
    """The prompt's cached keys are used in every forward: harmed once, they would stay so."""
    expected = sample(plain(), sampler(), 6)

    def shifting(attention, q, k, v, *args, **kwargs):
        out = attention(q, k, v, *args, **kwargs)
        k.add_(1.0)
        return out

    assert torch.equal(sample(with_override(shifting), sampler(), 6), expected)
    monkeypatch.setattr(host_ops, "mutates_keys", lambda transformer_options: False)
    assert not torch.equal(sample(with_override(shifting), sampler(), 6), expected)


@pytest.mark.parametrize(("name", "version", "copies"), [
    ("attention_sage", "1.0.6", True), ("attention_sage", "2.2.0", False), ("attention_pytorch", "1.0.6", False)])
def test_sageattention_1_is_known_to_write_to_its_keys(monkeypatch, name, version, copies):
    """pip only finds 1.0.6; a copy for every other kernel would cost bandwidth for nothing."""
    kernel = lambda *args, **kwargs: None  # noqa: E731
    kernel.__name__ = name
    monkeypatch.setattr(host_ops.host_attention, "optimized_attention", kernel)
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    assert host_ops.mutates_keys({}) is copies


def test_replaced_cross_attention_is_honoured():
    """NAG and the like put another forward on the module by an object patch; cached text keys would go past it."""
    model, calls = plain().clone(), []

    def forward(x, context, context_img_len=None, transformer_options=None, **kwargs):
        calls.append((tuple(x.shape), tuple(context.shape), "uuids" in transformer_options))
        return torch.zeros_like(x)

    for layer in range(tiny.LAYERS):
        model.add_object_patch(f"diffusion_model.blocks.{layer}.cross_attn.forward", forward)
    result = video(model)
    assert len(calls) == NOISY * tiny.LAYERS + CLEAN * (tiny.LAYERS - 1)
    assert calls[0] == ((1, 18, tiny.DIM), (1, 512, tiny.DIM), True)
    blind = {name: torch.zeros_like(tensor) if ".cross_attn.o." in name else tensor
             for name, tensor in hostkit.weights().items()}
    assert relative(result, video(hostkit.load(blind))) <= 1e-5
    assert relative(video(plain()), result) > 1e-3  # gone with the clone
    name = "blocks.0.cross_attn.k"
    # ComfyUI leaves the module's own forward on the instance: taken for a replaced one, it would cost the text cache
    assert counted(plain(), [name]) == {name: 1}


def counted(model, names):
    """Calls of submodules during one video."""
    net, calls = model.model.diffusion_model, collections.Counter()
    hooks = [net.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
             for name in names]
    try:
        video(model)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def test_weights_are_only_reached_by_calling_modules():
    """Offloaded, paged and quantised weights exist only inside the module's own forward; nothing is computed after
    the last layer's keys and values in a clean pass, text keys once a run, and noise levels once each."""
    block = "blocks.1."
    every = ["patch_embedding", "blocks.0.ffn.0", "blocks.0.self_attn.o",
             block + "norm1", block + "self_attn.k", block + "self_attn.v", block + "self_attn.norm_k"]
    noisy = ["head", "head.head", block + "self_attn.q", block + "self_attn.o", block + "self_attn.norm_q",
             block + "norm3", block + "cross_attn.q", block + "cross_attn.o", block + "norm2", block + "ffn.0",
             block + "ffn.2"]
    once = ["text_embedding", block + "cross_attn.k", block + "cross_attn.v", block + "cross_attn.norm_k"]
    levels = dict.fromkeys(["time_embedding", "time_projection"], len(TWO_STEPS))  # two noisy ones and the clean one
    expected = {**dict.fromkeys(every, NOISY + CLEAN), **dict.fromkeys(noisy, NOISY), **dict.fromkeys(once, 1), **levels}
    assert counted(plain(), expected) == expected


def test_window_reaches_the_kernel():
    """The kernel is given the window's keys only, so time a block is constant."""
    sizes = []

    def override(attention, q, k, v, *args, **kwargs):
        sizes.append(k.shape[1] // 6)
        return attention(q, k, v, *args, **kwargs)

    cache = WindowOptions(window=6, sink=1)
    sample(with_override(override), sampler(cache=cache), 12, sigmas=TWO_STEPS)
    assert max(size for size in sizes if size != 512 // 6) == 6
