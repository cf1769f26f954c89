"""Widgets of Forcing Cache: one option a cache policy, one widget a field of its options.

Defaults come from the options dataclass, so they are the paper's; here are only ranges and words. A new policy
appears in the node as soon as it has a sentence in TITLES beside its row in `KINDS`; give its fields rows in FIELDS.
All of them are optional, so that a workflow saved before a field existed goes on working. It holds their values by place,
so a new field comes behind those in ORDER, wherever the dataclass has it; once released, it goes to the end of its row.
"""
from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from comfy_api.latest import io

from ..forcing_core.codecs import CODECS
from ..forcing_core.policies import KINDS
from ..forcing_core.rope import TABLE_ROWS

# kind -> what it is for, in one sentence
TITLES = {
    "window": "a sliding window with sink frames (Self Forcing, LongLive; any model)",
    "rolling": "the rolling window of Rolling Forcing: a block for every step is denoised together. Needs its weights",
    "ema_sink": "Reward Forcing: what leaves the window is blended into the sink",
    "deep_sink": "Deep Forcing without compression: a large sink that moves along. For Self Forcing weights",
    "deep_compress": "Deep Forcing: a moving sink, and the most looked-at tokens of the past. For Self Forcing weights",
    "bounded": "Context Forcing: sink, slow memory of surprising frames, fast memory of new ones",
    "routing": "Resampling Forcing: keeps everything, attends to the best matching past frames only",
    "merging": "TempCache: past tokens that say the same are merged, for very long histories",
    "recency": "Recency Forcing: what is long ago counts less. For Self Forcing weights",
    "recompute": "Krea Realtime: the context is computed anew before every block. Slower, drifts less",
    "rolling_sink": "Rolling Sink: the beginning of the video comes back in place of older frames. For Self Forcing weights",
    "relax": "Relax Forcing: a few frames, one of them an old one that is unlike the newest. For Self Forcing weights",
    "memflow": "MemFlow: at a change of prompt, the frames that fit the new one best are kept",
    "per_step": "Live Avatar: a window for every denoising step, no clean passes. Needs its weights",
}
# kind -> fields in the order of their widgets, as in files of users: rows may only grow at their ends
ORDER = {
    "window": ("window", "sink", "positions", "limit", "compact", "jitter", "store", "offload", "dense"),
    "rolling": ("window", "sink", "positions", "limit", "store", "offload", "dense"),
    "ema_sink": ("window", "sink", "alpha", "sink_dtype", "compact", "store", "offload", "dense"),
    "deep_sink": ("window", "sink", "hole", "positions", "limit", "compact", "store", "offload", "dense"),
    "deep_compress": ("window", "sink", "budget", "recent", "reuse_cap", "aligned", "hole", "positions", "limit", "compact",
                      "store", "offload", "dense"),
    "bounded": ("sink", "slow", "fast", "mode", "tau", "interval", "promote", "released", "compact",
                "store", "offload", "dense"),
    "routing": ("top_k", "sink", "recent", "group", "window", "store", "offload", "dense"),
    "merging": ("tau", "sink", "recent", "radius", "budget", "limit", "compact", "store", "offload", "dense"),
    "recency": ("window", "sink", "recent", "beta", "gamma", "compact", "store", "offload", "dense"),
    "recompute": ("window", "weight", "store", "offload", "dense"),
    "rolling_sink": ("window", "store", "offload", "dense"),
    "relax": ("sink", "history", "recent", "candidates", "reservoir", "novelty", "store", "offload", "dense"),
    "memflow": ("window", "top_k", "active", "compact", "store", "offload", "dense"),
    "per_step": ("window", "sink", "positions", "limit", "compact", "jitter", "steps", "nearest", "farthest", "store",
                 "offload", "dense"),
}
# Options that do not exist in a graph: the block size is the sampler's.
HIDDEN = ("block",)
BASE = ("store", "offload", "dense")  # of every policy whose store takes them


def _int(low: int, high: int, tooltip: str, **more):
    return lambda name, default: io.Int.Input(name, default=0 if default is None else default, min=low, max=high,
                                              tooltip=tooltip, optional=True, **more)


def _float(low: float, high: float, step: float, tooltip: str, **more):
    return lambda name, default: io.Float.Input(name, default=default, min=low, max=high, step=step, tooltip=tooltip,
                                                optional=True, **more)


def _bool(tooltip: str, **more):
    return lambda name, default: io.Boolean.Input(name, default=default, tooltip=tooltip, optional=True, **more)


def _combo(options: list[str], tooltip: str, **more):
    return lambda name, default: io.Combo.Input(name, options=options, default=default, tooltip=tooltip, optional=True,
                                                **more)


# field -> maker of its widget from (name, default)
FIELDS = {
    "window": _int(0, 4096, "Latent frames a block may see, the sink and the block itself included. 12 is LongLive's, 21 the "
                            "training length of most models. 0: everything, memory grows with length."),
    "sink": _int(0, 4096, "First latent frames of the video that are never dropped; they anchor identity and colours. "
                          "Part of the window."),
    "limit": _int(2, TABLE_ROWS, "First temporal position that is never used with rebased positions. 21 keeps them inside the "
                                 "range that most models were trained on.", advanced=True),
    "compact": _bool("A third less memory where positions move, a little slower: keys are rotated at every read instead of "
                     "being kept rotated.", advanced=True),
    "jitter": _float(0.0, 0.95, 0.05, "Every head counts time a little differently, so that long videos do not fall back to "
                                      "their first frames. 0.8: LoL. 0: as trained.", advanced=True),
    "alpha": _float(0.0, 1.0, 0.001, "How slowly the sink forgets: 0.999 keeps almost everything, 0.9 follows the video."),
    "sink_dtype": _combo(["model", "float32"], "model: as published; in bf16 the sink then hardly moves. float32: as the paper "
                                               "means it."),
    "hole": _bool("On: as the released code has it, one block of empty positions behind the sink. Off: the paper's formula, "
                  "the sink touches the newer frames.", advanced=True),
    "budget": _int(1, 4096, "deep_compress: latent frames that a compression leaves. merging: most groups, in latent frames' "
                            "worth of tokens."),
    "recent": _int(0, 4096, "Newest latent frames that are always kept whole (or always attended to)."),
    "reuse_cap": _int(0, 1000, "How often a token may survive a compression: 7 as released. 0: no limit, the paper.",
                      advanced=True),
    "aligned": _bool("Off: chosen tokens keep their positions in time, as released. On: they stand in a row behind the sink, "
                     "the paper.", advanced=True),
    "slow": _int(1, 4096, "Latent frames of the slow memory, which keeps frames that brought something new."),
    "fast": _int(1, 4096, "Newest latent frames, the current block included."),
    "mode": _combo(["surprise", "uniform"], "surprise: a block's first frames go into the slow memory where they differ from "
                                            "the last ones there. uniform: at regular intervals."),
    "tau": _float(0.0, 1.1, 0.01, "Cosine of keys: below it a frame is a surprise (bounded), above it two tokens are the same "
                                  "(merging)."),
    "interval": _int(1, 4096, "uniform: latent frames from one promotion to the next.", advanced=True),
    "promote": _int(1, 64, "Leading latent frames of a block that are promoted together.", advanced=True),
    "released": _bool("Decide as the published code does, at the block's first step and against the last forward.",
                      advanced=True),
    "top_k": _int(0, 4096, "routing: past latent frames that a query may attend to, chosen by score. Fewer is faster. memflow: "
                           "frames that a change of prompt puts into the bank, which has one more."),
    "group": _combo(["head", "block", "token"], "Who chooses: every head, blocks of 128 queries of a head, or every query "
                                                "(exact as in the paper, slow).", advanced=True),
    "beta": _float(0.0, 100.0, 0.5, "How much less the oldest history counts: its logits get minus this. 0: a plain window."),
    "gamma": _float(0.0, 10.0, 0.05, "How soon the history counts less: small for at once, doubled at every step.",
                    advanced=True),
    "weight": _float(0.01, 1.0, 0.01, "Share of past frames but the first one. 1: as they are. 0.3 lets errors build up less."),
    "history": _int(0, 64, "Old latent frames that a block attends to, chosen among the candidates."),
    "candidates": _int(1, 256, "Latent frames that the old ones are chosen from, spread over the newer half of the reservoir.",
                       advanced=True),
    "reservoir": _int(4, 4096, "Latent frames kept to choose from, the current block included: this sets the memory. 120 as "
                               "published is much; 40 are 10 seconds."),
    "novelty": _float(0.0, 100.0, 0.5, "How much an old frame loses for being like the newest one. 2 as published; 0: only its "
                                       "likeness to the sink counts.", advanced=True),
    "active": _int(0, 64, "Frames of the bank that a layer attends to, those that fit its queries best. 0: all.",
                   advanced=True),
    "steps": _int(1, 32, "Denoising steps of a block: every one has a window of its own, so memory grows with them."),
    "nearest": _int(1, 64, "Latent frames that the picture of an S2V model stands behind the newest frame, at least.",
                    advanced=True),
    "farthest": _int(1, 64, "The same at most: every forward draws between the two. 1 and 27 as published.", advanced=True),
    "radius": _int(0, 64, "How many rows and columns away a token may find its like.", advanced=True),
    "store": _combo(list(CODECS), "Numbers of the KV store: the model's own, or int8 / fp8 at half the memory and a small "
                                  "error.", advanced=True),
    "dense": _int(0, 4096, "int8 and fp8: newest latent frames that are also kept in the model's own numbers.", advanced=True),
    "offload": _bool("Keep the KV store in main memory, two layers of it on the card. Slower, same numbers.", advanced=True),
}
POSITIONS = {
    "window": ["absolute", "relative", "rebased"],
}
POSITIONS_TIP = ("Temporal positions of past frames. absolute: as trained, ends at 1024 latent frames (4 min 15 s). relative: "
                 "counted inside the window, no limit. rebased: absolute until the limit, then all move along, no limit.")
# What suits most people better than the dataclass's own default.
DEFAULTS: dict[str, dict[str, Any]] = {
    "window": {"window": 12, "sink": 3, "positions": "relative"},
    "per_step": {"positions": "rebased"},
}
NONE_IS_ZERO = ("window", "reuse_cap")  # 0 in the graph is None in the options


def shown(kind: str) -> list[tuple[str, Any]]:
    """(field, default) of a policy's widgets: those in ORDER, then new ones, its own before those of every policy."""
    options, order = KINDS[kind][0], ORDER.get(kind, ())
    defaults = {f.name: DEFAULTS.get(kind, {}).get(f.name, None if f.default is MISSING else f.default)
                for f in fields(options) if f.name not in (*HIDDEN, *BASE)}
    if options.variants:
        defaults |= {f.name: f.default for f in fields(options) if f.name in BASE}
    return [(name, defaults[name]) for name in (*order, *(name for name in defaults if name not in order))]


def _widget(kind: str, name: str, default: Any):
    if name == "positions":
        choices = POSITIONS.get(kind, ["absolute", "rebased"])
        return io.Combo.Input(name, options=choices, default=default, tooltip=POSITIONS_TIP, optional=True)
    return FIELDS[name](name, default)


def policy_input() -> io.DynamicCombo.Input:
    """The drop-down of policies; each shows its own widgets."""
    tooltip = "How the past is remembered. " + " ".join(f"{kind}: {title}." for kind, title in TITLES.items())
    return io.DynamicCombo.Input("policy", tooltip=tooltip, options=[
        io.DynamicCombo.Option(kind, [_widget(kind, *pair) for pair in shown(kind)]) for kind in TITLES])


def options_of(policy: dict[str, Any]):
    """The options that the drop-down's value {"policy": kind, field: value, ...} describes.

    Raises ForcingError, worded by the policy, for values that do not go together.
    """
    kind = policy["policy"]
    given = {name: policy[name] for name, _ in shown(kind) if policy.get(name) is not None}
    given.update({name: None for name in NONE_IS_ZERO if given.get(name) == 0})
    return KINDS[kind][0](**{**DEFAULTS.get(kind, {}), **given, "block": 1})
