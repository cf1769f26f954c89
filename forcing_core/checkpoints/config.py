"""What the shapes and names of the weights say about the model."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ForcingError

HEAD_DIM = 128  # every Wan 2.1 and 2.2 model, and what ComfyUI assumes
RANKS = {"head.modulation": 3, "patch_embedding.weight": 5}  # all other weights looked at are matrices
PATCH_AREA = 4  # output rows a channel: one patch is 1 x 2 x 2

# Model variants by a test on (names, input channels), most specific first.
VARIANTS = (
    ("vace", lambda names, channels: any(n.startswith(("vace_blocks.", "vace_patch_embedding.")) for n in names)),
    ("i2v", lambda names, channels: any(n.startswith("img_emb.") or ".k_img." in n for n in names)),
    ("wan2.2-5b", lambda names, channels: channels == 48),
    ("t2v", lambda names, channels: channels == 16),
)
OTHER = "other"

# Marks of weights that were quantised with scales beside them, by ComfyUI and others.
SCALES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Wan model, under the names of the official configuration files.

    variant: "t2v", "i2v", "vace", "wan2.2-5b" or "other". causal_ar: the metadata asks ComfyUI for its own
    autoregressive class.
    """

    dim: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    variant: str = "t2v"
    causal_ar: bool = False

    @property
    def size(self) -> str:
        """Name of the model size, or its width where it is none of the published ones."""
        return SIZES.get((self.dim, self.num_layers), f"width {self.dim}, {self.num_layers} layers")


SIZES = {(1536, 30): "1.3B", (3072, 30): "5B", (5120, 40): "14B"}


def infer(tensors: Mapping, metadata: Mapping[str, str] | None = None) -> ModelConfig:
    """Configuration of a state dict with stripped names (only shapes are looked at).

    Raises ForcingError where it is no Wan model or its width does not divide into heads of 128.
    """
    told = _told(metadata or {})
    dim = _shape(tensors, "head.modulation")[-1]
    in_dim = _shape(tensors, "patch_embedding.weight")[1]
    return ModelConfig(
        dim=dim,
        num_heads=_heads(dim, told),
        ffn_dim=_shape(tensors, "blocks.0.ffn.0.weight")[0],
        num_layers=_layers(tensors),
        in_dim=in_dim,
        out_dim=_shape(tensors, "head.head.weight")[0] // PATCH_AREA,
        text_dim=_shape(tensors, "text_embedding.0.weight")[1],
        freq_dim=_shape(tensors, "time_embedding.0.weight")[1],
        variant=next((name for name, test in VARIANTS if test(tensors, in_dim)), OTHER),
        causal_ar=bool(told.get("causal_ar", False)))


def is_quantised(tensors: Mapping) -> bool:
    """True where weights come with scales, so that their plain values mean nothing."""
    return any(name.endswith(SCALES) for name in tensors)


def _told(metadata: Mapping[str, str]) -> dict:
    """Settings from the metadata key `config`: ComfyUI nests them under "transformer", others do not."""
    try:
        settings = json.loads(metadata.get("config", "{}"))
    except ValueError:
        return {}
    if not isinstance(settings, dict):
        return {}
    inner = settings.get("transformer", settings)
    return inner if isinstance(inner, dict) else {}


def _heads(dim: int, told: Mapping) -> int:
    heads = told.get("num_heads", dim // HEAD_DIM)
    if not isinstance(heads, int) or heads < 1 or dim % heads or ("num_heads" not in told and dim % HEAD_DIM):
        raise ForcingError(f"A width of {dim} does not divide into attention heads of {HEAD_DIM}. "
                           "Wan models have a multiple of 128; use the original file.")
    return heads


def _layers(tensors: Mapping) -> int:
    layers = 0
    while f"blocks.{layers}.modulation" in tensors:
        layers += 1
    return layers


def _shape(tensors: Mapping, name: str) -> tuple[int, ...]:
    if name not in tensors or tensors[name].dim() != RANKS.get(name, 2):
        some = ", ".join(list(tensors)[:3])
        raise ForcingError(f"These are not the weights of a Wan model: {name} is missing or misshaped (found "
                           f"{some}). Use a Wan 2.1 text-to-video checkpoint in its original layout (not diffusers).")
    return tuple(tensors[name].shape)
