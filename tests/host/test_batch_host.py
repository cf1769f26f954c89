"""One condition straight to the model: the same latents, and ComfyUI's own way wherever there is anything to add up."""
import comfy.conds as conds
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.nodes import host_batch
from forcing_testkit import hostkit

CACHE = WindowOptions(4, 1, 1)


@pytest.fixture
def stock(monkeypatch):
    """How often ComfyUI worked the batch out by itself."""
    calls, plainly = [], comfy.samplers._calc_cond_batch

    def counted(*args):
        calls.append(args)
        return plainly(*args)

    monkeypatch.setattr(comfy.samplers, "_calc_cond_batch", counted)
    monkeypatch.setattr(host_batch, "STOCK", counted)
    return calls


def made(model=None, **guider):
    return hostkit.sample(hostkit.guider(model or hostkit.plain(), **guider), hostkit.sampler(block=1, cache=CACHE), 4,
                          sigmas=hostkit.TWO_STEPS)


def with_wrapper(kind, wrapper):
    model = hostkit.plain().clone()
    model.add_wrapper_with_key(kind, "somebody", wrapper)
    return model


def test_the_same_latents_without_working_it_out(stock, monkeypatch):
    straight = made()
    assert not stock
    monkeypatch.setattr(host_batch, "_only", lambda conds: None)
    assert torch.equal(straight, made()) and len(stock) == 4 * len(hostkit.TWO_STEPS) - 1


def pair(**extra):
    return [[hostkit.text()[0][0], extra]]


MORE = {"two sides": lambda: {"cfg": 3.0, "negative": hostkit.text(5)},
        "two conditions": lambda: {"positive": [*hostkit.text(), *hostkit.text(2)]},
        "half a strength": lambda: {"positive": pair(strength=0.5)},
        "a part of the steps": lambda: {"positive": pair(start_percent=0.0, end_percent=1.0)}}


@pytest.mark.parametrize("name", MORE)
def test_more_than_one_whole_condition_is_comfyuis(stock, monkeypatch, name):
    usual = made(**MORE[name]())
    assert len(stock) == 4 * len(hostkit.TWO_STEPS) - 1
    monkeypatch.setattr(host_batch, "straight", lambda executor, *args: executor(*args))
    assert torch.equal(usual, made(**MORE[name]()))


def test_what_others_put_around_it_acts(stock):
    """A wrapper of the batch, one of the model, and one of a single call of it."""
    seen = []

    def around(executor, *args, **kwargs):
        seen.append(executor)
        return executor(*args, **kwargs)

    expected, forwards = made(), 4 * len(hostkit.TWO_STEPS) - 1
    assert torch.equal(made(with_wrapper(WrappersMP.CALC_COND_BATCH, around)), expected)
    assert len(seen) == len(stock) == forwards
    assert torch.equal(made(with_wrapper(WrappersMP.APPLY_MODEL, around)), expected)
    assert len(seen) == 2 * forwards and len(stock) == forwards
    model = hostkit.plain().clone()
    model.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
    assert torch.equal(made(model), expected) and len(stock) == 2 * forwards


def test_the_guiders_functions_get_what_they_always_get():
    """Those before and behind CFG see both sides' answers; the second one is all zeros without CFG."""
    seen, model = [], hostkit.plain().clone()
    model.set_model_sampler_pre_cfg_function(lambda args: seen.append(args["conds_out"]) or args["conds_out"])
    expected = made()
    assert torch.equal(made(model), expected)
    assert all(len(out) == 2 and out[0].any() and out[1].shape == out[0].shape and not out[1].any() for out in seen) and seen


def test_values_are_not_copied():
    """ComfyUI would join them with those of other conditions, of which there are none."""
    rows, like = torch.randn(1, 3, 4), {"batch_size": 1, "area": None}
    for kind in (conds.CONDRegular, conds.CONDCrossAttn, conds.CONDNoiseShape):
        assert host_batch._value(kind(rows).process_cond(**like)) is rows
        assert torch.equal(host_batch._value(kind(rows).process_cond(batch_size=2, area=None)), rows.repeat(2, 1, 1))
    assert host_batch._value(conds.CONDConstant(3).process_cond(**like)) == 3
    listed = host_batch._value(conds.CONDList([rows, rows]).process_cond(**like))
    assert all(torch.equal(found, rows) for found in listed) and len(listed) == 2
