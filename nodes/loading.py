"""Loading official checkpoints of the family, containers and all, as an ordinary MODEL."""
from __future__ import annotations

import logging
from dataclasses import replace

import comfy.model_management as mm
import comfy.model_sampling
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..forcing_core import checkpoints
from ..forcing_core.errors import ForcingError
from ..forcing_core.presets import get
from .common import CATEGORY, SYSTEMS
from .host_memory import KEY, reserve

log = logging.getLogger(__name__)
AUTO, NONE = "auto", "none"
WEIGHT_DTYPES = {
    "default": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


class _FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """Flow matching with a shift of its own; a plain Wan file comes with shift 8."""


def prepared(model, shift: float):
    """A clone of MODEL with the system's flow shift that also announces the KV store to ComfyUI's memory manager."""
    model = model.clone()
    sampling = _FlowSampling(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    model.add_object_patch("model_sampling", sampling)
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, reserve)
    return model


def _load_options(weight_dtype: str) -> dict:
    """Options of ComfyUI's loader. Left alone it takes fp16 on most cards; the family was trained in bf16."""
    device = mm.get_torch_device()
    if weight_dtype == "default" and not mm.is_device_cpu(device) and mm.should_use_bf16(device):
        weight_dtype = "bf16"
    return dict(WEIGHT_DTYPES[weight_dtype])


def plain_model(loaded: checkpoints.Loaded, name: str, weight_dtype: str = "default"):
    """The MODEL that ComfyUI's own loader makes of these weights, before `prepared`. name: for the message."""
    model = comfy.sd.load_diffusion_model_state_dict(dict(loaded.state_dict), model_options=_load_options(weight_dtype))
    if model is None:
        raise ForcingError(f"ComfyUI does not recognise {name} as a Wan 2.1 model. Use the original file.")
    return model


def _read_lora(name: str, state_dict) -> dict[str, torch.Tensor]:
    """A LoRA in ComfyUI's names, after checking that it belongs to this model."""
    factors = checkpoints.load_lora(folder_paths.get_full_path_or_raise("loras", name))
    checkpoints.check_fit(factors, state_dict)
    return checkpoints.to_comfy(factors)


class ForcingLoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingLoadCheckpoint",
            display_name="Forcing Load Checkpoint",
            category=CATEGORY,
            description="Loads an official Self Forcing, CausVid, Causal Forcing (++) or LongLive file (.pt or "
                        ".safetensors) as a MODEL, takes the weights its authors use, and sets the system's flow shift.",
            search_aliases=["self forcing", "causvid", "causal forcing", "longlive", "autoregressive"],
            inputs=[
                io.Combo.Input("checkpoint", options=folder_paths.get_filename_list("diffusion_models"),
                               tooltip="File in models/diffusion_models: an official .pt container, plain safetensors, or "
                                       "a repackaged one."),
                io.Combo.Input("system", options=[AUTO, *SYSTEMS], default=AUTO,
                               tooltip="auto recognises official file names and files converted by this pack. Choose the "
                                       "system yourself for renamed files."),
                io.Combo.Input("weights", options=[AUTO, "generator_ema", "generator", "model", "flat"], default=AUTO,
                               advanced=True,
                               tooltip="Which weights of a container to take. auto takes what the system's authors use by "
                                       "default (EMA or not)."),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default",
                               tooltip="default is bf16, as the models were trained, where the card has it. fp8_e4m3fn halves "
                                       "the memory of the weights for 8-12 GB cards; the KV store stays in the compute type."),
                io.Combo.Input("lora", options=[NONE, *folder_paths.get_filename_list("loras")], default=NONE,
                               tooltip="LoRA that belongs to the checkpoint (LongLive's lora.pt), in its original PEFT "
                                       "form. Style LoRAs go through ComfyUI's own LoRA loader."),
                io.Float.Input("lora_strength", default=1.0, min=-10.0, max=10.0, step=0.05, advanced=True,
                               tooltip="1.0 is what LongLive was published with."),
                io.Combo.Input("vace", options=[NONE, *folder_paths.get_filename_list("diffusion_models")], default=NONE,
                               optional=True, advanced=True,
                               tooltip="A Wan 2.1 VACE model of the same size: its control blocks are joined to the "
                                       "checkpoint, so that the references, poses, depths and masks of WanVaceToVideo act."),
            ],
            outputs=[io.Model.Output(tooltip="Connect to Forcing Guider, or through LoRA loaders first.")],
        )

    @classmethod
    def execute(cls, checkpoint, system, weights, weight_dtype, lora, lora_strength, vace=NONE) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", checkpoint)
        loaded = checkpoints.load(path, preset=None if system == AUTO else system,
                                  key=None if weights == AUTO else weights)
        for sentence in loaded.report:
            log.info("%s", sentence)
        factors = None if lora == NONE else _read_lora(lora, loaded.state_dict)
        if vace != NONE:
            control = checkpoints.vace_weights(folder_paths.get_full_path_or_raise("diffusion_models", vace), loaded.config)
            loaded = replace(loaded, state_dict={**loaded.state_dict, **control})
        model = plain_model(loaded, checkpoint, weight_dtype)
        if factors is not None:
            model = comfy.sd.load_lora_for_models(model, None, factors, lora_strength, 0.0)[0]
        return io.NodeOutput(prepared(model, _shift(loaded.preset_name)))


def _shift(preset_name: str | None) -> float:
    return get(preset_name).shift if preset_name else 5.0
