"""Sparse attention over ComfyUI: the node, a dense run where everything is chosen, another one where not."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.sparse import AnnOptions, CrossOptions, DummyOptions, LightOptions, Sparse
from forcing_pack.nodes.sparse import METHODS, NONE, ForcingSparse, options_of
from forcing_testkit import hostkit

CACHE = WindowOptions(window=9, sink=3, positions="relative")


def sparse(method, prompt="whole prompt", **more):
    """The sampler behind the node; method: name and widgets."""
    name, widgets = method
    return ForcingSparse.execute(hostkit.sampler(cache=CACHE), {"method": name, **widgets}, prompt, **more).result[0]


def made(how, frames=12):
    return hostkit.run(hostkit.plain(), how, frames, sigmas=hostkit.TWO_STEPS).latents


@pytest.mark.parametrize("method, prompt", [
    (("light", {"sparsity": 0.0, "base": 0.0, "keep": 99, "block": 4}), "whole prompt"),
    (("ann_low_bits", {"density": 1.0, "dense_steps": 0}), "whole prompt"),
    ((NONE, {}), "low bits"),
])
def test_everything_chosen_is_the_dense_run(method, prompt):
    dense = made(hostkit.sampler(cache=CACHE))
    assert hostkit.relative(made(sparse(method, prompt, prompt_density=1.0)), dense) <= 1e-5


@pytest.mark.parametrize("method, prompt", [
    (("light", {"sparsity": 0.5, "base": 0.6, "keep": 2, "sink": 0, "near": 1, "block": 2}), "whole prompt"),
    (("ann_hashing", {"bits": 3, "tables": 2, "group": 4, "dense_steps": 0}), "whole prompt"),
    (("dummy", {"local": 3}), "whole prompt"),
    ((NONE, {}), "low bits"),
])
def test_less_chosen_is_another_video_whatever_the_kernel(method, prompt):
    how = sparse(method, prompt)
    over = made(how)
    assert torch.isfinite(over).all() and hostkit.relative(over, made(hostkit.sampler(cache=CACHE))) > 1e-4
    masked = sparse(method, prompt, kernel="mask")
    assert hostkit.relative(made(masked), over) <= 1e-4


def test_widgets_become_options():
    assert {name: options_of({"method": name}) for name in METHODS} == {
        "light": LightOptions(), "ann_hashing": AnnOptions("lsh"), "ann_low_bits": AnnOptions("quant"), "dummy": DummyOptions()}
    both = sparse(("light", {"sparsity": 0.85, "base": 0.95}), "hashing", kernel="gather").rollout.sparse
    assert both == Sparse(LightOptions(0.85, 0.95), CrossOptions("lsh"), "gather")
    assert not sparse((NONE, {})).rollout.sparse


def test_defaults_of_the_widgets_are_those_of_the_options():
    """Guards against a drop-down that says something else than the core."""
    combo = next(i for i in ForcingSparse.define_schema().inputs if i.id == "method")
    for option in combo.options:
        if option.key != NONE:
            shown = {i.id: i.default for i in option.inputs}
            plain = options_of({"method": option.key})
            usual = {"bits": {"ann_hashing": 6, "ann_low_bits": 8}.get(option.key)}
            assert {name: usual.get(name, getattr(plain, name)) for name in shown} == shown


@pytest.mark.parametrize(("make", "match"), [
    (lambda: ForcingSparse.execute(object(), {"method": NONE}), "Connect the SAMPLER of Forcing Preset"),
    (lambda: sparse(("light", {"sparsity": 0.9, "base": 0.8})), "0 <= sparsity <= base"),
    (lambda: made(sparse(("light", {}), kernel="flex")), "'flex' cannot run here"),
])
def test_what_cannot_be_sparse_is_refused(make, match):
    with pytest.raises(ForcingError, match=match):
        make()
