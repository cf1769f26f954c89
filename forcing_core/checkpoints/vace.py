"""The control blocks of a VACE file, to be joined with the weights of a causal checkpoint of the same width.

Source: arXiv 2503.07598 (VACE). Its blocks were trained beside the bidirectional model; beside a distilled causal one of
the same base they work without training, as public projects show (daydreamlive/scope).
"""
from __future__ import annotations

from torch import Tensor

from ..errors import ForcingError
from .config import ModelConfig, is_quantised
from .containers import open_model
from .keys import strip_all

NAMES = ("vace_blocks.", "vace_patch_embedding.")


def vace_weights(path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of the control blocks, under plain Wan names. config: of the causal checkpoint.

    Raises ForcingError for files without such blocks, quantised ones, and blocks that do not fit the checkpoint.
    """
    state = strip_all(open_model(path).tensors)
    found = {name: tensor for name, tensor in state.items() if name.startswith(NAMES)}
    if not found or "vace_patch_embedding.weight" not in found:
        raise ForcingError(f"{path} has no VACE blocks. Choose a Wan 2.1 VACE model, for example wan2.1_vace_1.3B_fp16.")
    if is_quantised(found):
        raise ForcingError(f"{path} is quantised with scales beside its weights. Choose the file in fp16 or bf16.")
    width, layers = found["vace_patch_embedding.weight"].shape[0], _layers(found)
    if width != config.dim or config.num_layers % layers:
        raise ForcingError(f"The VACE blocks ({layers}, {width} wide) do not fit a checkpoint of {config.num_layers} layers, "
                           f"{config.dim} wide. Choose the VACE model of the same size ({config.size}).")
    return found


def _layers(found: dict[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in found if name.startswith("vace_blocks.")})
