"""ComfyUI-Forcing: causal, KV-cached autoregressive video for ComfyUI."""
from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
