"""Fused kernels for what a forward does between matrix products and attention.

    plain      the three things in plain torch, and the default everywhere
    modulate   Triton: LayerNorm and modulation
    gate       Triton: gated residual
    rotate     Triton: RMSNorm and rotation of queries and keys, keys straight into the store's buffers
    keys       the pass through which those go
    ordinary   which norms may be taken apart; all others are called as modules
    table      which of all this runs where

Triton is no dependency: its modules are imported only where it is there.
"""
from .ordinary import Ordinary, ordinary, resident, untouched
from .table import KERNELS, PLAIN, Kernels, fused, has_triton, kernels_for

__all__ = ["KERNELS", "PLAIN", "Kernels", "Ordinary", "fused", "has_triton", "kernels_for", "ordinary", "resident",
           "untouched"]
