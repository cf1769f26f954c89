"""Tiny random checkpoints that ComfyUI detects as Wan 2.1: seconds to run, nothing to download."""
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

# Head size 128 is what ComfyUI assumes (num_heads = dim // 128), text_dim is what it cannot detect.
DIM, FFN_DIM, LAYERS, TEXT_DIM, FREQ_DIM, CHANNELS = 256, 512, 2, 4096, 256, 16
CAUSAL_METADATA = {"config": json.dumps({"transformer": {"causal_ar": True}})}


def wan_state_dict(dtype=torch.float32, seed=0, layers=LAYERS):
    """State dict of a Wan 2.1 T2V transformer in the original names; the head is not zero."""
    draw = torch.Generator().manual_seed(seed)
    return {name: _values(name, shape, draw).to(dtype) for name, shape in wan_shapes(layers)}


def wan_shapes(layers=LAYERS):
    """Yields (name, shape) in file order."""
    yield from _affine("patch_embedding", (DIM, CHANNELS, 1, 2, 2))
    yield from _affine("text_embedding.0", (DIM, TEXT_DIM))
    yield from _affine("text_embedding.2", (DIM, DIM))
    yield from _affine("time_embedding.0", (DIM, FREQ_DIM))
    yield from _affine("time_embedding.2", (DIM, DIM))
    yield from _affine("time_projection.1", (6 * DIM, DIM))
    for layer in range(layers):
        yield from _block_shapes(f"blocks.{layer}")
    yield "head.modulation", (1, 2, DIM)
    yield from _affine("head.head", (4 * CHANNELS, DIM))


def _block_shapes(block):
    yield f"{block}.modulation", (1, 6, DIM)
    for attention in ("self_attn", "cross_attn"):
        for projection in "qkvo":
            yield from _affine(f"{block}.{attention}.{projection}", (DIM, DIM))
        yield f"{block}.{attention}.norm_q.weight", (DIM,)
        yield f"{block}.{attention}.norm_k.weight", (DIM,)
    yield from _affine(f"{block}.norm3", (DIM,))
    yield from _affine(f"{block}.ffn.0", (FFN_DIM, DIM))
    yield from _affine(f"{block}.ffn.2", (DIM, FFN_DIM))


def _affine(name, weight_shape):
    return (f"{name}.weight", weight_shape), (f"{name}.bias", weight_shape[:1])


def _values(name, shape, draw):
    """Unit gain through every layer, so that activations stay near 1 at any depth."""
    if name.endswith(("modulation", ".bias")):
        return 0.1 * torch.randn(shape, generator=draw)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=draw) / math.prod(shape[1:]) ** 0.5


def tiny_wan(path, causal_metadata=False, prefix="", container=None, dtype=torch.float32, seed=0, layers=LAYERS):
    """Write a tiny Wan 2.1 T2V checkpoint and return its path.

    causal_metadata: mark it as ComfyUI's own AR sampler needs it (.safetensors only).
    prefix: put before every name, e.g. "model.diffusion_model." or "model._fsdp_wrapped_module.".
    container: the key (or keys, outermost first) a .pt file nests its state dict under, e.g. "generator_ema".
    """
    path = Path(path)
    state = {prefix + name: value for name, value in wan_state_dict(dtype, seed, layers).items()}
    if path.suffix == ".safetensors":
        if container is not None:
            raise ValueError("safetensors files are flat: use a .pt path for a container")
        save_file(state, path, metadata=CAUSAL_METADATA if causal_metadata else None)
        return path
    if causal_metadata:
        raise ValueError("only safetensors files carry metadata")
    for key in reversed([container] if isinstance(container, str) else container or []):
        state = {key: state}
    torch.save(state, path)
    return path


def tiny_wan_vae(path, dim=8, seed=0):
    """Write a tiny random Wan 2.1 VAE (ComfyUI detects the width) and return its path. Needs the checkout."""
    import comfy.ldm.wan.vae

    vae = comfy.ldm.wan.vae.WanVAE(dim=dim, z_dim=CHANNELS, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                                   temperal_downsample=[False, True, True])
    draw = torch.Generator().manual_seed(seed)
    state = {name: _vae_values(name, value.shape, draw) for name, value in vae.state_dict().items()}
    save_file(state, path)
    return Path(path)


def _vae_values(name, shape, draw):
    if name.endswith("gamma"):
        return torch.ones(shape)
    return _values(name, shape, draw)


def tiny_models(folder):
    """Fill `folder`, laid out like ComfyUI's models/, with one checkpoint of each kind; return it.

    diffusion_models/ tiny_wan.safetensors (plain T2V), tiny_wan_bf16.safetensors, tiny_wan_causal.safetensors
    (same weights as tiny_wan, marked causal); vae/ tiny_wan_vae.safetensors.
    """
    diffusion, vae = folder / "diffusion_models", folder / "vae"
    diffusion.mkdir(parents=True)
    vae.mkdir()
    tiny_wan(diffusion / "tiny_wan.safetensors")
    tiny_wan(diffusion / "tiny_wan_bf16.safetensors", dtype=torch.bfloat16)
    tiny_wan(diffusion / "tiny_wan_causal.safetensors", causal_metadata=True)
    tiny_wan_vae(vae / "tiny_wan_vae.safetensors")
    return folder
