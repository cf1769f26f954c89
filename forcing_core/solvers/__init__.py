"""Inner loops: from the noise of one block to its clean latents.

A solver is a function (x, levels, predict, fresh) -> x0. `predict(x, level)` is the network's x0 for a block
at one level; `fresh(step)` is new noise mixed in after a step. All tensors are [B, C, n, H, W].
"""
from .consistency import consistency
from .dpm import dpm
from .euler import euler, euler_levels
from .unipc import unipc

SOLVERS = {"renoise": consistency, "unipc": unipc, "dpm": dpm, "euler": euler}

__all__ = ["SOLVERS", "consistency", "dpm", "euler", "euler_levels", "unipc"]
