"""Linear layers in float32 on a CPU, with the GELU between two of them, by the library that is at home on the processor.

torch sends float32 products to its BLAS, and bfloat16 ones to oneDNN. Where that BLAS is MKL and the processor not Intel's,
half of what it can do stays unused; there both go to oneDNN, by the operation that torch's own compiler uses for frozen
networks. Weights are taken as they lie: no copy, nothing kept. The same products are added up in another order. For inference
only: no gradient comes back.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..processor import processor
from . import plain
from .ordinary import Instead, Ordinary, Work, scalar

WORTH = 1 << 20  # products in a layer: with fewer, what it costs oneDNN to begin is more than what is saved
CACHED = 1 << 16  # numbers that stay in the cache between the operations of a GELU
LINEAR = 2 * sqrt(2 / pi)  # of the form of GELU with tanh
CUBIC = 0.044715 * LINEAR


@dataclass(frozen=True)
class Products:
    """plain: (x, weight, bias), gelu: (x, weight, bias, approximate), the same with a GELU behind it."""

    plain: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gelu: Callable[[Tensor, Tensor, Tensor | None, str], Tensor]


def has_onednn() -> bool:
    """Whether this torch was built with oneDNN, and has its linear layers for callers other than its compiler."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn() -> Products:
    run = torch.ops.mkldnn._linear_pointwise.default

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() * weight.shape[0] < WORTH:
            return functional.linear(x, weight, bias)
        return run(x, weight, bias, "none", [], "")

    return Products(plain, lambda x, weight, bias, how: run(x, weight, bias, "gelu", [], how))


def by_blas() -> Products:
    """oneDNN only for a GELU that would have to fetch its numbers from memory again."""
    whole = by_onednn().gelu

    def gelu(x: Tensor, weight: Tensor, bias: Tensor | None, how: str) -> Tensor:
        if x.numel() // x.shape[-1] * weight.shape[0] > CACHED:
            return whole(x, weight, bias, how)
        return gelu_(functional.linear(x, weight, bias), how)

    return Products(functional.linear, gelu)


def at_home() -> Products:
    """Those of this processor."""
    return by_blas() if torch.backends.mkl.is_available() and "intel" in processor().lower() else by_onednn()


def gelu_(x: Tensor, approximate: str) -> Tensor:
    """GELU of x in its place. The form with tanh is x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which takes a fraction of
    the time that a tanh does."""
    if approximate != "tanh":
        return torch.ops.aten.gelu_(x, approximate=approximate)
    return torch.addcmul(scalar(LINEAR), x, x, value=CUBIC).mul_(x).sigmoid_().mul_(x)


class Linears:
    """`linear`, `ffn` and `embed` of `Kernels`. modules: which ones are nothing but their numbers; all others are called."""

    def __init__(self, modules: Ordinary, products: Products):
        self._modules, self._products = modules, products
        self.linear, self.ffn = Instead(self._linear), Instead(self._ffn)
        self.embed = Instead(self._embed, plain.embed)

    def _linear(self, module: nn.Module, x: Tensor) -> Work | None:
        """[B, n, in] -> [B, n, out]."""
        return self._plain(module) if self._is_plain(module, x) else None

    def _ffn(self, module: nn.Module, x: Tensor) -> Work | None:
        """[B, n, D] -> [B, n, D], of linear, GELU, linear and no more."""
        if type(module) is not nn.Sequential or len(module) != 3 or not self._modules(module, x):
            return None
        grow, gelu, shrink = module
        plain = type(gelu) is nn.GELU and self._modules(gelu, x) and self._is_plain(grow, x) and self._is_plain(shrink, x)
        if not plain:
            return None
        first, own, how, second = self._products.gelu, grow._parameters, gelu.approximate, self._plain(shrink)
        return lambda x: second(first(x, own.get("weight"), own.get("bias"), how))

    def _embed(self, module: nn.Module, x: Tensor) -> Work | None:
        """[B, C, F, h, w] -> [B, n, D]: a convolution whose patches of one frame do not overlap is a product of them."""
        if not isinstance(module, nn.Conv3d) or not self._modules(module, x) or not _of_patches(module):
            return None
        product, own, (_, p, q) = self._products.plain, module._parameters, module.kernel_size

        def work(x: Tensor) -> Tensor:
            batch, channels, frames, height, width = x.shape
            cells = x.reshape(batch, channels, frames, height // p, p, width // q, q).permute(0, 2, 3, 5, 1, 4, 6)
            return product(cells.reshape(batch, -1, channels * p * q), own.get("weight").flatten(1), own.get("bias"))
        return work

    def _is_plain(self, module: nn.Module, x: Tensor) -> bool:
        return isinstance(module, nn.Linear) and self._modules(module, x)

    def _plain(self, module: nn.Linear) -> Work:
        product, own = self._products.plain, module._parameters
        return lambda x: product(x, own.get("weight"), own.get("bias"))


def _of_patches(module: nn.Conv3d) -> bool:
    alone = module.groups == 1 and module.padding == (0, 0, 0) and module.dilation == (1, 1, 1)
    return alone and module.stride == module.kernel_size and module.kernel_size[0] == 1
