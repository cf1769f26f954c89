"""What a camera-controlled network has beside Wan's own blocks: an adapter that adds camera rays to the tokens.

Source: public repo aigc-apps/VideoX-Fun (Wan 2.1 Fun camera control); module names as in ComfyUI's network.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor

from .forward import Alone


class Camera(Alone):
    """rays: [B, channels, F, H, W] of the call's frames, in pixels, in the compute dtype."""

    def __init__(self, net: Any, rays: Tensor):
        super().__init__(net)
        self.net, self.rays = net, rays

    def begin(self, tokens: Tensor) -> Tensor:
        return tokens + self.net.control_adapter(self.rays).to(tokens.dtype).flatten(2).transpose(1, 2)
