"""What the causal forward asks of ComfyUI: its attention, its casts, and the patches that a user put on the model."""
from __future__ import annotations

import comfy.ldm.modules.attention as host_attention
import comfy.model_management as mm
import torch
from torch import Tensor

from ..forcing_core.attention import sage_mutates_keys
from ..forcing_core.wan import ImageText, Ops, image_cross_attention


def mutates_keys(transformer_options: dict) -> bool:
    """Whether the attention that will run may write to its keys: unknown overrides, and SageAttention 1.x."""
    if "optimized_attention_override" in transformer_options:
        return True
    return host_attention.optimized_attention.__name__ == "attention_sage" and sage_mutates_keys()


class _Attention:
    """ComfyUI's attention as `Ops` has it."""

    def __init__(self, transformer_options: dict):
        self._options, self._copy = transformer_options, mutates_keys(transformer_options)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.flat(q.flatten(2), k.flatten(2), v.flatten(2), q.shape[2]).unflatten(2, (q.shape[2], -1))

    def flat(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        """[B, n, D] projections -> [B, n, D]."""
        return host_attention.optimized_attention(q, k.clone() if self._copy else k, v, heads=heads,
                                                  transformer_options=self._options)


def _attention(transformer_options: dict):
    """ComfyUI's attention; without the way there, where it would do no more on a CPU than call torch's."""
    torchs = host_attention.optimized_attention is host_attention.attention_pytorch and mm.cpu_state == mm.CPUState.CPU
    plain = torchs and "optimized_attention_override" not in transformer_options
    return Ops().attention if plain else _Attention(transformer_options)


def _parameter(parameter: Tensor, like: Tensor) -> Tensor:
    return mm.cast_to(parameter, dtype=like.dtype, device=like.device)


def _around_block(transformer_options: dict):
    """Give patches that replace a whole block their place, as the stock forward does."""
    replaced = transformer_options.get("patches_replace", {}).get("dit", {})

    def around(index, run, x, extras):
        transformer_options["block_index"] = index
        if ("double_block", index) not in replaced:
            return run(x)
        args = {"img": x, "txt": extras["text"].context, "vec": extras["e"], "pe": None,
                "transformer_options": transformer_options}
        return replaced[("double_block", index)](args, {"original_block": lambda a: {"img": run(a["img"])}})["img"]
    return around


def _after(patches: list, transformer_options: dict):
    def apply(index, x, **extra):
        for patch in patches:
            x = patch({"x": x, **extra, "transformer_options": transformer_options})
        return x
    return apply


def _replaced(module) -> bool:
    """Whether a forward of somebody else is in place. ComfyUI leaves the module's own one behind on the instance
    when it takes an object patch back."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _cross_attention(transformer_options: dict):
    """Cached keys and values of the prompt, unless somebody replaced the module's forward (NAG and the like)."""
    prompt = Ops().cross_attention

    def cross(index, block, x, text, ops, net):
        image = isinstance(text, ImageText)
        if _replaced(block.cross_attn):
            context, rows = text.embedded(net.text_embedding), text.image(net) if image else None
            context = context if rows is None else torch.cat([rows, context], dim=1)
            return block.cross_attn(x, context, context_img_len=None if rows is None else rows.shape[1],
                                    transformer_options=transformer_options)
        return (image_cross_attention if image else prompt)(index, block, x, text, ops, net)
    return cross


def causal_ops(transformer_options: dict, sinusoid: torch.dtype, compile_with) -> Ops:
    """What the causal forward calls instead of torch: ComfyUI's attention, casts and patches."""
    patches = transformer_options.get("patches", {})
    return Ops(attention=_attention(transformer_options), parameter=_parameter,
               cross_attention=_cross_attention(transformer_options), around_block=_around_block(transformer_options),
               after_self_attention=_after(patches.get("attn1_patch", []), transformer_options),
               after_cross_attention=_after(patches.get("attn2_patch", []), transformer_options),
               sinusoid=sinusoid, compile=compile_with)
