"""Fused kernels, CUDA graphs and prefetched weights over a model that ComfyUI manages: when each may be used.

Prefetching is ComfyUI's own: `comfy.model_prefetch` pages the weights of a whole block in at once, while the block before
works. ComfyUI offers it to every model with paged weights (dynamic VRAM) and uses it in one of its own, not in Wan's.
"""
from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from typing import Any, Iterator

import comfy.ldm.modules.attention as host_attention
import comfy.ops
from comfy.ldm.wan.model import Head
from torch import Tensor, nn

from ..forcing_core.accelerate import graphs_of, kernels_of, way
from ..forcing_core.kernels import KINDS as TORCHS
from ..forcing_core.kernels import PLAIN, Kernels, ordinary, untouched
from ..forcing_core.options import RolloutOptions
from ..forcing_core.passes import Exchange
from ..forcing_core.wan import Ops, TextState, forward
from .host_conditioning import is_plain

log = logging.getLogger(__name__)
KINDS = TORCHS | {getattr(kind, name) for kind in (comfy.ops.disable_weight_init, comfy.ops.manual_cast)
                   for name in ("LayerNorm", "RMSNorm", "Linear", "Conv3d")} | {Head}
EXACT = "comfy"  # the noise that asks for core's numbers to the last bit


def _as_loaded(module: nn.Module) -> bool:
    """Whether ComfyUI does nothing to the weights when the module is called: no LoRA put on then, no paging."""
    held = module.__dict__
    return not (held.get("weight_function") or held.get("bias_function") or "_v" in held)


def plain_module(module: nn.Module, like: Tensor) -> bool:
    """The rule of `kernels.ordinary` for ComfyUI's modules, whose numbers may be taken instead of calling them."""
    return ordinary(module, like, KINDS) and _as_loaded(module)


def can_record(net: nn.Module, transformer_options: dict, device) -> bool:
    """Whether a forward of this network is the same work every time, and all of it on the device."""
    if not is_plain(net) or any(transformer_options.get(key) for key in ("patches", "patches_replace")):
        return False
    if "optimized_attention_override" in transformer_options or \
            host_attention.optimized_attention is not host_attention.attention_pytorch:
        return False
    return all(_as_loaded(module) and untouched(module) for module in net.modules()) and \
        all(type(p) is nn.Parameter and p.device == device for p in net.parameters())


class Forwards:
    """How the forwards of one run are made. `run` takes what `wan.forward` takes; `free` drops what was recorded."""

    def __init__(self, options: RolloutOptions, patcher: Any, compiled: bool):
        self._way, self._name = way(options.accelerate), options.accelerate
        self._device, self._patcher = patcher.load_device, patcher
        # the compiler fuses by itself; and fused kernels round otherwise than ComfyUI
        self._fused = not compiled and options.noise != EXACT
        self._kernels, self._weights = PLAIN, None
        recordable = self._way.graphs and not compiled and not patcher.is_dynamic()
        self.graphs = graphs_of(self._name, self._device) if recordable else None

    def run(self, net: nn.Module, x: Tensor, timesteps: Tensor, text: TextState, memory: Exchange, ops: Ops, side: Any,
            transformer_options: dict) -> Tensor | None:
        if self._fused:
            ops = replace(ops, kernels=self._found())
        ahead = Ahead(net, x.device, text, transformer_options) if self._way.prefetch else None
        if ahead is not None and ahead.queue is not None:
            return ahead.run(net, x, timesteps, text, memory, ops, side)
        if self.graphs is None or self.graphs.off or not can_record(net, transformer_options, x.device):
            return forward(net, x, timesteps, text, memory, ops, side)
        velocity = self.graphs(net, x, timesteps, text, memory, ops, side, under=self._name)
        if self.graphs.off:
            log.warning("CUDA graphs cannot be used here and are off for this run: %s", self.graphs.off)
        return velocity

    def _found(self) -> Kernels:
        """The kernels for the modules as they are since ComfyUI patched them last."""
        if self._weights != self._patcher.patches_uuid:
            self._weights, self._kernels = self._patcher.patches_uuid, kernels_of(self._name, self._device, plain_module)
        return self._kernels

    def free(self) -> None:
        self._kernels, self._weights = PLAIN, None
        if self.graphs is not None:
            self.graphs.free()


class _Wanted:
    """A block as ComfyUI's queue takes it, without the keys and values of a prompt that are known already."""

    def __init__(self, block: nn.Module, known: bool):
        self._left = {block.cross_attn.k, block.cross_attn.v} if known else set()
        self._block = block

    def modules(self) -> Iterator[nn.Module]:
        return (module for module in self._block.modules() if module not in self._left)


class Ahead:
    """ComfyUI's queue over the blocks of one forward. queue: None where weights are not paged, or this ComfyUI has none."""

    def __init__(self, net: nn.Module, device, text: TextState, transformer_options: dict):
        self._device, self.queue = device, None
        if transformer_options.get("prefetch_dynamic_vbars", False):
            try:
                self._host = importlib.import_module("comfy.model_prefetch")
            except ImportError:  # a ComfyUI from before it
                return
            wanted = [_Wanted(block, text.knows(index)) for index, block in enumerate(net.blocks)]
            self.queue = self._host.make_prefetch_queue(wanted, device, transformer_options)

    def run(self, net: nn.Module, x: Tensor, timesteps: Tensor, text: TextState, memory: Exchange, ops: Ops,
            side: Any) -> Tensor | None:
        """One forward, each block behind its weights."""
        around = ops.around_block

        def behind(index, run, y, extras):
            self._host.prefetch_queue_pop(self.queue, self._device, net.blocks[index])
            return around(index, run, y, extras)

        velocity = forward(net, x, timesteps, text, memory, replace(ops, around_block=behind), side)
        self._host.prefetch_queue_pop(self.queue, self._device, None)
        mine = self._host.PREFETCH_QUEUES
        if mine and mine[-1] is self.queue:  # ComfyUI empties that list when a prompt ends, and a stream need not end
            mine.pop()
        return velocity
