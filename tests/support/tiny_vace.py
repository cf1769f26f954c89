"""Random control blocks of VACE for the tiny network of `tiny`, and a file that has them beside weights of its own."""
from pathlib import Path

import torch
from forcing_testkit import tiny
from safetensors.torch import save_file


def vace_state(layers=1, seed=5):
    """Random control blocks of the tiny network."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {name: shape for name, shape in tiny.wan_shapes() if name.startswith("blocks.0.")}
    state = {f"vace_{name.replace('blocks.0', f'blocks.{layer}')}": tiny._values(name, shape, draw)
             for layer in range(layers) for name, shape in shapes.items()}
    square = (tiny.DIM, tiny.DIM)
    for name in ["vace_blocks.0.before_proj", *(f"vace_blocks.{layer}.after_proj" for layer in range(layers))]:
        state |= {f"{name}.weight": 0.5 * tiny._values("x.weight", square, draw), f"{name}.bias": torch.zeros(tiny.DIM)}
    state["vace_patch_embedding.weight"] = tiny._values("x.weight", (tiny.DIM, 96, 1, 2, 2), draw)
    state["vace_patch_embedding.bias"] = torch.zeros(tiny.DIM)
    return state


def tiny_vace(path):
    """Write a tiny VACE model, whose own weights are not those of `tiny.tiny_wan`, and return its path."""
    save_file({**tiny.wan_state_dict(seed=1), **vace_state()}, path)
    return Path(path)
