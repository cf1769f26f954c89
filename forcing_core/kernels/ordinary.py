"""Whether a module is nothing but its numbers, so that a kernel may take these instead of calling it."""
from __future__ import annotations

import functools
from functools import partial
from typing import Callable, Collection

import torch
from torch import Tensor, nn

from . import plain

KINDS = {nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.GELU, nn.Sequential, nn.Conv3d}
Ordinary = Callable[[nn.Module, Tensor], bool]
Work = Callable[[Tensor], Tensor]


def resident(module: nn.Module, like: Tensor) -> bool:
    """Whether the weights of a module, if it has any of its own, are plain ones of the type and on the device of `like`."""
    for p in module._parameters.values():
        if p is not None and (type(p) is not nn.Parameter or p.dtype != like.dtype or p.device != like.device):
            return False
    return True


def untouched(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class and nothing else."""
    held = module.__dict__
    if held["_forward_hooks"] or held["_forward_pre_hooks"] or "parametrizations" in held["_modules"]:
        return False
    # some put the module's own one back on the instance
    return "forward" not in held or getattr(held["forward"], "__func__", None) is type(module).forward


def ordinary(module: nn.Module, like: Tensor, kinds: Collection[type] = KINDS) -> bool:
    """Of torch's own, or of the kinds that a network or a host has beside them."""
    return type(module) in kinds and untouched(module) and resident(module, like)


class Known:
    """A rule that looks at every module once: asked in every forward, it would be a noticeable part of a small one. Good until
    modules are changed, which new numbers in them are not."""

    def __init__(self, rule: Ordinary):
        self._rule, self._found = rule, {}

    def __call__(self, module: nn.Module, like: Tensor) -> bool:
        found = self._found.get(module)
        if found is None:
            found = self._found[module] = self._rule(module, like)
        return found


class Instead:
    """Does the work of modules: by what `make(module, x)` gives for one at its first call, or as `usual` does, where that is
    None or x is no float32 on a CPU. Good for as long as `Known` is."""

    def __init__(self, make: Callable[[nn.Module, Tensor], Work | None],
                 usual: Callable[[nn.Module, Tensor], Tensor] = plain.call):
        self._make, self._usual, self._found = make, usual, {}

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        if not in_float32(x):
            return self._usual(module, x)
        work = self._found.get(module)
        if work is None:
            work = self._found[module] = self._make(module, x) or partial(self._usual, module)
        return work(x)


@functools.cache
def scalar(number: float) -> Tensor:
    """It as a tensor, whatever the default type and device are."""
    return torch.tensor(number, dtype=torch.float32, device="cpu")


def in_float32(x: Tensor) -> bool:
    """Whether x is float32 on a CPU, and nobody wants gradients."""
    return x.dtype == torch.float32 and x.is_cpu and not torch.is_grad_enabled()
