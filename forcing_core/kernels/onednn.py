"""oneDNN: linear layers in float32 on a CPU, with the GELU between two of them in the same call.

torch sends float32 products to its BLAS, which leaves half of what some processors can do unused (MKL on AMD's), and bfloat16
ones to oneDNN. Here both go there, by the operation that torch's own compiler uses for frozen networks. Weights are taken as
they lie: no copy, nothing kept. The same products are added up in another order. For inference only: no gradient comes back.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .ordinary import Known, Ordinary, in_float32, numbers

WORTH = 1 << 20  # products in a layer: with fewer, what it costs to begin is more than what is saved


def has_onednn() -> bool:
    """Whether this torch was built with oneDNN, and has its linear layers for callers other than its compiler."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linears:
    """`linear` and `ffn` of `Kernels`. modules: which ones are nothing but their numbers; all others are called."""

    def __init__(self, modules: Ordinary):
        self._modules, self._run = modules, torch.ops.mkldnn._linear_pointwise.default
        self._plain = Known(lambda module, x: isinstance(module, nn.Linear) and modules(module, x))
        self._apart: dict[nn.Module, tuple | None] = {}

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        """[B, n, in] -> [B, n, out]."""
        return self._product(module, x) if in_float32(x) and self._plain(module, x) else module(x)

    def ffn(self, module: nn.Module, x: Tensor) -> Tensor:
        """[B, n, D] -> [B, n, D]."""
        if not in_float32(x):
            return module(x)
        if module not in self._apart:
            self._apart[module] = self._taken_apart(module, x)
        if self._apart[module] is None:
            return module(x)
        grow, gelu, shrink = self._apart[module]
        return self._product(shrink, self._run(x, *numbers(grow), "gelu", [], gelu.approximate))

    def _taken_apart(self, module: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module, nn.Module] | None:
        """Linear, GELU, linear of a feed-forward network that is these three and no more."""
        if type(module) is not nn.Sequential or len(module) != 3 or not self._modules(module, x):
            return None
        grow, gelu, shrink = module
        plain = type(gelu) is nn.GELU and self._modules(gelu, x) and self._plain(grow, x) and self._plain(shrink, x)
        return (grow, gelu, shrink) if plain else None

    def _product(self, module: nn.Module, x: Tensor) -> Tensor:
        weight, bias = numbers(module)
        if x.numel() * module.out_features < WORTH:
            return functional.linear(x, weight, bias)
        return self._run(x, weight, bias, "none", [], "")
