"""A start picture for the micro LIVE: one shape in the middle of its world."""
from __future__ import annotations

import torch
from comfy_api.latest import io

from ..forcing_core.micro import steer
from ..forcing_core.micro.names import BACKGROUNDS, COLOURS, SHAPES
from .common import CATEGORY


class ForcingMicroWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingMicroWorld",
            display_name="Forcing Micro World",
            category=CATEGORY,
            description="Draws a start picture for the micro LIVE: one shape on a plain background, 64x64 pixels.",
            search_aliases=["start image", "game", "shape"],
            inputs=[
                io.Combo.Input("shape", options=list(steer.MOVED), default="square", tooltip="What the keys move."),
                io.Combo.Input("colour", options=list(COLOURS), default="red", tooltip="Of the shape."),
                io.Combo.Input("background", options=list(steer.GROUNDS), default="light", tooltip="Of all the rest."),
            ],
            outputs=[io.Image.Output(tooltip="Connect to image of Forcing LIVE Stream or Forcing LIVE Sampler.")],
        )

    @classmethod
    def execute(cls, shape, colour, background) -> io.NodeOutput:
        indices = (list(table).index(name) for table, name in ((SHAPES, shape), (COLOURS, colour), (BACKGROUNDS, background)))
        middle = torch.zeros(1, 2, dtype=torch.long)
        world = steer.Worlds(*(torch.tensor([index]) for index in indices), middle)
        picture = steer.paint(world, middle[:, None])
        return io.NodeOutput(((picture[0] + 1) / 2).permute(1, 2, 3, 0))
