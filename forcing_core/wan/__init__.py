"""Wan 2.1: our compact module tree and the causal forward that runs over it or over ComfyUI's."""
from .forward import Ops, forward
from .model import WanConfig, WanModel
from .text import TextState, blended

__all__ = ["Ops", "TextState", "WanConfig", "WanModel", "blended", "forward"]
