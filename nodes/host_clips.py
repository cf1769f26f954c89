"""How clips run over ComfyUI's own samplers: conditioning cut for each clip, and the end of the last one handed over.

A clip is sampled by the SAMPLER that the graph has, from the guider that the graph has; between the two stands a guider
that puts the handed over frames in their places before every forward. What a network has for frames that are given is used
(`HANDS`): the channels of I2V models and Wan Animate, the timesteps of Wan 2.2 5B, the motion frames of InfiniteTalk and of
Wan S2V. What ComfyUI encoded for the whole video is cut as its own nodes would have made it for the clip (`KINDS`).

Axis legend of latents: [B, C, F, H, W], in the network's scale. The frames of a reference come before those of the video.
"""
from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Iterator, Mapping

import comfy.conds
import comfy.model_base
import comfy.model_management as mm
import comfy.sampler_helpers
import torch
from comfy.ldm.wan.model import WanModel, WanModel_S2V
from comfy.ldm.wan.model_animate import AnimateWanModel
from comfy.ldm.wan.model_multitalk import MultiTalkApplyModelWrapper
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..forcing_core.conditioning import Held, with_given
from ..forcing_core.errors import ForcingError
from ..forcing_core.rollout.clips import Clip, Clips, Cuts, Lane
from .host_audio import AUDIO, MOTION
from .host_conditioning import MASK, SOURCES
from .host_memory import tracks_of

CUT = {"c_concat": Lane(2), "denoise_mask": Lane(2)}
# values of a condition that are the same for every clip
CONSTANT = {"c_crossattn", "clip_fea", "reference_latent", "reference_motion", "time_dim_concat"}
MOTION_LATENTS = 19  # that Wan S2V is shown of what came before
REPLACE = "replacement"


@dataclass(frozen=True)
class Kind:
    """A class of networks. lanes: its per-frame conditioning. lead: latent frames of a reference before the video's."""

    lanes: Mapping[str, Lane] = field(default_factory=lambda: CUT)
    lead: int = 0


KINDS: dict[type, Kind] = {
    WanModel: Kind(),
    AnimateWanModel: Kind({**CUT, "c_concat": Lane(2, lead=1), "denoise_mask": Lane(2, lead=1),
                           "pose_latents": Lane(2, ends=True),
                           "face_pixel_values": Lane(2, rate=4, single=True, fill="short", ends=True)}, lead=1),
    WanModel_S2V: Kind({**CUT, "audio_embed": Lane(3, rate=4, fill="zeros", ends=True),
                        "control_video": Lane(2, fill="zeros")}),
}


def network(base_model):
    """The network itself, where it is compiled."""
    return getattr(base_model.diffusion_model, "_orig_mod", base_model.diffusion_model)


def kind_of(base_model) -> Kind:
    """Raises ForcingError for networks whose conditioning nobody knows how to cut."""
    net = network(base_model)
    if type(net) not in KINDS:
        raise ForcingError(f"This model is a {type(net).__name__}, which is not made in clips. Load Wan Animate, Wan S2V, Wan "
                           "2.1 I2V (with InfiniteTalk or without) or another plain Wan model.")
    return KINDS[type(net)]


# -- handing over ----------------------------------------------------------------------------------------------

@dataclass
class Handing:
    """What a clip is called with; a hand changes it. x: a guider's input, before it sees it, as x(x, sigma) -> x."""

    clip: Clip
    handed: Tensor
    noise: Tensor
    latents: Tensor
    mask: Tensor | None
    model: Any
    lead: int = 0
    values: list[dict[str, Any]] = field(default_factory=list)  # model_conds of every condition
    options: dict = field(default_factory=dict)  # transformer_options
    x: Callable[[Tensor, Tensor], Tensor] | None = None

    def at(self, whole: Tensor) -> Tensor:
        """The places of the handed over frames in a tensor of the clip, as a view."""
        return whole[:, :, self.lead:self.lead + self.clip.given]


def _replaced(how: Handing) -> None:
    """x has what noise of this level makes of the handed over frames, as in ComfyUI's own inpainting."""
    noise, sampling = how.at(how.noise), how.model.model_sampling

    def pin(x: Tensor, sigma: Tensor) -> Tensor:
        out = x.clone()
        how.at(out).copy_(sampling.noise_scaling(sigma.reshape(-1, 1, 1, 1, 1), noise, how.handed))
        return out
    how.x = pin


def _channels(how: Handing) -> None:
    """The channels of given frames say which they are."""
    channels = how.handed.shape[1]
    for values in how.values:
        concat = values.get("c_concat")
        if concat is not None and concat.cond.shape[1] == channels + MASK:
            values["c_concat"] = concat._copy_with(with_given(concat.cond, how.handed, how.lead, channels))
    _replaced(how)


def _timestep(how: Handing) -> None:
    """The mask of what is to be denoised, from which the model takes a timestep for every frame."""
    how.mask = torch.ones_like(how.noise) if how.mask is None else how.mask.clone()
    how.latents = how.latents.clone()
    how.at(how.mask).zero_()
    how.at(how.latents).copy_(how.handed)
    for values in how.values:
        values["denoise_mask"] = comfy.conds.CONDRegular(how.mask)


def _motion_frames(how: Handing) -> None:
    """ComfyUI's own wrapper puts InfiniteTalk's motion frames into the network's input."""
    how.options["wrappers"][WrappersMP.APPLY_MODEL][MOTION] = [MultiTalkApplyModelWrapper(how.handed)]


def _shown(how: Handing) -> None:
    """Wan S2V's motion latents, beside the clip."""
    for values in how.values:
        values["reference_motion"] = comfy.conds.CONDRegular(how.handed)


HANDS: dict[str, Callable[[Handing], None]] = {
    "motion latents": _shown, "motion frames": _motion_frames, "timesteps": _timestep, "channels": _channels,
    REPLACE: _replaced}


def own_hand(guider, options: dict) -> str:
    """Key of HANDS: what the model has for frames that are given. Raises ForcingError where it has nothing."""
    model = guider.inner_model
    conds = [cond["model_conds"].get("c_concat") for side in guider.conds.values() for cond in side or ()]
    channels = model.latent_format.latent_channels
    if isinstance(network(model), WanModel_S2V):
        return "motion latents"
    if MOTION in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
        return "motion frames"
    if isinstance(model, comfy.model_base.WAN22):
        return "timesteps"
    if conds and all(c is not None and c.cond.shape[1] == channels + MASK for c in conds):
        return "channels"
    raise ForcingError("This model has no place for frames that are given: no I2V channels, no timestep a frame, no motion "
                       f"frames. Set hand_over to '{REPLACE}', which puts them into the noisy latents at every step, or load "
                       "an I2V model, Wan Animate, InfiniteTalk or Wan S2V.")


# -- one run -----------------------------------------------------------------------------------------------------

class Pinned:
    """A guider for a solver: `pin` changes its input, all else is the guider's."""

    def __init__(self, guider, pin: Callable[[Tensor, Tensor], Tensor]):
        self._guider, self._pin = guider, pin

    def __call__(self, x: Tensor, sigma: Tensor, *args, **kwargs) -> Tensor:
        return self._guider(self._pin(x, sigma), sigma, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._guider, name)


class ClipConds:
    """Conditions of a guider and the audio of a MODEL, cut for one clip after the other; `restore` puts them back."""

    def __init__(self, guider, kind: Kind, options: dict):
        self.guider, self.whole = guider, guider.conds
        self.prompt: Tensor | None = None  # in place of the positive one
        self._tracks = tracks_of(guider)
        talking = AUDIO in options
        lanes = {**kind.lanes, "c_concat": replace(kind.lanes["c_concat"], still=talking)}  # its start image goes with all
        self._cuts = {side: [_cuts_of(cond, lanes) for cond in conds or ()] for side, conds in self.whole.items()}
        self._audio = Cuts(Held(options[AUDIO], 1), Lane(1)) if talking else None

    def lay(self, clip: Clip, options: dict) -> list[dict[str, Any]]:
        """Give the guider the conditions of a clip, with the prompt of a track that rules where its new frames begin, and its
        transformer_options the audio. Returns all their values, which may be changed."""
        self.guider.conds = {side: [{**cond, "model_conds": _values(cond, cuts, clip)}
                                    for cond, cuts in zip(conds or (), self._cuts[side])]
                             for side, conds in self.whole.items()}
        for cond in (cond for side in self.guider.conds.values() for cond in side if cond["uuid"] in self._tracks):
            ruling = [s for s in self._tracks[cond["uuid"]].segments if s.frame <= clip.first + clip.final.start]
            cond["model_conds"]["c_crossattn"] = comfy.conds.CONDRegular(ruling[-1].prompt)
        if self._audio is not None:
            options[AUDIO] = self._audio.of(clip)
        if self.prompt is not None:
            for cond in self.guider.conds["positive"]:
                cond["model_conds"]["c_crossattn"] = comfy.conds.CONDRegular(self.prompt)
        return [cond["model_conds"] for side in self.guider.conds.values() for cond in side]

    def push_prompt(self, prompt: Tensor) -> None:
        """[1, n, text_dim] for the positive conditions of the clips from now on."""
        self.prompt = prompt

    def restore(self) -> None:
        self.guider.conds = self.whole


def _cuts_of(cond: dict, lanes: Mapping[str, Lane]) -> dict[str, Cuts]:
    """Raises ForcingError for values and sources that nobody knows how to cut."""
    values, sources = cond["model_conds"], cond.get(SOURCES, {})
    unknown = sorted(({*values} - CONSTANT | {*sources}) - {*lanes})
    if unknown:
        raise ForcingError(f"The conditioning carries {', '.join(unknown)}, of which nobody knows what belongs to which clip. "
                           f"This model takes {', '.join(lanes)}. Connect the conditioning node of this model.")
    return {name: Cuts(sources.get(name) or Held(values[name].cond, lane.dim), lane)
            for name, lane in lanes.items() if name in values or name in sources}


def _values(cond: dict, cuts: Mapping[str, Cuts], clip: Clip) -> dict[str, Any]:
    """model_conds of a clip; a value of which nothing is left is not among them, as ComfyUI's nodes do it."""
    values = dict(cond["model_conds"])
    for name, cut in cuts.items():
        part, whole = cut.of(clip), values.pop(name, None)
        if part is not None:
            values[name] = comfy.conds.CONDRegular(part) if whole is None else whole._copy_with(part)
    return values


def own_options(model_options: dict, later: bool) -> dict:
    """A copy of a run's options whose transformer_options and wrappers a clip may change. InfiniteTalk's motion frames are
    those of the first clip: for later ones they are gone."""
    inner = dict(model_options.get("transformer_options", {}))
    inner["wrappers"] = {kind: dict(by_key) for kind, by_key in inner.get("wrappers", {}).items()}
    if later:
        inner["wrappers"].get(WrappersMP.APPLY_MODEL, {}).pop(MOTION, None)
    return {**model_options, "transformer_options": inner}


def refuse(model_options: dict) -> None:
    """Raise ForcingError, by name, for helpers that remember one clip in the next."""
    if model_options.get("context_handler") is not None:
        raise ForcingError("Context windows cut the video in another way than clips do. Remove the Context Windows node.")
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    found = {key for by_key in wrappers.values() for key in by_key}
    for key, name in {"easycache": "EasyCache", "lazycache": "LazyCache"}.items():
        if key in found:
            raise ForcingError(f"{name} would take what it remembers of one clip into the next. Remove the {name} node.")


def fit_weights(guider, shape: tuple[int, ...]) -> None:
    """Place the weights again for latents of this shape: ComfyUI did it for those of the whole video."""
    patcher = guider.model_patcher
    if mm.is_device_cpu(patcher.load_device):
        return
    needed, least = comfy.sampler_helpers.estimate_memory(patcher, shape, guider.conds)
    mm.load_models_gpu([patcher, *guider.loaded_models], memory_required=needed, minimum_memory_required=least)


@contextmanager
def running_ahead(model, kind: Kind, ahead: int) -> Iterator[None]:
    """The reference stands `ahead` latent frames behind the last one of a clip, where the model would have it before the
    first; 0: where the model has it. Raises ForcingError for models whose reference has no place of its own."""
    if not ahead:
        yield
        return
    net = network(model)
    if isinstance(net, WanModel_S2V):
        raise ForcingError("Wan S2V keeps its reference ahead of the clip by itself. Set ahead to 0.")
    if not kind.lead:
        raise ForcingError("The reference of this model is in the channels of a frame, so it cannot stand ahead in time. Set "
                           "ahead to 0; Wan Animate has one that can.")
    stock = net.rope_encode

    def encode(frames: int, height: int, width: int, *args, **kwargs) -> Tensor:
        rope = stock(frames, height, width, *args, **kwargs)
        reference = stock(kind.lead, height, width, *args, t_start=frames - 1 + ahead, **kwargs)
        return torch.cat([reference, rope[:, reference.shape[1]:]], dim=1)
    net.rope_encode = encode
    try:
        yield
    finally:
        del net.rope_encode


def clips_on(model, clips: Clips, hand: str | None) -> Clips:
    """The clips as they are made on a model, by a key of HANDS or, None, by what it has. Raises ForcingError for a knot where
    no frames are shared."""
    if not isinstance(network(model), WanModel_S2V) or hand == REPLACE:
        return clips
    if clips.knot:
        raise ForcingError("Wan S2V is shown what came before beside the clip, so there are no shared frames for a knot. Set "
                           f"the knot to 0, or hand_over to '{REPLACE}'.")
    return replace(clips, overlap=0, history=MOTION_LATENTS)
