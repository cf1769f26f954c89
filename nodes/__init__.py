"""The V3 nodes. One file a topic; each node looks things up, builds options and calls forcing_core."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .cache import ForcingCache, ForcingPlanView
from .clips import ForcingClips
from .driving import ForcingDrivingVideo, ForcingPortraitReference
from .guiding import ForcingGuider
from .idle import ForcingIdlePortrait
from .knot import ForcingKnot
from .latents import ForcingEmptyLatent, ForcingExtend, ForcingStartImage
from .live import ForcingActionTrack, ForcingCameraPath, ForcingLiveCheckpoint, ForcingLiveSampler
from .live_avatar import ForcingLiveAvatar
from .live_stream import ForcingLiveStream
from .loading import ForcingLoadCheckpoint
from .micro import ForcingMicroModel
from .micro_world import ForcingMicroWorld
from .portrait import ForcingMicroPortrait
from .restyle import ForcingRestyle
from .routes import register
from .sampling import ForcingPreset, ForcingSampler, ForcingSigmas
from .snapshot import ForcingResume, ForcingSnapshot
from .sparse import ForcingSparse
from .stream import ForcingStream
from .track import ForcingPromptSegment, ForcingPromptTrack
from .video import ForcingStartVideo

NODES: list[type[io.ComfyNode]] = [
    ForcingLoadCheckpoint,
    ForcingMicroModel,
    ForcingMicroPortrait,
    ForcingIdlePortrait,
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
    ForcingStartVideo,
    ForcingPortraitReference,
    ForcingDrivingVideo,
    ForcingKnot,
    ForcingLiveAvatar,
    ForcingClips,
    ForcingRestyle,
    ForcingSparse,
    ForcingLiveCheckpoint,
    ForcingCameraPath,
    ForcingActionTrack,
    ForcingLiveSampler,
    ForcingLiveStream,
    ForcingMicroWorld,
    ForcingStream,
    ForcingSnapshot,
    ForcingResume,
    ForcingPlanView,
]


class ForcingExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


register()


async def comfy_entrypoint() -> ForcingExtension:
    return ForcingExtension()
