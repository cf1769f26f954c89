"""One condition on its own, from ComfyUI's guider straight to its model.

Before every forward ComfyUI finds out which conditions fit into memory together, and adds their answers up by area and
strength. A causal rollout without CFG has one condition that is all of the answer, and a forward that may take a few
milliseconds; working that out took 6 % of it on the micro model. Everything else goes ComfyUI's way.
"""
from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from comfy.conds import CONDCrossAttn, CONDNoiseShape, CONDRegular
from comfy.patcher_extension import WrapperExecutor, merge_nested_dicts
from torch import Tensor

from .host_conditioning import SOURCES

STOCK = comfy.samplers._calc_cond_batch
# of a condition: what the model is called with, and what has been made into that already. With any other key ComfyUI decides
KNOWN = {"model_conds", "uuid", "cross_attn", "pooled_output", "adm_encoded", "control_apply_to_uncond", "attention_mask",
         SOURCES}
TENSORS = {CONDRegular, CONDCrossAttn, CONDNoiseShape}  # whose `concat` with no others is a copy, of a prompt say


def straight(executor: WrapperExecutor, model: Any, conds: list, x: Tensor, timestep: Tensor,
             model_options: dict) -> list[Tensor]:
    """CALC_COND_BATCH wrapper: the same answers as ComfyUI's own, which does it wherever this cannot."""
    cond = _only(conds)
    alone = executor.original is STOCK and len(executor.wrappers) == 1
    if cond is None or not alone or "multigpu_clones" in model_options or "model_function_wrapper" in model_options:
        return executor(model, conds, x, timestep, model_options)
    patcher = model.current_patcher
    patcher.prepare_state(timestep, model_options)
    options = merge_nested_dicts(patcher.apply_hooks(hooks=None), model_options["transformer_options"], copy_dict1=False)
    options |= {"cond_or_uncond": [0], "uuids": [cond["uuid"]], "sigmas": timestep}
    values = {name: _value(value.process_cond(batch_size=x.shape[0], area=None)) for name, value in cond["model_conds"].items()}
    return [model.apply_model(x, timestep, **values, transformer_options=options), *(torch.zeros_like(x) for _ in conds[1:])]


def _value(processed: CONDRegular) -> Any:
    """What the model gets of a value for it, of one condition."""
    return processed.cond if type(processed) in TENSORS else processed.concat([])


def _only(conds: list) -> dict | None:
    """The one condition, if it is one, of the first side, and has nothing but values for the model."""
    sides = [side for side in conds if side is not None]
    if len(sides) != 1 or sides[0] is not conds[0] or len(sides[0]) != 1:
        return None
    return sides[0][0] if sides[0][0].keys() <= KNOWN else None
