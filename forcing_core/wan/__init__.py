"""Wan 2.1: our compact module tree and the causal forward that runs over it or over ComfyUI's."""
from .camera import Camera
from .forward import Ops, forward
from .image import ImageText, image_cross_attention
from .model import WanConfig, WanModel
from .s2v import S2V, Pictures, Stand, Voice, picture_tokens, seeing, show
from .text import TextState, blended
from .vace import Vace, vace_layers

__all__ = ["Camera", "ImageText", "Ops", "Pictures", "S2V", "Stand", "TextState", "Vace", "Voice", "WanConfig", "WanModel",
           "blended", "forward", "image_cross_attention", "picture_tokens", "seeing", "show", "vace_layers"]
