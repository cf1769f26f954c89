"""What a rollout takes of the device: sizes of a run, the exact bytes of its stores, and telling ComfyUI before it loads."""
from __future__ import annotations

import math
from dataclasses import dataclass

import comfy.model_management as mm
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key, get_wrappers_with_key

from ..forcing_core.errors import ForcingError
from ..forcing_core.memory import memory_bytes
from ..forcing_core.options import RolloutOptions
from ..forcing_core.policies import build, replayed_frames
from ..forcing_core.policies.base import storage_of
from ..forcing_core.rollout import most_frames
from ..forcing_core.snapshot import fingerprint
from .host_conditioning import network, store_layers
from .host_s2v import view_bytes

KEY = "forcing"
TRACK = "forcing_track"  # key of a condition: the prompt track that its first prompt belongs to


@dataclass(frozen=True)
class Shape:
    """Sizes of one run: batch, latent frames, latent height and width, and those of the network."""

    batch: int
    frames: int
    height: int
    width: int
    layers: int
    dim: int
    heads: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.height // 2, self.width // 2

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


def shape_of(base_model, latent_shape, guider=None) -> Shape:
    """Sizes of a run on [B, C, F, H, W] latents, under a guider whose conditions may need layers of their own; raises
    ForcingError for latents the network cannot take."""
    net = network(base_model)
    if len(latent_shape) != 5:
        raise ForcingError(f"A video latent [batch, channels, frames, height, width] is needed, not {list(latent_shape)}. "
                           "Use Forcing Empty Latent.")
    batch, channels, frames, height, width = latent_shape
    if channels != net.out_dim:
        raise ForcingError(f"The latent has {channels} channels but this model works on {net.out_dim}. "
                           "Use Forcing Empty Latent, and a VAE of the same model family.")
    if height % 2 or width % 2:
        raise ForcingError(f"A latent of {width}x{height} ({width * 8}x{height * 8} pixels) does not divide into patches. "
                           "Use a width and a height divisible by 16.")
    return Shape(batch, frames, height, width, store_layers(net, guider), net.dim, net.num_heads)


def announced_bytes(options: RolloutOptions, shape: Shape, element_size: int, conditions: int = 1) -> int:
    """Exact bytes of the device that the stores of a run will take."""
    policy = build(options.cache, shape.frames)
    return conditions * memory_bytes(policy, storage_of(options.cache), layers=shape.layers, frame_tokens=shape.tokens,
                                     dim=shape.dim, batch=shape.batch, element_size=element_size)


def remembering(guider) -> dict[str, list]:
    """Conditions that get a store of their own, by the side of guidance that they belong to: every positive one, the negative
    ones unless cfg is 1."""
    always = guider.model_options.get("disable_cfg1_optimization", False)
    off = math.isclose(getattr(guider, "cfg", 1.0), 1.0) and not always
    conds = getattr(guider, "conds", {})
    return {side: side_conds for side, side_conds in conds.items() if side_conds and not (off and side == "negative")}


def compute_dtype(patcher) -> torch.dtype:
    """The compute type, which is that of the store."""
    # asked of the patcher: a compute type chosen by a node reaches the model only when it is loaded
    manual = patcher.get_model_object("manual_cast_dtype")
    return manual if manual is not None else patcher.model.get_dtype()


def element_size(patcher) -> int:
    """Bytes of a number in the compute type."""
    return mm.dtype_size(compute_dtype(patcher))


def model_fingerprint(patcher) -> str:
    """`snapshot.fingerprint` of the network as it was loaded from its file. LoRAs do not count: whether they are in the
    weights now depends on the memory that is free."""
    kept, prefix = patcher.backup, "diffusion_model."
    weights = ((name, kept[prefix + name].weight if prefix + name in kept else weight.data)
               for name, weight in patcher.model.diffusion_model.named_parameters())
    return fingerprint((name, getattr(weight, "_qdata", weight)) for name, weight in weights)  # codes, if it is quantised


def run_bytes(guider, options: RolloutOptions, latent_shape) -> int:
    """Bytes of all stores of a run under this guider, before it starts."""
    patcher, conds = guider.model_patcher, sum(remembering(guider).values(), [])
    shape, size = shape_of(patcher.model, latent_shape, guider), element_size(patcher)
    return announced_bytes(options, shape, size, max(1, len(conds))) + view_bytes(network(patcher.model), conds, shape, size)


def tracks_of(guider) -> dict:
    """Prompt tracks that the conditions of a guider carry, by the uuid of the condition.

    Raises ForcingError where a node behind the track changed the prompt, which it could do to the first one only.
    """
    found = {}
    for cond in (c for side in getattr(guider, "conds", {}).values() for c in side or () if TRACK in c):
        track, now = cond[TRACK], cond.get("cross_attn")
        first = track.segments[0].prompt
        if now is not first and not (now is not None and now.shape == first.shape and torch.equal(now, first)):
            raise ForcingError("A node behind the prompt track changed the conditioning, but it can only change the first "
                               "prompt. Put that node before Forcing Prompt Segment, once for every prompt.")
        found[cond["uuid"]] = track
    return found


def _replayed(guider, options: RolloutOptions, frames: int, steered: bool = False) -> int:
    """Latent frames of the forward that a change of prompt replays, or none where nothing is recached. steered: prompts may
    come while it runs."""
    changes = [s for track in tracks_of(guider).values() for s in track.segments[1:]]
    recaches = steered or any(s.transition == "recache" for s in changes)
    return replayed_frames(build(options.cache, frames)) if recaches and options.cache.rollout == "block" else 0


def _reserving(extra: int, frames: int):
    """PREPARE_SAMPLING wrapper: activations of `frames` latent frames, not of the whole video, plus the stores."""
    def wrapper(executor, model, noise_shape, *args, **kwargs):
        inner = model.model
        plain = inner.memory_required
        inner.memory_required = lambda *a, **k: plain(*a, **k) + extra
        try:
            return executor(model, [*noise_shape[:2], frames, *noise_shape[3:]], *args, **kwargs)
        finally:
            del inner.memory_required
    return wrapper


def whole_shape(sampler, latent_shape) -> tuple[int, ...]:
    """Latent shape of the whole video: a sampler that streams it is longer than the latents it is called with."""
    return (*latent_shape[:2], getattr(sampler, "frames", None) or latent_shape[2], *latent_shape[3:])


def reserve(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    """OUTER_SAMPLE wrapper carried by our MODELs and guiders: reserve the stores of a rollout, if this is one."""
    guider, options = executor.class_obj, getattr(sampler, "rollout", None)
    done = get_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, KEY, guider.model_options, is_model_options=True)
    if options is not None and not done:  # MODEL and guider may both have brought this wrapper
        frames = most_frames(options.rollout, options.block, max(1, len(sigmas) - 1), **options.order)
        frames += options.block * options.joined
        whole = whole_shape(sampler, noise.shape)
        frames = min(whole[2], max(frames, _replayed(guider, options, whole[2], getattr(sampler, "prompted", False))))
        wrapper = _reserving(run_bytes(guider, options, whole) + getattr(sampler, "beside", 0), frames)
        add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, wrapper, guider.model_options, is_model_options=True)
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def make_room(guider, wanted: int) -> None:
    """For MODELs that reached us without a reservation: free device memory for the stores right before use."""
    reserved = get_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, KEY, guider.model_options, is_model_options=True)
    device = guider.model_patcher.load_device
    if reserved or mm.is_device_cpu(device):
        return
    needed = wanted + mm.minimum_inference_memory()
    if mm.get_free_memory(device) < needed:
        current = [m for m in mm.current_loaded_models if m.model is guider.model_patcher]
        mm.free_memory(needed, device, keep_loaded=current)
    if mm.get_free_memory(device) < needed and not guider.model_patcher.is_dynamic():
        missing = needed - mm.get_free_memory(device)
        guider.model_patcher.partially_unload(guider.model_patcher.offload_device, missing)
