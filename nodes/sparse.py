"""Forcing Sparse: a rollout whose attention looks at a part of what is remembered."""
from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..forcing_core.errors import ForcingError
from ..forcing_core.sparse import KERNELS, AnnOptions, CrossOptions, DummyOptions, LightOptions, Sparse
from .common import CATEGORY
from .sampler import CausalSampler

NONE = "none"
# method -> (options, what does not come from a widget)
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "light": (LightOptions, {}),
    "ann_hashing": (AnnOptions, {"search": "lsh"}),
    "ann_low_bits": (AnnOptions, {"search": "quant"}),
    "dummy": (DummyOptions, {}),
}
WHOLE = "whole prompt"
PROMPTS = {WHOLE: None, "hashing": "lsh", "low bits": "quant"}


def _share(name: str, default: float, tooltip: str, low: float = 0.0):
    return io.Float.Input(name, default=default, min=low, max=1.0, step=0.01, tooltip=tooltip)


def _count(name: str, default: int, tooltip: str, low: int = 0, high: int = 1024):
    return io.Int.Input(name, default=default, min=low, max=high, tooltip=tooltip)


def _density():
    return _share("density", 0.28, "Part of the keys that is looked at; with hashing, the most. Published: 0.28.", 0.01)


def _ann(*more) -> list:
    return [*more, _count("group", 64, "Queries that choose together. Fewer choose better and run slower.", 1),
            _count("dense_steps", 1, "First denoising steps of a block that see everything. Published: 30 %.")]


def _method() -> io.DynamicCombo.Input:
    widgets = {
        NONE: [],
        "light": [
            _share("sparsity", 0.88, "Wanted mean part of the keys that is left out. Published: 0.88, for long videos 0.85."),
            _share("base", 0.98, "What late blocks tend to; above sparsity, early blocks see more. Published: 0.98, for long "
                                 "videos 0.95."),
            _count("keep", 6, "Past latent frames that a group of queries may look at. Published: 6, for long videos 3.", 1),
            _count("sink", 1, "Oldest frames always among them."),
            _count("near", 2, "Newest past frames always among them. Published: 2, for long videos 1."),
            _count("block", 64, "Tokens that are chosen together, as in training: 64 or 128.", 1)],
        "ann_hashing": _ann(_count("bits", 6, "Bits of a code; more find less. 0 finds everything.", 0, 12),
                            _count("tables", 18, "Codes of a token; more find more.", 1, 64), _density()),
        "ann_low_bits": _ann(_count("bits", 8, "Bits of a number in the search.", 2, 8), _density()),
        "dummy": [
            _share("share", 0.5, "Part of the heads that get the shortest memory. Published: 0.5."),
            _count("local", 6, "Newest past latent frames that local heads see."),
            _count("samples", 64, "Queries by which the heads are told apart.", 1)],
    }
    return io.DynamicCombo.Input(
        "method", tooltip="What of the past a block looks at. light: Light Forcing, made for its own weights. ann_hashing, "
                          "ann_low_bits: AnnSA, what a cheap search finds. dummy: heads that hardly look back get a short "
                          "memory. none: all of it.",
        options=[io.DynamicCombo.Option(name, inputs) for name, inputs in widgets.items()])


class ForcingSparse(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingSparse",
            display_name="Forcing Sparse",
            category=CATEGORY,
            description="Sparse attention for any causal rollout: each block looks at a part of what is remembered. Pays on "
                        "large pictures and long memories; the memory itself stays as large.",
            search_aliases=["sparse attention", "light forcing", "annsa", "annca", "tempcache", "dummy forcing", "lsh",
                            "flex attention"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="From Forcing Preset or Forcing Sampler, with any memory."),
                _method(),
                io.Combo.Input("prompt", options=list(PROMPTS), default=WHOLE, advanced=True,
                               tooltip="AnnCA: what of the prompt each latent frame looks at. Text is short, so this saves "
                                       "little."),
                io.Float.Input("prompt_density", default=0.33, min=0.01, max=1.0, step=0.01, advanced=True,
                               tooltip="The part of the prompt's tokens that is looked at; with hashing, the most. "
                                       "Published: 0.33."),
                io.Combo.Input("kernel", options=list(KERNELS), default="auto", advanced=True,
                               tooltip="auto: flex where method and card allow it, else gather. gather: any device. flex: "
                                       "NVIDIA cards from compute capability 8.0 on, for light. mask: the slow reference."),
            ],
            outputs=[io.Sampler.Output(tooltip="The same rollout with sparse attention.")],
        )

    @classmethod
    def execute(cls, sampler, method, prompt=WHOLE, prompt_density=0.33, kernel="auto") -> io.NodeOutput:
        if not isinstance(sampler, CausalSampler):
            raise ForcingError("Only a causal rollout can be sparse. Connect the SAMPLER of Forcing Preset or Forcing Sampler.")
        search = PROMPTS[prompt]
        cross = None if search is None else CrossOptions(search, density=prompt_density)
        made = copy.copy(sampler)
        made.rollout = replace(sampler.rollout, sparse=Sparse(options_of(method), cross, kernel))
        return io.NodeOutput(made)


def options_of(method: dict[str, Any]):
    """The options that the drop-down's value {"method": name, field: value, ...} describes; None for none. Raises
    ForcingError for values that do not go together."""
    if method["method"] == NONE:
        return None
    kind, fixed = METHODS[method["method"]]
    return kind(**fixed, **{name: value for name, value in method.items() if name != "method" and value is not None})
