"""Whether a norm is nothing but its numbers, so that a kernel may take these instead of calling the module."""
from __future__ import annotations

from typing import Callable

from torch import Tensor, nn

KINDS = (nn.LayerNorm, nn.RMSNorm)
Ordinary = Callable[[nn.Module, Tensor], bool]


def resident(module: nn.Module, like: Tensor) -> bool:
    """Whether the weights of a norm, if it has any, are plain ones of the type and on the device of `like`."""
    own = [p for p in module.parameters(recurse=False)]
    return all(type(p) is nn.Parameter and p.device == like.device and p.dtype == like.dtype for p in own)


def untouched(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class and nothing else."""
    own = vars(module).get("forward")  # some put the module's own one back on the instance
    as_made = own is None or getattr(own, "__func__", None) is type(module).forward
    return as_made and not (module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"))


def ordinary(module: nn.Module, like: Tensor) -> bool:
    """Of torch's own norms. A host with norm classes of its own has another rule, which it gives to `fused`."""
    return type(module) in KINDS and untouched(module) and resident(module, like)
