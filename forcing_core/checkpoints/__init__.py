"""Weights files of the family: what they are, their state dicts, their LoRAs, and conversion."""
from .config import ModelConfig, infer
from .containers import Container, open_lora, open_model
from .convert import convert, write_safetensors
from .identify import Identity, Loaded, identify, load
from .keys import Difference, difference, expected_shapes, strip, strip_all
from .lora import Lora, Merged, Pair, check_fit, load_lora, merge, parse_lora, to_comfy
from .vace import vace_weights

__all__ = [
    "Container", "Difference", "Identity", "Loaded", "Lora", "Merged", "ModelConfig", "Pair", "check_fit", "convert",
    "difference", "expected_shapes", "identify", "infer", "load", "load_lora", "merge", "open_lora",
    "open_model", "parse_lora", "strip", "strip_all", "to_comfy", "vace_weights", "write_safetensors",
]
