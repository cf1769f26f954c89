"""A tiny random S2V network, files of it, the LoRA of Live Avatar and a voice encoder as published, all at small sizes."""
from pathlib import Path

import torch
from forcing_testkit import tiny
from safetensors.torch import save_file

LAYERS = 5  # ComfyUI adds the voice behind blocks 0 and 4 of them
SOUND_LAYERS, SOUND_DIM = 25, 1024


def s2v_state(seed=7, layers=LAYERS):
    """State dict of ComfyUI's own S2V class with random values. Needs the checkout."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel_S2V

    net = WanModel_S2V(dim=tiny.DIM, ffn_dim=tiny.FFN_DIM, num_heads=tiny.DIM // 128, num_layers=layers, device="meta",
                       operations=comfy.ops.disable_weight_init)
    draw = torch.Generator().manual_seed(seed)
    state = {name: tiny._values(name, value.shape, draw) for name, value in net.state_dict().items()}
    state["casual_audio_encoder.weights"] = 0.5 + torch.rand(1, SOUND_LAYERS, 1, 1, generator=draw)
    state["trainable_cond_mask.weight"] = 0.5 * torch.randn(3, tiny.DIM, generator=draw)
    return state


def tiny_s2v(path):
    save_file(s2v_state(), path)
    return Path(path)


def live_avatar_lora(layers=LAYERS, rank=8, seed=8):
    """Factors under the names that PEFT gives the modules q, k, v, o, ffn.0 and ffn.2 of the S2V network."""
    draw, d, f = torch.Generator().manual_seed(seed), tiny.DIM, tiny.FFN_DIM
    sizes = {f"blocks.{i}.{attention}.{x}": (d, d) for i in range(layers) for attention in ("self_attn", "cross_attn")
             for x in "qkvo"}
    sizes |= {f"blocks.{i}.ffn.{n}": size for i in range(layers) for n, size in ((0, (f, d)), (2, (d, f)))}
    sizes |= {f"audio_injector.injector.{i}.{x}": (d, d) for i in range(12) for x in "qkvo"}
    made = {}
    for name, (rows, columns) in sizes.items():
        made[f"{name}.lora_A.default.weight"] = torch.randn(rank, columns, generator=draw) / columns ** 0.5
        made[f"{name}.lora_B.default.weight"] = 0.3 * torch.randn(rows, rank, generator=draw) / rank ** 0.5
    return made
