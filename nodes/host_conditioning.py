"""ComfyUI's conditioning for a causal rollout: which networks are run with what, and per-frame values cut by forward.

ComfyUI encodes conditioning once for the whole video and hands all of it to every forward. Here each condition's per-frame
values are put behind a COND object of ours, which gives a forward the frames that it computes. So native conditioning
nodes work with rollouts of any length, and what comes from a source (`SOURCES`) is never held as a whole.
"""
from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import Callable

import comfy.conds
import comfy.utils
from comfy.ldm.wan.ar_model import CausalWanModel
from comfy.ldm.wan.model import CameraWanModel, VaceWanModel, WanModel, WanModel_S2V
from torch import Tensor

from ..forcing_core.conditioning import Held, Reader, Slices, with_given
from ..forcing_core.errors import ForcingError
from ..forcing_core.streaming.ear import Ear
from ..forcing_core.wan import Camera, ImageText, TextState, Vace, Voice, vace_layers
from . import host_s2v

log = logging.getLogger(__name__)
SOURCES = "forcing_sources"  # key of a condition: per-frame values by name, as `conditioning.Source`, in place of tensors
PER_FRAME = {"c_concat": 2, "vace_context": 3, "camera_conditions": 2,
             host_s2v.SOUND: 3, host_s2v.POSE: 2}  # name of a value -> axis of latent frames
# class of a network -> conditioning that it takes besides text and concatenated channels
NETWORKS = {WanModel: (), CausalWanModel: (), VaceWanModel: ("vace_context", "vace_strength"),
            CameraWanModel: ("camera_conditions",), WanModel_S2V: host_s2v.EXTRAS}
RUNS = ("plain Wan 2.1 (text to video, image to video, Fun control), VACE, Fun camera control, and Wan 2.2 S2V")
TAKES = ("text; channels of I2V and Fun models; CLIP images of I2V models; VACE, camera and sound conditioning with their "
         "models")


def network(base_model):
    """The network of a loaded model where causal rollouts run over it, or ForcingError saying what it is instead."""
    net = base_model.diffusion_model
    net = getattr(net, "_orig_mod", net)
    if type(net) not in NETWORKS:
        kind = type(net).__name__
        raise ForcingError(f"This model is a {kind}, which causal rollouts do not run over. They run over {RUNS}. "
                           "Load a causal 1.3B or 14B checkpoint of the Self Forcing family, or one of these.")
    return net


def is_plain(net) -> bool:
    """Whether the network has nothing beside its blocks, and attends to nothing but frames and a prompt."""
    return not NETWORKS[type(net)] and net.img_emb is None


def conds_of(guider) -> list[dict]:
    """The conditions of all sides of a guider."""
    return [cond for side in getattr(guider, "conds", {}).values() for cond in side or ()]


def store_layers(net, guider=None) -> int:
    """Layers of a store for a run under this guider: those of VACE's control blocks are among them.

    Raises ForcingError where conditions have different numbers of controls, or what the network cannot take.
    """
    for cond in conds_of(guider):
        _check_taken(net, cond)
    if not isinstance(net, VaceWanModel):
        return len(net.blocks)
    counts = {len(cond.get("vace_frames") or [None]) for cond in conds_of(guider)} or {1}
    if len(counts) > 1:
        raise ForcingError(f"The conditions have {' and '.join(map(str, sorted(counts)))} VACE controls. Send the positive and "
                           "the negative prompt through the same WanVaceToVideo nodes.")
    return vace_layers(net, counts.pop())


def _check_taken(net, cond: dict) -> None:
    """Raise ForcingError for a control that ComfyUI would pass over in silence, or that would end in an error of sizes."""
    host_s2v.check_taken(net, cond)
    if cond.get("vace_frames") and not isinstance(net, VaceWanModel):
        raise ForcingError("The conditioning comes from WanVaceToVideo, and this checkpoint has no VACE blocks, so it would do "
                           "nothing. Choose a Wan 2.1 VACE model of the same size as vace in Forcing Load Checkpoint.")
    if "c_concat" in cond.get(SOURCES, {}) and net.patch_embedding.weight.shape[1] == net.out_dim:
        raise ForcingError("The conditioning drives a portrait by further channels, which this checkpoint does not have. "
                           "Connect the MODEL of the node that the conditioning comes from.")


@dataclass(frozen=True)
class Led:
    """What every forward gets of a source that follows the prompt."""

    reader: Reader
    prompt: Callable[[], Tensor]

    def of(self, first: int, count: int) -> Tensor:
        return self.reader.of(first, count, self.prompt())


def listen(guider, fps: float) -> Ear | None:
    """The ear of a run for the sources that listen, or None where there are none."""
    conds = [cond for side in getattr(guider, "original_conds", {}).values() for cond in side]
    sources = [source for cond in conds for source in cond.get(SOURCES, {}).values() if getattr(source, "listens", False)]
    ear = Ear(fps) if sources else None
    for source in sources:
        source.ear = ear
    return ear


class FrameCond(comfy.conds.CONDRegular):
    """Per-frame conditioning of one condition: gives ComfyUI what `now` says is computed."""

    def __init__(self, slices: Slices | Led | Voice, now: Callable[[], tuple[int, int]], change: Callable[[Tensor], Tensor]):
        super().__init__(None)
        self.slices, self.now, self.change = slices, now, change

    def process_cond(self, batch_size, **kwargs):
        part = self.change(self.slices.of(*self.now()))
        return comfy.conds.CONDRegular(comfy.utils.repeat_to_batch_size(part, batch_size))


@dataclass
class FrameConds:
    """All per-frame conditioning of a run. now: (first, frames) of the forward. channels: of a latent. prompt: the embedding
    that rules over a condition now, for sources that follow it.

    pinned: (first frame, latents [B, C, k, H, W]) of frames that networks with channels for given frames are told.
    """

    now: Callable[[], tuple[int, int]]
    channels: int
    prompt: Callable[[dict], Tensor] | None = None
    pinned: tuple[int, Tensor] | None = field(default=None)

    def lay(self, guider, frames: int) -> None:
        """Put the per-frame values of a guider's conditions behind objects of ours. The lists live as long as the run."""
        for cond in conds_of(guider):
            values, sources = cond["model_conds"], cond.get(SOURCES, {})
            unknown = sorted({*sources} - {*PER_FRAME})
            if unknown:
                raise ForcingError(f"Streamed conditioning called {', '.join(unknown)} is not known. Use one of "
                                   f"{', '.join(PER_FRAME)}.")
            for name in PER_FRAME.keys() & {*values, *sources}:
                source = sources.get(name) or _held(name, values[name].cond)
                if source.frames < frames and name != host_s2v.SOUND:
                    log.warning("The conditioning %s has %d latent frames for a video of %d: its last frame goes on.", name,
                                source.frames, frames)
                change = self._with_pinned if name == "c_concat" else lambda part: part
                values[name] = FrameCond(self._parts(source, name, cond, frames), self.now, change)

    def _parts(self, source, name: str, cond: dict, frames: int) -> Slices | Led | Voice:
        if name == host_s2v.SOUND:
            return host_s2v.voice(source, frames)
        if hasattr(source, "begin"):
            return Led(source.begin(), functools.partial(self.prompt, cond))
        return Slices(source, PER_FRAME[name])

    def _with_pinned(self, part: Tensor) -> Tensor:
        """Channels of given frames with those that a knot or a reference gives; others have no mask to say it."""
        first, frames = self.now()
        if self.pinned is None or part.shape[1] != self.channels + MASK:
            return part
        at, latents = self.pinned[0] - first, self.pinned[1]
        inside = at < frames and at + latents.shape[2] > 0
        return with_given(part, latents, at, self.channels) if inside else part


MASK = 4  # channels of the mask of given frames


def _held(name: str, tensor: Tensor) -> Held:
    return host_s2v.by_frame(tensor) if name == host_s2v.SOUND else Held(tensor, PER_FRAME[name])


def check_extras(net, extra: dict) -> None:
    """Conditioning that the causal forward would silently ignore is refused by name."""
    used = (*NETWORKS[type(net)], *(("clip_fea",) if net.img_emb is not None else ()))
    unused = [name for name, value in extra.items() if value is not None and name not in used]
    if unused:
        raise ForcingError(f"The conditioning carries {', '.join(unused)}, which causal rollouts of this version do not use "
                           f"with this model. They take {TAKES}. Connect plain text conditioning, and give a start image "
                           "through Forcing Start Image.")


def text_of(net, context: Tensor, clip: Tensor | None) -> TextState:
    """The prompt of a condition, with its CLIP image where the network attends to one."""
    return TextState(context) if net.img_emb is None else ImageText(context, clip)


def beside(net, index: int, count: int, extra: dict):
    """What network `net` has beside its blocks, for condition `index` of `count` in a batch; None for plain ones."""
    def part(name: str) -> Tensor:
        return extra[name].chunk(count)[index]

    if isinstance(net, VaceWanModel):
        return Vace(net, part("vace_context"), extra["vace_strength"])
    if isinstance(net, WanModel_S2V):
        return host_s2v.Speaker(net, part, extra)
    return Camera(net, part("camera_conditions")) if extra.get("camera_conditions") is not None else None
