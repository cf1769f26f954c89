"""Cross-attention of image-to-video networks: to the prompt, and beside it to an image that was encoded by CLIP.

Source: arXiv 2503.20314 (Wan). Axis legend: see `forward`.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .text import TextState


class ImageText(TextState):
    """A prompt with an image. features: [B, rows, channels] of CLIP's last layer but one, in the compute dtype; None where
    there is no image, which leaves the prompt in its place, as ComfyUI has it."""

    def __init__(self, context: Tensor, features: Tensor | None):
        super().__init__(context)
        self._features, self._rows = features, None
        self._image: dict[int, tuple[Tensor, Tensor]] = {}

    def image(self, net: Any) -> Tensor:
        """[B, rows, D]"""
        if self._rows is None:
            self._rows = self.embedded(net.text_embedding) if self._features is None else net.img_emb(self._features)
        return self._rows

    def image_keys_values(self, layer: int, attention: nn.Module, net: Any) -> tuple[Tensor, Tensor]:
        if layer not in self._image:
            rows = self.image(net)
            self._image[layer] = attention.norm_k_img(attention.k_img(rows)), attention.v_img(rows)
        return self._image[layer]


def image_cross_attention(layer: int, block: nn.Module, x: Tensor, text: ImageText, ops: Any, net: Any) -> Tensor:
    """Stands for `Ops.cross_attention` in a network with image keys."""
    attention = block.cross_attn
    q = attention.norm_q(attention.q(x))
    both = text.keys_values(layer, attention, net.text_embedding), text.image_keys_values(layer, attention, net)
    prompt, image = (_attend(ops, q, k, v, net.num_heads) for k, v in both)
    return attention.o(prompt + image)


def _attend(ops: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return ops.attention(*(t.unflatten(2, (heads, -1)) for t in (q, k, v))).flatten(2)
