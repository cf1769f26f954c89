"""Tiny random weights of the bidirectional portrait models, and what their nodes are given. Needs the checkout."""
import comfy.ops
import torch
from comfy.ldm.wan.model import WanModel, WanModel_S2V
from comfy.ldm.wan.model_animate import AnimateWanModel
from comfy.ldm.wan.model_multitalk import MultiTalkAudioProjModel, SingleStreamMultiAttention
from comfy.model_patcher import ModelPatcher
from forcing_testkit import tiny

SIZES = {"image_model": "wan2.1", "dim": tiny.DIM, "ffn_dim": tiny.FFN_DIM, "freq_dim": tiny.FREQ_DIM,
         "text_dim": tiny.TEXT_DIM, "out_dim": tiny.CHANNELS, "num_heads": tiny.DIM // 128, "device": "cpu",
         "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
WIDTH, LAYERS_HEARD, FEATURES = 32, 2, 8  # of InfiniteTalk's audio tokens, and of what its encoder gives


def state_of(net, seed, but=()):
    """Values for all its weights except those whose names begin with one of `but`."""
    draw = torch.Generator().manual_seed(seed)
    kept = {name: value for name, value in net.state_dict().items() if not name.startswith(tuple(but) or "-")}
    return {name: value.clone() if name.endswith(".kernel") else _value(name, value.shape, draw)
            for name, value in kept.items()}


def _value(name, shape, draw):
    if "motion_encoder" in name and len(shape) > 1:  # scales its weights itself
        return torch.randn(shape, generator=draw)
    return torch.ones(shape) if name.endswith("casual_audio_encoder.weights") else tiny._values(name, shape, draw)


def animate_state_dict(seed=70, but=()):
    """Wan Animate with as few layers as its face adapter allows."""
    return state_of(AnimateWanModel(in_dim=36, num_layers=5, **SIZES), seed, but)


def i2v_state_dict(seed=71):
    return state_of(WanModel(model_type="i2v", in_dim=36, num_layers=tiny.LAYERS, **SIZES), seed)


def s2v_state_dict(seed=72):
    return state_of(WanModel_S2V(num_layers=tiny.LAYERS, **SIZES), seed)


def wan22_state_dict(seed=73):
    """Wan 2.2 5B: 48 channels, and a timestep for every frame."""
    return state_of(WanModel(in_dim=48, num_layers=tiny.LAYERS, **{**SIZES, "out_dim": 48}), seed)


class Motion(torch.nn.Module):
    """In place of Animate's motion encoder, which takes a second a picture on a CPU."""

    def get_motion(self, pictures):
        return torch.nn.functional.adaptive_avg_pool2d(pictures, (16, 32)).mean(1).flatten(1)


class Pooled:
    """In place of a VAE: a latent is the mean of its frames, so that a clip's latents are those of the video."""

    def encode(self, video):
        small = torch.nn.functional.avg_pool2d(video[..., :3].movedim(-1, 1).float(), 8).mean(1)
        frames = [small[:1], *(small[1:].split(4) if len(small) > 1 else ())]
        weights = torch.linspace(-1.0, 1.0, tiny.CHANNELS).view(1, -1, 1, 1, 1)
        return weights * torch.cat([part.mean(0, keepdim=True) for part in frames]).unsqueeze(0).unsqueeze(0)


def video(frames, width, height, seed=0):
    """IMAGE [frames, height, width, 3] in which no two frames are alike."""
    draw = torch.Generator().manual_seed(80 + seed)
    coarse = torch.rand(frames, 3, max(1, height // 8), max(1, width // 8), generator=draw)
    return torch.nn.functional.interpolate(coarse, (height, width)).movedim(1, -1)


def talk_patch(seed=74):
    """InfiniteTalk's weights for the tiny I2V network, as Model Patch Loader gives them."""
    draw = torch.Generator().manual_seed(seed)
    kinds = {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}

    def filled(module):
        for name, parameter in module.named_parameters():
            parameter.data.copy_(tiny._values(name, parameter.shape, draw))
        return module

    def layer():
        made = torch.nn.Module()
        made.audio_cross_attn = filled(SingleStreamMultiAttention(tiny.DIM, WIDTH, num_heads=2, qkv_bias=True, **kinds))
        made.norm_x = torch.nn.LayerNorm(tiny.DIM)
        return made

    net = torch.nn.Module()
    net.blocks = torch.nn.ModuleList(layer() for _ in range(tiny.LAYERS))
    net.audio_proj = filled(MultiTalkAudioProjModel(seq_len_vf=8, blocks=LAYERS_HEARD, channels=FEATURES, intermediate_dim=16,
                                                    out_dim=WIDTH, context_tokens=4, **kinds))
    return ModelPatcher(net.requires_grad_(False), torch.device("cpu"), torch.device("cpu"))


def heard(layers, features, entries=100, seed=0):
    """AUDIO_ENCODER_OUTPUT of two seconds, 50 entries each."""
    draw = torch.Generator().manual_seed(90 + seed)
    return {"encoded_audio_all_layers": [torch.randn(1, entries, features, generator=draw) for _ in range(layers)]}
