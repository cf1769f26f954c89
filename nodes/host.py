"""How a rollout runs over the model that ComfyUI manages.

The host_*.py files are all that touches ComfyUI's internals.

A rollout calls the guider as any sampler does, so CFG, several conditions, hooks and patches stay ComfyUI's.
Per run, one wrapper on DIFFUSION_MODEL replaces the network's own forward by the causal one; it lives in the
run's copy of model_options and dies with it. Weights are reached only through the stock modules.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass, field

import comfy.model_management as mm
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.joined import Frames, can_join, join
from ..forcing_core.memory import Memory, make_memory
from ..forcing_core.options import RolloutOptions
from ..forcing_core.plan import Phase
from ..forcing_core.saved import Saved, Tree
from ..forcing_core.schedule import Level
from ..forcing_core.wan import Ops, TextState, blended
from .host_accelerate import Forwards
from .host_audio import Audio
from .host_batch import straight
from .host_conditioning import FrameConds, beside, check_extras, is_plain, network, text_of
from .host_memory import KEY, Shape, compute_dtype, remembering
from .host_ops import causal_ops
from .host_refusals import PARTIAL, refuse_incompatible
from .host_s2v import Views


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
        wrappers.setdefault(WrappersMP.CALC_COND_BATCH, {})[KEY] = [straight]
        net = network(self.guider.inner_model)
        self._frames = FrameConds(lambda: (self.call[1], len(self.call[0])), net.out_dim,
                                  lambda cond: self._ruling(cond["uuid"], cond["model_conds"]["c_crossattn"].cond))
        self._frames.lay(self.guider, self.shape.frames)
        self._audio = Audio(model_options["transformer_options"], self._frames.now)
        self._views, self._weights = Views(self.options), None
        kwargs = model_options.get("torch_compile_kwargs")
        self._forwards = Forwards(self.options, self.guider.model_patcher, bool(kwargs))
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
        for side, conds in remembering(self.guider).items():
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
        return {f"{side} {index}": cond["uuid"] for side, conds in remembering(self.guider).items()
                for index, cond in enumerate(conds)}

    def free(self) -> None:
        """Drop every store and text cache."""
        self.memories.clear()
        self.texts.clear()
        self._views.clear()
        self._forwards.free()

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
        weights = self.guider.model_patcher.patches_uuid
        if self._weights != weights:  # what a text cached was made by those before, with another strength of a LoRA
            self._weights = weights
            self.texts.clear()
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
        parts, extra = [], {**extra, "context": context}
        for index, (key, part) in enumerate(zip(keys, x.chunk(len(keys)))):
            text = self._text(net, key, context.chunk(len(keys))[index], clips[index])
            parts.append(self._condition(net, key, part, text, beside(net, index, len(keys), extra), ops,
                                         transformer_options))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _condition(self, net, key, x: Tensor, text: TextState, side, ops: Ops, transformer_options: dict) -> Tensor:
        levels, first, phase = self.call
        timesteps = text.times.steps(levels, x)
        memory = self._memory(key, x.device)
        now = join(memory, *self.halves) if self.halves else memory.begin(first, x.shape[2], phase, _noisiest(levels))
        velocity = self._forwards.run(net, x, timesteps, text, self._views.around(key, side, now, ops), ops, side,
                                      transformer_options)
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
