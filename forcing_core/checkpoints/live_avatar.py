"""The LoRA that makes Wan 2.2 S2V autoregressive in four steps, read as its authors publish it.

PEFT put factors beside every module called q, k, v, o, ffn.0 or ffn.2: those of the blocks, and the attention to the voice. Its
alpha stands in a configuration of the repository, not in the file.

Source: arXiv 2512.04677 (Live Avatar), public repo Alibaba-Quark/LiveAvatar (rank 128, alpha 64).
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..errors import ForcingError
from .lora import Lora, check_fit, load_lora

ALPHA = 64.0
PARTS = (".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")
PLACES = ("blocks.", "audio_injector.injector.")


def targets(names: Iterable[str]) -> frozenset[str]:
    """Of the weights of an S2V network, the modules that have factors in the LoRA."""
    modules = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    return frozenset(m for m in modules if m.startswith(PLACES) and m.endswith(PARTS))


def live_avatar_lora(path, state: Mapping[str, Tensor]) -> Lora:
    """The LoRA of a file for the network of these weights (only their names and shapes are looked at).

    Raises ForcingError where the network is no S2V one, and where a factor is missing, left over or of another size.
    """
    if not any(name.startswith(PLACES[1]) for name in state):
        raise ForcingError("Live Avatar is a LoRA for Wan 2.2 S2V 14B, and this model is another one. Load "
                           "wan2.2_s2v_14B_fp8_scaled or wan2.2_s2v_14B_bf16.")
    lora = load_lora(path, alpha=ALPHA)
    check_fit(lora, state)
    missing = sorted(targets(state) - {*lora.pairs})
    if missing:
        raise ForcingError(f"{lora.name} has nothing for {len(missing)} of {len(targets(state))} layers "
                           f"({', '.join(missing[:3])}), so it is not the LoRA of Live Avatar. Use liveavatar.safetensors of "
                           "Quark-Vision/Live-Avatar.")
    return lora
