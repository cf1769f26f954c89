"""How a rollout runs over the model that ComfyUI manages.

With host_ops.py and host_vae.py this is all that touches ComfyUI's internals.

A rollout calls the guider as any sampler does, so CFG, several conditions, hooks and patches stay ComfyUI's.
Per run, one wrapper on DIFFUSION_MODEL replaces the network's own forward by the causal one; it lives in the
run's copy of model_options and dies with it. Weights are reached only through the stock modules.
"""
from __future__ import annotations

import functools
import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import comfy.model_management as mm
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key, get_wrappers_with_key
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.joined import Frames, can_join, join
from ..forcing_core.memory import Memory, make_memory, memory_bytes
from ..forcing_core.options import RolloutOptions
from ..forcing_core.plan import Phase
from ..forcing_core.policies import build, replayed_frames
from ..forcing_core.policies.base import storage_of
from ..forcing_core.rollout import most_frames
from ..forcing_core.saved import Saved, Tree
from ..forcing_core.schedule import Level
from ..forcing_core.snapshot import fingerprint
from ..forcing_core.wan import Ops, TextState, blended, forward
from .host_audio import Audio
from .host_conditioning import FrameConds, beside, check_extras, is_plain, network, store_layers, text_of
from .host_ops import causal_ops

log = logging.getLogger(__name__)
KEY = "forcing"
TRACK = "forcing_track"  # key of a condition: the prompt track that its first prompt belongs to
# helpers that skip or cut forwards; with a KV store a skipped forward is a hole in memory
REFUSED_WRAPPERS = {"easycache": "EasyCache", "lazycache": "LazyCache"}


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


def count_conditions(guider) -> int:
    """Conditions that get a store of their own: every positive one, the negative ones unless cfg is 1."""
    return sum(len(conds) for conds in _remembering(guider).values())


def _remembering(guider) -> dict[str, list]:
    """Those conditions, by the side of guidance that they belong to."""
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
    patcher = guider.model_patcher
    return announced_bytes(options, shape_of(patcher.model, latent_shape, guider), element_size(patcher),
                           max(1, count_conditions(guider)))


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


# -- memory: tell ComfyUI about the stores before it places weights ------------------------------------------

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


# -- the run ---------------------------------------------------------------------------------------------------

@dataclass
class HostDenoiser:
    """`Denoiser` over a guider. One memory per condition, keyed by the uuid ComfyUI gives every condition.

    x is float32 [B, C, F, H, W] on the sampling device; answers x0 like x, or None for silent phases.
    """

    guider: object
    extra_args: dict
    options: RolloutOptions
    shape: Shape
    memories: dict = field(default_factory=dict)
    texts: dict = field(default_factory=dict)
    call: tuple | None = None
    halves: tuple[Frames, Frames] | None = None  # of a call that is two passes in one
    forwards: int = 0
    prompts: dict = field(default_factory=dict)  # condition -> embeddings, one for every segment of a prompt track
    mixture: tuple[int, int, float] = (0, 0, 1.0)  # segments and weight of the second one: the text that rules now

    def __post_init__(self):
        model_options = self.extra_args["model_options"]
        refuse_incompatible(model_options)
        wrappers = model_options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        # in place of that of a finished run on the same options, which would answer first
        wrappers.setdefault(WrappersMP.DIFFUSION_MODEL, {})[KEY] = [torch.compiler.disable(self._network)]
        net = network(self.guider.inner_model)
        self._frames = FrameConds(lambda: (self.call[1], len(self.call[0])), net.out_dim)
        self._frames.lay(self.guider, self.shape.frames)
        self._audio = Audio(model_options["transformer_options"], self._frames.now)
        kwargs = model_options.get("torch_compile_kwargs")
        self._compile = functools.lru_cache(None)(functools.partial(torch.compile, **kwargs)) if kwargs else lambda f: f

    def __call__(self, x: Tensor, levels: tuple[Level, ...], first: int, phase: Phase) -> Tensor | None:
        mm.throw_exception_if_processing_interrupted()
        self.call = (levels, first, phase)
        self.forwards += 1
        sigma = x.new_full((x.shape[0],), _noisiest(levels))
        x0 = self.guider(x, sigma, model_options=self.extra_args["model_options"], seed=self.extra_args.get("seed"))
        return x0 if phase == "noisy" else None

    @property
    def joins(self) -> bool:
        """Whether a clean pass and the noisy one behind it can share a forward now: on plain networks, without patches."""
        own = self.extra_args["model_options"]["transformer_options"]
        plain = is_plain(network(self.guider.inner_model)) and not own.get("patches") and not own.get("patches_replace")
        return plain and bool(self.memories) and all(map(can_join, self.memories.values()))

    def joined(self, clean: Frames, noisy: Frames) -> Tensor:
        """x0 of the noisy frames, and the clean ones written, in one call of the guider."""
        self.halves = clean, noisy
        try:
            x = torch.cat([clean.x, noisy.x], dim=2)
            return self(x, (*clean.levels, *noisy.levels), clean.first, "noisy")[:, :, len(clean.levels):]
        finally:
            self.halves = None

    def pin(self, first: int, latents: Tensor) -> None:
        """Tell networks with channels for given frames that those from `first` on are these [B, C, k, H, W]."""
        self._frames.pinned = first, latents

    def replace_text(self, segment: int) -> None:
        self.blend_text(segment, segment, 1.0)

    def blend_text(self, a: int, b: int, weight: float) -> None:
        self.mixture = a, b, weight
        self.texts.clear()

    def push_prompt(self, prompt: Tensor) -> None:
        """Prompt 0 is the one that rules now and 1 a new one, for the positive condition; others keep theirs. None stands for
        the prompt that ComfyUI encoded."""
        b = self.mixture[1]
        for side, conds in _remembering(self.guider).items():
            for cond in conds:
                ruling = self.prompts[cond["uuid"]][b] if cond["uuid"] in self.prompts else None
                self.prompts[cond["uuid"]] = (ruling, prompt if side == "positive" else ruling)
        self.mixture = 0, 0, 1.0

    def forget(self) -> None:
        for memory in self.memories.values():
            memory.forget()

    def flush(self, last: int) -> None:
        for memory in self.memories.values():
            memory.flush(last)

    def jump(self, first: int, distance: int) -> None:
        for memory in self.memories.values():
            memory.jump(first, distance)

    def turned(self) -> None:
        for memory in self.memories.values():
            memory.turned()

    def state(self) -> Tree:
        """The memories of all conditions; not the prompts, which the graph knows."""
        return {name: self.memories[key].state() for name, key in self._names().items() if key in self.memories}

    def load(self, saved: Saved) -> None:
        """Go on with saved memories, before the first call. Raises ForcingError for those of other conditions or sizes."""
        names, shape, patcher = self._names(), self.shape, self.guider.model_patcher
        saved.only(names)
        like = torch.empty(shape.batch, 0, shape.heads, shape.dim // shape.heads, dtype=compute_dtype(patcher),
                           device=patcher.load_device)
        for name, key in names.items():
            self._memory(key, like.device).load(saved.part(name), like)

    def _names(self) -> dict:
        """The conditions that remember by names that another run has too: their uuids are new in every run."""
        return {f"{side} {index}": cond["uuid"] for side, conds in _remembering(self.guider).items()
                for index, cond in enumerate(conds)}

    def free(self) -> None:
        """Drop every store and text cache."""
        self.memories.clear()
        self.texts.clear()

    @property
    def nbytes(self) -> int:
        return sum(memory.store.nbytes for memory in self.memories.values())

    def _memory(self, key, device) -> Memory:
        if key not in self.memories:
            shape = self.shape
            self.memories[key] = make_memory(self.options.cache, shape.frames, layers=shape.layers, grid=shape.grid,
                                             head_dim=shape.dim // shape.heads, heads=shape.heads, device=device,
                                             ahead=self.options.knot.frames,
                                             matrices=self.options.noise == "comfy",  # core's numbers to the last bit
                                             sparse=self.options.sparse)
        return self.memories[key]

    def _text(self, net, key, context: Tensor, clip: Tensor | None) -> TextState:
        if key not in self.texts:
            self.texts[key] = text_of(net, self._ruling(key, context), clip)
        return self.texts[key]

    def _ruling(self, key, context: Tensor) -> Tensor:
        """The embedding of a condition's track that rules now, cast as ComfyUI cast `context`, the one it knows of."""
        if key not in self.prompts:
            return context
        a, b, weight = self.mixture
        one, other = (context if self.prompts[key][n] is None else self.prompts[key][n] for n in (a, b))
        text = other if a == b else blended(one, other, weight)
        return comfy.utils.repeat_to_batch_size(text.to(context), context.shape[0])

    def _network(self, executor, x: Tensor, timestep: Tensor, context: Tensor, clip_fea, time_dim_concat,
                 transformer_options: dict, **extra) -> Tensor:
        """DIFFUSION_MODEL wrapper: the causal forward for every condition of the batch in turn."""
        levels, first, phase = self.call
        if x.shape[2:] != (len(levels), self.shape.height, self.shape.width):
            raise ForcingError(PARTIAL)
        net = executor.class_obj
        self._audio.lay(transformer_options)
        check_extras(net, {"clip_fea": clip_fea, "time_dim_concat": time_dim_concat, **extra})
        transformer_options["total_blocks"], transformer_options["block_type"] = len(net.blocks), "double"
        transformer_options["grid_sizes"] = (x.shape[2], *self.shape.grid)
        exact = self.options.noise != "comfy" and mm.supports_fp64(x.device)  # core's own embedding is float32
        sinusoid = torch.float64 if exact else torch.float32
        ops = causal_ops(transformer_options, sinusoid, self._compile)
        keys = transformer_options["uuids"]
        clips = [None] * len(keys) if clip_fea is None else clip_fea.chunk(len(keys))
        parts = []
        for index, (key, part) in enumerate(zip(keys, x.chunk(len(keys)))):
            text = self._text(net, key, context.chunk(len(keys))[index], clips[index])
            parts.append(self._condition(net, key, part, text, beside(net, index, len(keys), extra), ops))
        return torch.cat(parts)

    def _condition(self, net, key, x: Tensor, text: TextState, side, ops: Ops) -> Tensor:
        levels, first, phase = self.call
        timesteps = x.new_tensor([level.timestep for level in levels], dtype=torch.float32).expand(x.shape[0], -1)
        memory = self._memory(key, x.device)
        now = join(memory, *self.halves) if self.halves else memory.begin(first, x.shape[2], phase, _noisiest(levels))
        velocity = forward(net, x, timesteps, text, now, ops, side)
        if self.halves:  # ComfyUI wants an answer for every frame; that of the clean ones, at sigma 0, is not looked at
            velocity = torch.nn.functional.pad(velocity, (0, 0, 0, 0, x.shape[2] - velocity.shape[2], 0))
        return x.new_zeros(x.shape[0], net.out_dim, *x.shape[2:]) if velocity is None else _shares(velocity, levels)


def _noisiest(levels) -> float:
    return max(level.sigma for level in levels)


def _shares(velocity: Tensor, levels) -> Tensor:
    """ComfyUI subtracts one sigma times the answer, that of the noisiest frame. Where frames differ (a joint pass of
    a rolling rollout), each answers with its share of it, so that guidance and patches work on every frame's own x0."""
    top = _noisiest(levels)
    if all(level.sigma == top for level in levels):
        return velocity
    share = velocity.new_tensor([level.sigma / top for level in levels], dtype=torch.float32)
    return velocity.float() * share.view(-1, 1, 1)


PARTIAL = ("A condition covers only part of the picture or of the frames, which a causal rollout cannot do. Remove the "
           "area from the conditioning.")


def refuse_partial_conditions(guider, shape: Shape, first_sigma: float) -> None:
    """Raise ForcingError for conditions that would skip forwards, and with them the writing of their store."""
    sizes = (shape.frames, shape.height, shape.width)
    for cond in (c for side in guider.conds.values() for c in side or ()):
        area = cond.get("area", ())
        area = area[:len(area) // 2]
        if any(part < whole for part, whole in zip(reversed(area), reversed(sizes))):
            raise ForcingError(PARTIAL)
        if cond.get("timestep_end", 0.0) > 0 or cond.get("timestep_start", first_sigma) < first_sigma:
            raise ForcingError("A condition is limited to a range of steps, so it would miss forwards that write its KV "
                               "store. Remove the timestep range from the conditioning.")


def refuse_incompatible(model_options: dict) -> None:
    """Raise ForcingError, by name, for helpers that would leave holes in the store."""
    if model_options.get("context_handler") is not None:
        raise ForcingError("Context windows cannot be combined with a causal rollout, which has a window of its own. "
                           "Remove the Context Windows node; Forcing Cache sets the window.")
    if "multigpu_clones" in model_options:
        raise ForcingError("A causal rollout keeps its KV store on one device. Remove the MultiGPU node from this model.")
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    found = {key for by_key in wrappers.values() for key in by_key}
    for key, name in REFUSED_WRAPPERS.items():
        if key in found:
            raise ForcingError(f"{name} skips forwards, which would leave holes in the KV store. Remove the {name} node.")


_running: set[int] = set()  # ids of networks a rollout is using now; numbers only, emptied by `exclusive`


@contextmanager
def exclusive(net):
    """One rollout at a time on a network: a second one would mix its forwards into the first one's."""
    if id(net) in _running:
        raise ForcingError("Another causal rollout is active on this model. Wait until it is done, or interrupt it.")
    _running.add(id(net))
    try:
        yield
    finally:
        _running.discard(id(net))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is a device or host allocation failure."""
    return mm.is_oom(error) or (isinstance(error, RuntimeError) and "not enough memory" in str(error))
