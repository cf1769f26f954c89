"""The V3 nodes. One file a topic; each node looks things up, builds options and calls forcing_core."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .cache import ForcingCache, ForcingPlanView
from .guiding import ForcingGuider
from .latents import ForcingEmptyLatent, ForcingExtend, ForcingStartImage
from .loading import ForcingLoadCheckpoint
from .micro import ForcingMicroModel
from .sampling import ForcingPreset, ForcingSampler, ForcingSigmas
from .snapshot import ForcingResume, ForcingSnapshot
from .stream import ForcingStream
from .track import ForcingPromptSegment, ForcingPromptTrack

NODES: list[type[io.ComfyNode]] = [
    ForcingLoadCheckpoint,
    ForcingMicroModel,
    ForcingPreset,
    ForcingSampler,
    ForcingSigmas,
    ForcingCache,
    ForcingGuider,
    ForcingPromptTrack,
    ForcingPromptSegment,
    ForcingEmptyLatent,
    ForcingStartImage,
    ForcingExtend,
    ForcingStream,
    ForcingSnapshot,
    ForcingResume,
    ForcingPlanView,
]


class ForcingExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ForcingExtension:
    return ForcingExtension()
