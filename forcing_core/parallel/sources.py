"""Networks, prompts and decoders of a worker, on its device.

Axis legend: B batch, n rows of a prompt.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoints import load
from ..demo import Decoder, Projection
from ..errors import ForcingError
from ..micro import bundle
from ..micro.source import PROMPT, MicroSource, Pictures
from ..presets import Preset, get
from ..standalone import conditions
from ..wan import WanConfig, WanModel
from ..wan.random import random_network, random_prompt
from ..wan.text import pad_rows
from .request import Request

RANDOM = WanConfig(dim=256, ffn_dim=512, heads=4, layers=4, text_dim=64, text_len=64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PICTURE = (832, 480)  # usual (width, height) of a checkpoint


@dataclass(frozen=True)
class Source:
    """preset: how the network is run. prompts: [1, n, text_dim] for each condition. size: (width, height) in pixels. decoder:
    makes a new one, None where there is none."""

    net: WanModel
    preset: Preset
    prompts: list[Tensor]
    size: tuple[int, int]
    decoder: Callable[[], Decoder] | None = None


def source_of(request: Request, device: torch.device) -> Source:
    """What a request asks for. Raises ForcingError for unknown names, files that are missing, and a prompt that the network
    cannot be given."""
    if request.dtype not in DTYPES:
        raise ForcingError(f"dtype {request.dtype!r} is not known. Use one of {', '.join(DTYPES)}.")
    dtype = DTYPES[request.dtype]
    if request.weights == "random":
        return _random(request, device, dtype)
    return (_micro if request.weights in bundle.NETWORKS else _file)(request, device, dtype)


def _random(request: Request, device: torch.device, dtype: torch.dtype) -> Source:
    preset = get(request.preset or "self-forcing")
    if request.prompt is not None or request.conditioning is not None:
        raise ForcingError("Random weights follow no prompt. Leave out --prompt and --conditioning, or choose other weights.")
    prompts = [random_prompt(RANDOM, seed, device, dtype) for seed in range(conditions(preset))]
    return Source(random_network(RANDOM, 0, device, dtype), preset, prompts, request.size or (128, 64),
                  lambda: Projection(RANDOM.in_channels))


def _micro(request: Request, device: torch.device, dtype: torch.dtype) -> Source:
    if request.conditioning is not None:
        raise ForcingError("The micro networks are given captions. Use --prompt instead of --conditioning.")
    source = MicroSource(PROMPT if request.prompt is None else request.prompt, request.weights)
    preset = get(request.preset or source.usual_preset(request.frames))
    captions = [source.prompt, ""][:conditions(preset)]
    prompts = [bundle.prompt([caption]).to(device, dtype) for caption in captions]
    net = bundle.network(request.weights).to_compute(dtype).to(device)
    vae = bundle.vae()  # of the host: its pictures are small
    return Source(net, preset, prompts, request.size or source.size, lambda: Pictures(vae))


def _file(request: Request, device: torch.device, dtype: torch.dtype) -> Source:
    path = Path(request.weights)
    if not path.is_file():
        raise ForcingError(f"There are no weights {request.weights}. Use a checkpoint file, random, or one of "
                           f"{', '.join(bundle.NETWORKS)}.")
    loaded = load(path, preset=request.preset)
    preset = get(request.preset) if request.preset else _only(loaded.identity.candidates, path)
    told = loaded.config
    with torch.device("meta"):
        net = WanModel(WanConfig(told.dim, told.ffn_dim, told.num_heads, told.num_layers, told.in_dim, told.out_dim,
                                 told.freq_dim, told.text_dim))
    net.load_state_dict(loaded.state_dict, assign=True)
    net = net.eval().requires_grad_(False).to_compute(dtype).to(device)
    prompts = [prompt.to(device, dtype) for prompt in _conditioning(request, conditions(preset), net.config)]
    return Source(net, preset, prompts, request.size or PICTURE)


def _only(candidates: tuple[str, ...], path: Path) -> Preset:
    if not candidates:
        raise ForcingError(f"Nothing tells which system {path.name} belongs to. Name it with --preset.")
    return get(candidates[0])


def _conditioning(request: Request, count: int, config: WanConfig) -> list[Tensor]:
    """Encoded prompts [1, text_len, text_dim] from a file."""
    if request.conditioning is None:
        raise ForcingError("A checkpoint needs an encoded prompt, for there is no text encoder here. Give --conditioning FILE: "
                           f"safetensors with 'prompt' [1, n, {config.text_dim}] and, for guided systems, 'negative'.")
    try:
        found = load_file(request.conditioning)
    except (OSError, SafetensorError) as error:
        raise ForcingError(f"{request.conditioning} was not read: {error}. Give a safetensors file.") from error
    names = ("prompt", "negative")[:count]
    for name in names:
        if name not in found or found[name].ndim != 3 or found[name].shape[::2] != (1, config.text_dim):
            raise ForcingError(f"{request.conditioning} has no '{name}' of the shape [1, n, {config.text_dim}]. Encode it with "
                               "Wan's text encoder and save it under that name.")
    return [pad_rows(found[name], config.text_len) for name in names]
