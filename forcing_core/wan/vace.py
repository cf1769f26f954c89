"""What a VACE network has beside Wan's own blocks, for the causal forward.

Every control context is a second stream of tokens that goes through blocks of its own, one behind every few of the
network's, and is added to it there. Those blocks attend to themselves, so they remember too: their keys and values are
further layers of the same store, numbered in the order in which a forward meets them.

Source: arXiv 2503.07598 (VACE); module names as in ComfyUI's network. Axis legend: see `forward`.
"""
from __future__ import annotations

from typing import Any, Sequence

from torch import Tensor


def vace_layers(net: Any, contexts: int) -> int:
    """Layers that a store needs for a VACE network with so many control contexts."""
    return len(net.blocks) + contexts * len(net.vace_layers_mapping)


class Vace:
    """The control streams of one forward.

    context: [B, contexts, channels, F, h, w] of the call's frames, in the compute dtype. strengths: one a context.
    """

    def __init__(self, net: Any, context: Tensor, strengths: Sequence[float]):
        self.net, self.context, self.strengths = net, context, strengths
        self.contexts = context.shape[1]
        self.layers = vace_layers(net, self.contexts)

    def begin(self, tokens: Tensor) -> Tensor:
        flat = self.context.transpose(0, 1).flatten(0, 1)
        streams = self.net.vace_patch_embedding(flat.float()).to(tokens.dtype).flatten(2).transpose(1, 2)
        self._streams, self._first = list(streams.chunk(self.contexts)), tokens
        return tokens

    def number(self, index: int) -> int:
        return index + self.contexts * sum(1 for block in self.net.vace_layers_mapping if block < index)

    def after(self, index: int, x: Tensor, run: Any) -> Tensor | None:
        at = self.net.vace_layers_mapping.get(index)
        if at is None:
            return x
        block = self.net.vace_blocks[at]
        for i, stream in enumerate(self._streams):
            if at == 0:
                stream = block.before_proj(stream) + self._first
            stream = run.layer(self.number(index) + 1 + i, block, stream)
            if stream is None:
                return None
            self._streams[i] = stream
            x = x + block.after_proj(stream) * self.strengths[i]
        return x
