"""InfiniteTalk's audio over causal rollouts: ComfyUI's patches on tiny weights, with the tokens of the frames in work."""
import atexit
import functools

import comfy.ops
import pytest
import torch
from comfy.ldm.wan.model_multitalk import (
    InfiniteTalkOuterSampleWrapper,
    MultiTalkCrossAttnPatch,
    MultiTalkGetAttnMapPatch,
    SingleStreamMultiAttention,
)
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from forcing_pack.forcing_core.errors import ForcingError
from forcing_testkit import densekit, hostkit, tiny
from forcing_testkit.hostkit import SIZE, TWO_STEPS, plain, sample, sampler, text

FRAMES, WIDTH = 9, 32
EXACT = {"block": 3, "noise": "comfy"}  # with which the time embedding is computed as ComfyUI computes it


def adapter():
    """Audio attention for every layer of the tiny network, as the model patch holds it."""
    draw = torch.Generator().manual_seed(60)

    def layer():
        made = torch.nn.Module()
        attention = SingleStreamMultiAttention(tiny.DIM, WIDTH, num_heads=2, qkv_bias=True, device="cpu", dtype=torch.float32,
                                               operations=comfy.ops.disable_weight_init)
        for name, parameter in attention.named_parameters():
            parameter.data.copy_(tiny._values(name, parameter.shape, draw))
        made.audio_cross_attn, made.norm_x = attention, torch.nn.LayerNorm(tiny.DIM)
        return made

    net = torch.nn.Module()
    net.blocks = torch.nn.ModuleList(layer() for _ in range(tiny.LAYERS)).requires_grad_(False)
    return ModelPatcher(net, torch.device("cpu"), torch.device("cpu"))


@functools.cache
def patch():
    return MultiTalkCrossAttnPatch(adapter(), 0.7)


atexit.register(patch.cache_clear)  # while ComfyUI's modules still are what they were: its patchers run code when they go


def tokens(frames=FRAMES, seed=0):
    """[1, frames, 4, WIDTH], as `project_audio_features` makes them."""
    return torch.randn(1, FRAMES, 4, WIDTH, generator=torch.Generator().manual_seed(61 + seed))[:, :frames]


def talking(audio, motion=None):
    """What WanInfiniteTalkToVideo makes of a MODEL."""
    model = plain().clone()
    model.set_model_patch(patch(), "attn2_patch")
    model.model_options["transformer_options"]["audio_embeds"] = audio
    if motion is not None:
        wrapper = InfiniteTalkOuterSampleWrapper(motion, None)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "infinite_talk_outer_sample", wrapper)
    return model


def cut(given, frames):
    options = given["transformer_options"]
    return {**given, "transformer_options": {**options, "audio_embeds": options["audio_embeds"][:, :frames]}}


def whole(audio):
    return {"context": text()[0][0], "transformer_options": {"patches": {"attn2_patch": [patch()]}, "audio_embeds": audio}}


def test_a_rollout_equals_the_stock_model_under_a_dense_mask(monkeypatch):
    seen = densekit.watch_forwards(monkeypatch)
    sample(talking(tokens()), sampler(**EXACT), FRAMES, sigmas=TWO_STEPS)
    assert densekit.largest_gap(plain(), seen, whole(tokens()), cut) <= 1e-5
    late = torch.cat([tokens()[:, :6], tokens(seed=1)[:, 6:]], dim=1)  # audio of the last block only
    assert densekit.largest_gap(plain(), seen, whole(late), cut) > 1e-3


def test_the_first_block_needs_only_its_own_audio():
    long = sample(talking(tokens()), sampler(), FRAMES, sigmas=TWO_STEPS)
    assert torch.equal(long[:, :, :3], sample(talking(tokens(3)), sampler(), 3, sigmas=TWO_STEPS))


@pytest.mark.parametrize("block", [1, 3])
def test_motion_frames_are_the_first_of_the_video_only(block, monkeypatch):
    """ComfyUI's wrapper would put them at the beginning of every block."""
    motion = torch.randn(1, 16, 2, *SIZE, generator=torch.Generator().manual_seed(62))
    inputs, embedding = [], plain().model.diffusion_model.patch_embedding
    hook = embedding.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    try:
        sample(talking(tokens(), motion), sampler(block=block), 6, sigmas=TWO_STEPS)
    finally:
        hook.remove()
    scaled = plain().model.process_latent_in(motion)
    calls = [first for first in range(0, 6, block) for _ in range(3)][:len(inputs)]
    for first, x in zip(calls, inputs):
        for i in range(x.shape[2]):
            same = first + i < 2 and torch.equal(x[:, :, i], scaled[:, :, first + i])
            assert same == (first + i < 2)
            assert not any(torch.equal(x[:, :, i], scaled[:, :, f]) for f in range(2) if f != first + i)


def test_two_speakers_are_refused():
    model = talking(tokens())
    model.set_model_patch(MultiTalkGetAttnMapPatch(torch.ones(2, 6)), "attn1_patch")
    with pytest.raises(ForcingError, match="two speakers.*single_speaker"):
        sample(model, sampler(), 3, sigmas=TWO_STEPS)


def test_audio_that_ends_before_the_video_goes_on_with_its_last_frame():
    longer = torch.cat([tokens(6), tokens(6)[:, -1:].expand(-1, 3, -1, -1)], dim=1)
    short, held, other = (sample(talking(audio), sampler(), FRAMES, sigmas=TWO_STEPS)
                          for audio in (tokens(6), longer, tokens()))
    assert torch.equal(short, held) and hostkit.relative(short, other) > 1e-3
