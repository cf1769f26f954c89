"""Sparse attention behind the attention seam: methods that choose keys for queries, and kernels for what they chose.

    options = Sparse(video=LightOptions(), prompt=CrossOptions())   # `RolloutOptions.sparse`, `make_memory(sparse=...)`

`selection.py` says what a choice is, `view.py` what a method is told; one file a method; `kernels.py` computes, `passes.py`
puts it between a memory and the network, `recall.py` measures how much attention mass a choice keeps.
"""
from .ann import AnnOptions
from .cross import CrossOptions
from .dummy import DummyOptions
from .kernels import KERNELS
from .light import LightOptions
from .passes import PROMPT, SPARSE, Sparse, SparsePass, Sparsity
from .selection import Blocks, Selection
from .view import Video, View

__all__ = ["AnnOptions", "Blocks", "CrossOptions", "DummyOptions", "KERNELS", "LightOptions", "PROMPT", "SPARSE", "Selection",
           "Sparse", "SparsePass", "Sparsity", "Video", "View"]
