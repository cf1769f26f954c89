"""Kernels for what a forward does beside attention.

    plain      all of it in plain torch, and the default everywhere but on a CPU
    modulate   Triton: LayerNorm and modulation
    gate       Triton: gated residual
    rotate     Triton: RMSNorm and rotation of queries and keys, keys straight into the store's buffers
    keys       the pass through which those go
    linears    CPU, float32: linear layers, and GELU between them, by oneDNN or torch's BLAS
    norms      CPU, float32: norms and modulation in fewer operations
    ordinary   which modules may be taken apart; all others are called
    table      which of all this runs where

Triton is no dependency: its modules are imported only where it is there.
"""
from .ordinary import KINDS, Ordinary, ordinary, untouched
from .table import KERNELS, PLAIN, Kernels, fused, has_triton, kernels_for

__all__ = ["KERNELS", "KINDS", "PLAIN", "Kernels", "Ordinary", "fused", "has_triton", "kernels_for", "ordinary", "untouched"]
