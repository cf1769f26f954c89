"""Values of Forcing Cache lie in saved workflows by place: the order of kinds and fields may only grow at its end."""
from dataclasses import dataclass, fields

import pytest
from forcing_pack.forcing_core.policies import KINDS
from forcing_pack.forcing_core.policies.window import Window, WindowOptions
from forcing_pack.nodes import cache_inputs
from forcing_pack.nodes.cache_inputs import TITLES, options_of, shown

STORE = ("store", "offload", "dense")
# As released. A row, or the end of one, may be added; nothing that stands here may ever be changed.
RELEASED = {
    "window": ("window", "sink", "positions", "limit", "compact", "jitter", *STORE),
    "rolling": ("window", "sink", "positions", "limit", *STORE),
    "ema_sink": ("window", "sink", "alpha", "sink_dtype", "compact", *STORE),
    "deep_sink": ("window", "sink", "hole", "positions", "limit", "compact", *STORE),
    "deep_compress": ("window", "sink", "budget", "recent", "reuse_cap", "aligned", "hole", "positions", "limit", "compact",
                      *STORE),
    "bounded": ("sink", "slow", "fast", "mode", "tau", "interval", "promote", "released", "compact", *STORE),
    "routing": ("top_k", "sink", "recent", "group", "window", *STORE),
    "merging": ("tau", "sink", "recent", "radius", "budget", "limit", "compact", *STORE),
    "recency": ("window", "sink", "recent", "beta", "gamma", "compact", *STORE),
    "recompute": ("window", "weight", *STORE),
    "rolling_sink": ("window", *STORE),
    "relax": ("sink", "history", "recent", "candidates", "reservoir", "novelty", *STORE),
    "memflow": ("window", "top_k", "active", "compact", *STORE),
    "per_step": ("window", "sink", "positions", "limit", "compact", "jitter", "steps", "nearest", "farthest", *STORE),
}


def names(kind):
    return tuple(name for name, _ in shown(kind))


def test_kinds_keep_their_places():
    assert tuple(TITLES)[:len(RELEASED)] == tuple(RELEASED)


@pytest.mark.parametrize("kind", TITLES)
def test_fields_keep_their_places(kind):
    assert kind in RELEASED, f"Add the row {kind!r}: {names(kind)} to RELEASED, and to ORDER of nodes/cache_inputs.py."
    assert names(kind) == RELEASED[kind], "Add what is new to the ends of its rows in RELEASED and in ORDER."
    options = KINDS[kind][0]
    hidden = (*cache_inputs.HIDDEN, *(() if options.variants else STORE))
    assert sorted(names(kind)) == sorted(f.name for f in fields(options) if f.name not in hidden)


def test_a_new_field_comes_last_wherever_it_is_declared(monkeypatch):
    @dataclass(frozen=True)
    class Grown(WindowOptions):
        store: str = "model"
        wobble: int = 7
        window: int | None = None

    monkeypatch.setitem(KINDS, "window", (Grown, Window))
    assert names("window") == (*RELEASED["window"], "wobble")
    assert options_of({"policy": "window", "wobble": 3, "window": 9, "store": "int8"}) == Grown(
        window=9, sink=3, positions="relative", wobble=3, store="int8", block=1)


def test_a_kind_that_is_not_released_shows_its_own_fields_first(monkeypatch):
    monkeypatch.delitem(cache_inputs.ORDER, "memflow")
    assert names("memflow") == ("window", "top_k", "active", "compact", *STORE)


@pytest.mark.parametrize("kind", TITLES)
def test_what_is_left_out_keeps_its_default(kind):
    expected = {name: None if value == 0 and name in cache_inputs.NONE_IS_ZERO else value for name, value in shown(kind)}
    made = options_of({"policy": kind})
    assert {name: getattr(made, name) for name in expected} == expected
