"""KV stores: as large as announced, reserved before weights are placed, gone after every kind of end."""
import gc

import comfy.model_management as mm
import comfy.sampler_helpers
import comfy.samplers
import folder_paths
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.options import RolloutOptions
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.nodes import host_memory
from forcing_pack.nodes.cache import ForcingPlanView
from forcing_pack.nodes.loading import prepared
from forcing_pack.nodes.sampler import CausalSampler
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import TWO_STEPS, basic_guider, guider, plain, sample, sampler, text

WINDOW = {positions: WindowOptions(window=12, sink=3, positions=positions) for positions in ("absolute", "relative")}
TENSORS = {"absolute": 2, "relative": 3}  # keys and values; raw keys besides where positions move


def expected_bytes(frames, tensors=2, conditions=1, batch=1, tokens=6):
    return conditions * tiny.LAYERS * frames * tokens * tiny.DIM * batch * 4 * tensors


@pytest.fixture
def announce(monkeypatch, tmp_path):
    """announce(how, frames, ...): the `bytes` output of Forcing Plan View."""
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))

    def ask(how, frames, conditions=1, batch=1):
        latent = {"samples": hostkit.latent(frames, batch)}
        return ForcingPlanView.execute(plain(), how, latent, conditions).result[2]
    return ask


# -- size -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("positions", WINDOW)
def test_a_window_costs_the_same_for_ten_times_the_video(monkeypatch, announce, positions):
    """Literal bytes, announced bytes and allocated bytes, at 60 and at 600 latent frames."""
    how = sampler(cache=WINDOW[positions])
    seen = hostkit.watch_stores(monkeypatch)
    for frames in (60, 600):
        seen.clear()
        sample(plain(), how, frames, sigmas=(1.0, 0.0))
        allocated = {held.nbytes for held in seen}
        assert allocated == {announce(how, frames)} == {expected_bytes(12, TENSORS[positions])}


def test_everything_grows_with_the_video(monkeypatch, announce):
    """Without a window; also shows that the test above measures something."""
    seen = hostkit.watch_stores(monkeypatch)
    for frames in (6, 12):
        sample(plain(), sampler(), frames, sigmas=(1.0, 0.0))
        assert seen[-1].nbytes == announce(sampler(), frames) == expected_bytes(frames)


@pytest.mark.parametrize(("cfg", "conditions"), [(1.0, 1), (3.0, 2)])
def test_guidance_and_batch_multiply_the_bytes(monkeypatch, announce, cfg, conditions):
    seen = hostkit.watch_stores(monkeypatch)
    guide = guider(plain(), text(1), text(2), cfg=cfg)
    sample(guide, sampler(), 6, batch=2, sigmas=TWO_STEPS)
    assert seen[-1].nbytes == announce(sampler(), 6, conditions, batch=2) == expected_bytes(6, 2, conditions, batch=2)


@pytest.mark.parametrize("shape", [(1, 1, 7, 1, 1), (7, 4, 6), (7, 1, 32, 48)])
def test_plan_view_takes_the_masks_of_other_nodes(announce, shape):
    """Core's mask nodes make [frames, H, W] and [frames, 1, H, W]; the sampler takes them, so must the view."""
    mask = torch.ones(shape)
    mask[:, :, :1] = 0 if len(shape) == 5 else 1
    if len(shape) != 5:
        mask[0] = 0
    latent = {"samples": hostkit.latent(7), "noise_mask": mask}
    assert ForcingPlanView.execute(plain(), sampler(), latent, 1).result[2] == expected_bytes(7)
    assert sample(plain(), sampler(), start=latent["samples"], mask=mask, sigmas=TWO_STEPS).shape[2] == 7


# -- reservation ----------------------------------------------------------------------------------------------

@pytest.fixture
def asked(monkeypatch):
    """List of (memory_required, minimum_memory_required) with which models were asked for."""
    seen, load = [], mm.load_models_gpu

    def spy(models, memory_required=0, *args, minimum_memory_required=None, **kwargs):
        seen.append((memory_required, minimum_memory_required))
        return load(models, memory_required, *args, minimum_memory_required=minimum_memory_required, **kwargs)

    monkeypatch.setattr(mm, "load_models_gpu", spy)
    return seen


def estimate(frames):
    """ComfyUI's own estimate for so many latent frames."""
    conds = {"positive": [{"cross_attn": text()[0][0]}]}
    return comfy.sampler_helpers.estimate_memory(plain(), [1, 16, frames, *hostkit.SIZE], conds)


WAYS = {
    "our guider": lambda: guider(plain()),
    "our loader, core's guider": lambda: basic_guider(prepared(plain(), 5.0)),
    "our loader, our guider": lambda: guider(prepared(plain(), 5.0)),
    "our loader twice, our guider": lambda: guider(prepared(prepared(plain(), 5.0), 8.0)),
}


@pytest.mark.parametrize("way", WAYS)
def test_stores_are_reserved_once_and_activations_for_one_block(asked, way):
    """ComfyUI estimates activations of the whole clip and knows no stores: models would be unloaded for nothing, and
    the stores would not fit. Both wrappers together must not reserve twice."""
    sample(WAYS[way](), sampler(), 12, sigmas=TWO_STEPS)
    stores = 294_912  # 2 layers x 12 frames x 6 tokens x 256 x 4 bytes, keys and values
    assert asked == [tuple(pytest.approx(activations + stores, abs=1) for activations in estimate(3))]
    assert "memory_required" not in vars(plain().model)


def test_without_our_nodes_nothing_is_reserved(asked):
    """Shows that the test above can fail."""
    sample(basic_guider(plain()), sampler(), 12, sigmas=TWO_STEPS)
    assert asked[0][1] == pytest.approx(estimate(12)[1], abs=1)


def test_reservation_counts_both_sides_of_guidance(asked):
    sample(guider(plain(), text(1), text(2), cfg=3.0), sampler(), 6, sigmas=TWO_STEPS)
    sample(guider(plain(), text(1), text(2), cfg=1.0), sampler(), 6, sigmas=TWO_STEPS)
    assert asked[0][1] - asked[1][1] == pytest.approx(expected_bytes(6), abs=1)


def test_reservation_ends_with_the_preparation(monkeypatch):
    """Also when loading fails: otherwise every later estimate of this model would be too high."""
    def fail(*args, **kwargs):
        raise RuntimeError("no room")

    before = plain().model.memory_required([1, 16, 3, *hostkit.SIZE])
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no room"):
        patch.setattr(mm, "load_models_gpu", fail)
        sample(guider(plain()), sampler(), 6)
    assert "memory_required" not in vars(plain().model)
    assert plain().model.memory_required([1, 16, 3, *hostkit.SIZE]) == before
    ticks = []
    sample(guider(plain()), sampler(), 6, on_tick=lambda *_: ticks.append("memory_required" in vars(plain().model)))
    assert ticks and not any(ticks)


def test_other_samplers_are_left_alone(asked):
    """A MODEL from our loader with an ordinary sampler: ComfyUI's own numbers."""
    euler = comfy.samplers.ksampler("euler")
    sample(guider(prepared(plain(), 5.0)), euler, 12, sigmas=TWO_STEPS)
    assert asked[0][1] == pytest.approx(estimate(12)[1], abs=1)


def test_users_model_and_guider_are_not_changed():
    """Wrappers are added to copies: a MODEL used elsewhere must not carry ours."""
    model = plain()
    guide = guider(model)
    sample(guide, sampler(), 3, sigmas=TWO_STEPS)
    assert not model.model_options["transformer_options"].get("wrappers")
    wrappers = guide.model_options["transformer_options"]["wrappers"]
    assert {kind for kind, by_key in wrappers.items() if by_key} == {"outer_sample"}


class Device:
    """A pretended GPU: so much free memory, and what was done to get more."""

    def __init__(self, monkeypatch, free):
        self.free, self.done = free, []
        monkeypatch.setattr(mm, "is_device_cpu", lambda device: False)
        monkeypatch.setattr(mm, "get_free_memory", lambda *args: self.free)
        monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 100)
        monkeypatch.setattr(mm, "free_memory",
                            lambda needed, device, keep_loaded=(): self.done.append(("others", needed)))
        monkeypatch.setattr(type(plain()), "partially_unload",
                            lambda patcher, device, missing: self.done.append(("weights", missing)))


@pytest.mark.parametrize(("free", "done"), [(2000, []), (600, [("others", 1100), ("weights", 500)])])
def test_room_is_made_where_nothing_was_reserved(monkeypatch, free, done):
    """Core's guider with a MODEL from core's loader: other models go first, then part of the weights."""
    device = Device(monkeypatch, free)
    host_memory.make_room(basic_guider(plain()), 1000)
    assert device.done == done


def test_room_is_not_made_twice(monkeypatch):
    """After a reservation the room is there, even if it does not look so to a caching allocator."""
    device, guide = Device(monkeypatch, 600), guider(plain())
    host_memory.add_wrapper_with_key(host_memory.WrappersMP.PREPARE_SAMPLING, host_memory.KEY, None, guide.model_options,
                              is_model_options=True)
    host_memory.make_room(guide, 1000)
    assert device.done == []


# -- nothing stays --------------------------------------------------------------------------------------------

def alive(seen):
    gc.collect()
    return [ref() for held in seen for ref in held.refs if ref() is not None]


def end_well():
    sample(plain(), sampler(), 6, sigmas=TWO_STEPS)


def end_in_an_error():
    def fail(step, x0):
        if step == 2:
            raise ValueError("previewer broke")

    with pytest.raises(ValueError, match="previewer broke"):
        sample(plain(), sampler(), 6, sigmas=TWO_STEPS, on_tick=fail)


def end_by_interrupt():
    with pytest.raises(mm.InterruptProcessingException):
        sample(plain(), sampler(), 6, sigmas=TWO_STEPS, on_tick=lambda *_: mm.interrupt_current_processing())


def end_kept():
    how = sampler(keep_on_interrupt=True)

    def stop(step, x0):
        if step == 3:
            mm.interrupt_current_processing()

    assert sample(plain(), how, 9, sigmas=TWO_STEPS, on_tick=stop).shape[2] == 3


def end_refused():
    model = plain().clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = _nan
    with pytest.raises(ForcingError, match="NaN"):
        sample(model, sampler(), 6, sigmas=TWO_STEPS)


def _nan(attention, q, k, v, *args, **kwargs):
    return torch.full_like(q, torch.nan)


@pytest.mark.parametrize("end", [end_well, end_in_an_error, end_by_interrupt, end_kept, end_refused])
def test_stores_die_with_the_run(monkeypatch, end):
    """Core's rule: no tensors that outlive the run. Guards references from wrappers, closures and tracebacks."""
    seen = hostkit.watch_stores(monkeypatch)
    end()
    assert seen and alive(seen) == []
    assert torch.isfinite(sample(plain(), sampler(), 3, sigmas=TWO_STEPS)).all()


def test_stores_live_during_the_run(monkeypatch):
    """Shows that the test above can fail."""
    seen, counts = hostkit.watch_stores(monkeypatch), []
    how = CausalSampler(RolloutOptions())
    sample(plain(), how, 6, sigmas=TWO_STEPS, on_tick=lambda *_: counts.append(len(alive(seen[-1:]))))
    assert counts[:4] == [1 + tiny.LAYERS] * 4


def test_stores_are_freed_before_the_error_is_told(monkeypatch):
    """The error's traceback keeps frames alive while ComfyUI reports it; the buffers must be gone by then."""
    seen = hostkit.watch_stores(monkeypatch)

    def fail(step, x0):
        raise ValueError("previewer broke")

    with pytest.raises(ValueError) as error:
        sample(plain(), sampler(), 6, sigmas=TWO_STEPS, on_tick=fail)
    assert error.value.__cause__ is None  # not its own cause: such a cycle keeps the frames until a collection
    assert alive(seen) == []
