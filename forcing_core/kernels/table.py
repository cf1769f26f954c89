"""Which kernels a forward calls: a row for plain torch, one for Triton, one for CPUs."""
from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor, nn

from . import plain
from .keys import Meet, Meeting, can_meet
from .linears import Linears, at_home, has_onednn
from .norms import Norms
from .ordinary import Known, Ordinary, in_float32, ordinary

TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 16384  # numbers of a row that one program holds


@dataclass(frozen=True)
class Kernels:
    """modulate: (norm, x, shift, factor), gate: (x, y, by), norm, linear, ffn and embed: (module, x), as in `plain`.
    opens(head, x): whether the parts of a head may be called in its place. meet(pass): how that pass takes queries and keys
    that no norm has seen, (layer, attention, heads, q, k, v) -> what `exchange` returns; None where they meet as always.
    """

    modulate: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    gate: Callable[[Tensor, Tensor, Tensor], Tensor]
    meet: Callable[[Any], Meet | None] = lambda now: None
    norm: Callable[[nn.Module, Tensor], Tensor] = plain.call
    linear: Callable[[nn.Module, Tensor], Tensor] = plain.call
    ffn: Callable[[nn.Module, Tensor], Tensor] = plain.call
    embed: Callable[[nn.Module, Tensor], Tensor] = plain.embed
    opens: Callable[[nn.Module, Tensor], bool] = plain.closed


PLAIN = Kernels(plain.modulate, plain.gate)


def has_triton() -> bool:
    """Whether Triton is installed. CUDA builds of torch for Linux bring it; nothing here asks for it."""
    return importlib.util.find_spec("triton") is not None


def _on_card(x: Tensor) -> bool:
    return x.is_cuda


def fused(norms: Ordinary = ordinary, here: Callable[[Tensor], bool] = _on_card) -> Kernels:
    """The Triton kernels where a tensor is `here` and the norm is one that may be taken apart, plain torch elsewhere.

    norms: says which may; a host has its own classes. Needs Triton.
    """
    from .gate import gate
    from .modulate import modulate

    def fits(x: Tensor, *by: Tensor) -> bool:
        return here(x) and x.dtype in TYPES and x.shape[-1] <= WIDEST and all(t.stride(-1) == 1 for t in by)

    def modulated(norm: nn.Module, x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        able = fits(x, shift, factor) and norms(norm, x) and norm.weight is None and norm.normalized_shape == x.shape[-1:]
        return modulate(x, shift, factor, norm.eps) if able else plain.modulate(norm, x, shift, factor)

    def gated(x: Tensor, y: Tensor, by: Tensor) -> Tensor:
        return (gate if fits(x, by) and y.dtype == x.dtype else plain.gate)(x, y, by)

    def meet(now: Any) -> Meet | None:
        return Meeting(now, norms) if can_meet(now) and here(now.turn) else None

    return Kernels(modulated, gated, meet)


def on_cpu(modules: Ordinary = ordinary) -> Kernels:
    """Linear layers by the library that is at home on the processor and norms in fewer operations, where those of the network
    are plain ones in float32; it looks at each of them once. Needs a torch with oneDNN."""
    linears, norms = Linears(modules, at_home()), Norms(modules)
    known = Known(modules)
    return Kernels(norms.modulate, plain.gate, norm=norms.norm, linear=linears.linear, ffn=linears.ffn, embed=linears.embed,
                   opens=lambda head, x: in_float32(x) and known(head, x))


# name -> kernels(which modules may be taken apart)
KERNELS: dict[str, Callable[[Ordinary], Kernels]] = {"plain": lambda modules: PLAIN, "triton": fused, "cpu": on_cpu}
# type of a device -> what has kernels for it, and whether that is there
THERE: dict[str, tuple[str, Callable[[], bool]]] = {"cuda": ("triton", has_triton), "cpu": ("cpu", has_onednn)}


def kernels_for(device: torch.device | str, modules: Ordinary = ordinary) -> Kernels:
    """Triton's row on an NVIDIA or AMD card, that of CPUs there, where these are there; the plain one elsewhere."""
    name, there = THERE.get(torch.device(device).type, ("plain", lambda: True))
    return KERNELS[name if there() else "plain"](modules)
