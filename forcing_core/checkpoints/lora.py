"""LoRAs: read PEFT and ComfyUI names, write ComfyUI names, merge exactly.

Axes: A (down) is [rank, columns], B (up) is [rows, rank]; W[rows, columns] += scale * B @ A.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ForcingError
from .containers import open_lora
from .keys import SHOWN, strip

log = logging.getLogger(__name__)

# <module>.lora_A.weight, <module>.lora_A.default.weight (PEFT with its adapter's name), lora_down / lora_up.
PART = re.compile(r"(?P<module>.+?)\.lora_(?P<side>A|B|down|up)(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?")
SIDES = {"A": "down", "down": "down", "B": "up", "up": "up"}
ALPHA = ".alpha"

WIDTH_14B = 5120
# LoRAs known by these names make bidirectional models faster; they do not make a model autoregressive.
SPEED_UPS = ("lightx2v", "stepdistill", "step_distill", "cfgdistill", "cfg_distill", "causvid",
             "cfg_step_distill", "self_forcing", "self-forcing", "selfforcing", "accvid", "fusionx", "lightning")
INSTEAD = "Use a checkpoint of this family instead: Self Forcing, Causal Forcing, or LongLive with its own LoRA."


@dataclass(frozen=True)
class Pair:
    """The two factors for one linear layer, and the factor in front of their product."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]


@dataclass(frozen=True)
class Lora:
    """Factors by the stripped name of the layer they change (blocks.0.self_attn.q); `name` is the file's."""

    name: str
    pairs: Mapping[str, Pair]

    @property
    def rank(self) -> int:
        return max(pair.rank for pair in self.pairs.values())

    @property
    def width(self) -> int:
        """Width of the model it was made for: the most common side of its factors."""
        sides = [side for pair in self.pairs.values() for side in pair.shape]
        return max(set(sides), key=sides.count)

    @property
    def is_speed_up(self) -> bool:
        """True where the file's name is that of a LoRA that makes a bidirectional model faster."""
        return any(word in self.name.lower() for word in SPEED_UPS)


def load_lora(path, key: str | None = None, alpha: float | None = None) -> Lora:
    """Read a LoRA file. alpha: numerator of scale = alpha / rank, where the file does not hold one itself.

    Without any alpha the scale is 1, which is right for LongLive (alpha 256, rank 256).
    """
    container = open_lora(path, key=key)
    return parse_lora(container.tensors, alpha=alpha, name=container.path.name)


def parse_lora(tensors: Mapping[str, Tensor], alpha: float | None = None, name: str = "The LoRA") -> Lora:
    """A Lora from named tensors; raises ForcingError for names that are not understood or not complete."""
    sides: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    adapters, unknown = set(), []
    for key, tensor in tensors.items():
        part = PART.fullmatch(key)
        if part:
            sides.setdefault(strip(part["module"]), {})[SIDES[part["side"]]] = tensor
            adapters.add(part["adapter"])
        elif key.endswith(ALPHA):
            alphas[strip(key.removesuffix(ALPHA))] = float(tensor)
        else:
            unknown.append(key)
    _check_names(name, sides, adapters, unknown)
    return Lora(name, {module: _pair(name, module, both, alphas.get(module, alpha)) for module, both in sides.items()})


def _check_names(name, sides, adapters, unknown) -> None:
    if not sides:
        raise ForcingError(f"{name} holds no LoRA factors (found {', '.join(unknown[:SHOWN]) or 'nothing'}). "
                           "Use a LoRA with lora_A / lora_B or lora_down / lora_up weights.")
    if len(adapters) > 1:
        raise ForcingError(f"{name} holds several adapters ({', '.join(map(str, sorted(adapters, key=str)))}). "
                           "Save them to one file each.")
    if unknown:
        # Leaving them out would silently change what the LoRA does.
        raise ForcingError(f"{name} holds {len(unknown)} weights that are not low-rank factors "
                           f"({', '.join(unknown[:SHOWN])}), which cannot be merged here. "
                           "Load it with ComfyUI's own LoRA loader.")


def _pair(name: str, module: str, both: Mapping[str, Tensor], alpha: float | None) -> Pair:
    if set(both) != {"up", "down"}:
        raise ForcingError(f"{name} has only one of the two factors for {module}. Download it again.")
    up, down = both["up"], both["down"]
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ForcingError(f"{name} has factors of shapes {tuple(up.shape)} and {tuple(down.shape)} for {module}, "
                           "which do not multiply. Download it again.")
    return Pair(down, up, 1.0 if alpha is None else alpha / down.shape[0])


def check_fit(lora: Lora, state: Mapping[str, Tensor]) -> None:
    """Raise ForcingError unless every factor of `lora` has a layer of the right shape in `state`."""
    width = state["head.modulation"].shape[-1]
    if lora.width == WIDTH_14B != width:
        raise ForcingError(f"{lora.name} is made for a 14B model (width {WIDTH_14B}), this model has width {width}; "
                           "the 14B LoRAs called self-forcing, lightx2v or CausVid are speed-ups of the bidirectional "
                           f"14B model and do not make a model autoregressive. {INSTEAD}")
    wrong = [module for module, pair in lora.pairs.items()
             if f"{module}.weight" not in state or tuple(state[f"{module}.weight"].shape) != pair.shape]
    if wrong:
        raise ForcingError(f"{lora.name} does not fit this model: {len(wrong)} of its {len(lora.pairs)} layers are not "
                           f"in the model or have another shape ({', '.join(wrong[:SHOWN])}). "
                           "Use the LoRA that was published with this checkpoint.")


def to_comfy(lora: Lora) -> dict[str, Tensor]:
    """The LoRA under the names of ComfyUI's LoraLoaderModelOnly, with alpha = scale * rank beside each pair."""
    out = {}
    for module, pair in lora.pairs.items():
        name = f"diffusion_model.{module}"
        out[f"{name}.lora_A.weight"] = pair.down
        out[f"{name}.lora_B.weight"] = pair.up
        out[f"{name}{ALPHA}"] = torch.tensor(pair.scale * pair.rank)
    return out


class Merged(Mapping):
    """A state dict with a LoRA merged in, each weight computed when it is asked for.

    So converting never holds more than one merged weight; dict(...) gives them all.
    """

    def __init__(self, state: Mapping[str, Tensor], lora: Lora, strength: float = 1.0):
        check_fit(lora, state)
        if any(state[f"{module}.weight"].element_size() < 2 for module in lora.pairs):
            raise ForcingError(f"{lora.name} cannot be merged into 8-bit weights without loss. Use the original file.")
        self.base, self._strength = state, strength  # base: the same names, shapes and dtypes, nothing computed
        self._pairs = {f"{module}.weight": pair for module, pair in lora.pairs.items()}

    def __getitem__(self, name: str) -> Tensor:
        weight, pair = self.base[name], self._pairs.get(name)
        if pair is None:
            return weight
        # float32 throughout, rounded once at the end: factors are often stored in bfloat16.
        change = (pair.scale * self._strength) * (pair.up.float() @ pair.down.float())
        return (weight.float() + change).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def merge(state: Mapping[str, Tensor], lora: Lora, strength: float = 1.0) -> dict[str, Tensor]:
    """`state` (stripped names) with W + strength * scale * B @ A, computed in float32, in W's dtype.

    Raises ForcingError where a part of the LoRA has no place in the model.
    """
    return dict(Merged(state, lora, strength))
