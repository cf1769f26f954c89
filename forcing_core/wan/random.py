"""Random networks of Wan's shape, for the demo, the benchmarks and tests.

Weights are drawn so that every layer has unit gain, the head included: activations stay near 1 at any depth, and
every part of the network has an effect.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from .model import WanConfig, WanModel


@torch.no_grad()
def random_network(config: WanConfig, seed: int, device: torch.device | str = "cpu",
                   dtype: torch.dtype = torch.float32) -> WanModel:
    """A network with weights from `seed`, built on its device. The global generators are not touched."""
    with torch.device("meta"):
        net = WanModel(config)
    net.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in net.named_parameters():
        _fill(name, parameter, generator)
    return net.eval().requires_grad_(False).to_compute(dtype)


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if name.endswith(("modulation", "bias")):
        parameter.normal_(std=0.1, generator=generator)
    elif parameter.dim() == 1:  # the scale of a norm
        parameter.fill_(1.0)
    else:
        parameter.normal_(std=math.prod(parameter.shape[1:]) ** -0.5, generator=generator)


def random_prompt(config: WanConfig, seed: int, device: torch.device | str = "cpu",
                  dtype: torch.dtype = torch.float32) -> Tensor:
    """[1, text_len, text_dim] in place of an encoded prompt."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(1, config.text_len, config.text_dim, generator=generator, device=device).to(dtype)
