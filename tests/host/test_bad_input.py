"""Graphs that cannot work are refused with the way out, before the network runs; and runs that end early."""
import logging
import re
from types import SimpleNamespace

import comfy.hooks
import comfy.model_management as mm
import pytest
import torch
from comfy.ldm.wan.model import HumoWanModel, SCAILWanModel
from comfy.ldm.wan.model_animate import AnimateWanModel
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.nodes.cache import ForcingPlanView
from forcing_pack.nodes.host_memory import shape_of
from forcing_pack.nodes.latents import ForcingEmptyLatent, ForcingExtend
from forcing_pack.nodes.sampler import CausalSampler
from forcing_pack.nodes.sampling import ForcingPreset, ForcingSigmas
from forcing_testkit import hostkit
from forcing_testkit.hostkit import SIGMAS, TWO_STEPS, basic_guider, guider, plain, run, sample, sampler, text

GUIDERS = {"our guider": guider, "core's guider": basic_guider}


@pytest.fixture(autouse=True)
def nobody_interrupts():
    yield
    mm.interrupt_current_processing(False)


def refused(match, source, how=None, frames=6, model=None, **settings):
    """The run raises ForcingError with `match` in it, and the network was not called."""
    with hostkit.forwards(model or plain()) as calls, pytest.raises(ForcingError, match=match):
        sample(source, how or sampler(), frames, **settings)
    assert calls == []


@pytest.fixture(params=GUIDERS)
def guide(request):
    """guide(model): a guider of each kind; both have to refuse."""
    return GUIDERS[request.param]


# -- models ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [HumoWanModel, SCAILWanModel, AnimateWanModel])
def test_other_wan_models(kind):
    """Guards networks with a forward of their own running as if they were plain ones."""
    net = kind.__new__(kind)  # its class is all that is looked at
    torch.nn.Module.__init__(net)
    with pytest.raises(ForcingError, match=f"This model is a {kind.__name__}.*run over plain Wan 2.1.*VACE.*Load a causal"):
        shape_of(SimpleNamespace(diffusion_model=net), (1, 16, 3, 4, 4))


def test_networks_that_are_no_wan_at_all():
    with pytest.raises(ForcingError, match="This model is a Linear.*Load a causal"):
        shape_of(SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)), (1, 16, 3, 4, 4))


# -- latents --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("shape", "words"), [
    ((1, 16, 4, 6), "Use Forcing Empty Latent"),
    ((1, 8, 6, 4, 6), "8 channels but this model works on 16.*VAE of the same model family"),
    ((1, 16, 6, 5, 6), "divisible by 16"),
    ((1, 16, 6, 4, 7), "7x4 .56x32 pixels.*divisible by 16"),
])
def test_latents_the_network_cannot_take(guide, shape, words):
    refused(words, guide(plain()), start=torch.zeros(shape))


@pytest.mark.parametrize(("width", "height", "words"), [
    (830, 480, "width of 816 or 832"), (832, 481, "height of 480 or 496"), (100, 100, "width of 96 or 112")])
def test_sizes_off_the_grid_name_their_neighbours(width, height, words):
    with pytest.raises(ForcingError, match=words):
        ForcingEmptyLatent.execute(width, height, 6, "latent frames", 3, 1)


@pytest.mark.parametrize(("length", "unit", "words"), [
    (7, "latent frames", "Use 6 or 9"), (2, "latent frames", "Use 3 or 6"), (20, "frames of video", "Use 9 or 21")])
def test_lengths_off_the_block_grid_name_their_neighbours(length, unit, words):
    with pytest.raises(ForcingError, match=words):
        ForcingEmptyLatent.execute(64, 64, length, unit, 3, 1)


def test_frames_off_the_block_grid(guide):
    """Core's sampler shortens the last block without a word; most models were never trained on that."""
    refused(r"Use 6 latent frames \(21 frames of video\) or 9 latent frames \(33 frames of video\)", guide(plain()),
            frames=7)


def test_frames_off_the_grid_count_from_the_given_ones(guide):
    mask = torch.ones(1, 1, 6, 1, 1)
    mask[:, :, :1] = 0
    refused("6 latent frames .1 of them given.*Use 4 latent frames .*or 7 latent frames", guide(plain()), mask=mask)


def test_nothing_to_generate(guide):
    refused("at least 1 more frame", guide(plain()), mask=torch.zeros(1, 1, 6, 1, 1))


def masks():
    half, middle, soft = (torch.ones(1, 1, 6, 4, 6) for _ in range(3))
    half[:, :, 0, :2] = 0
    middle[:, :, 3] = 0
    soft[:, :, 0] = 0.3
    return {"half a frame": half, "frames in the middle": middle, "half strength": soft}


@pytest.mark.parametrize("name", masks())
def test_masks_that_are_not_leading_frames(guide, name):
    """Core's AR sampler fails on any mask with a shape error (B5)."""
    refused("Use Forcing Start Image or Forcing Extend", guide(plain()), mask=masks()[name])


def test_start_latent_of_another_size(guide):
    """ARVideoI2V's model with the latent of another node."""
    model = plain().clone()
    model.model_options["transformer_options"]["ar_config"] = {"initial_latent": torch.zeros(1, 16, 1, 6, 6)}
    refused("differ in size. Connect the LATENT of the same", guide(model), frames=7)


def test_extending_a_picture():
    with pytest.raises(ForcingError, match="Connect a causal sampler's output"):
        ForcingExtend.execute({"samples": torch.zeros(1, 16, 4, 6)}, 1.0, "seconds", 3)


# -- schedules ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sigmas", [(1.0, 0.5), (0.5, 1.0, 0.0), (1.0, 0.5, 0.5, 0.0), (14.6, 1.0, 0.0), (0.0,)])
def test_sigmas_that_are_no_descent_to_zero(guide, sigmas):
    """Core's sampler ends in a shape error when the last sigma is not 0 (B5)."""
    refused("Connect the SIGMAS output of Forcing Preset or Forcing Sigmas", guide(plain()), sigmas=sigmas)


@pytest.mark.parametrize("sigmas", [(1.0, 0.5, 0.0), (1.0, 0.9, 0.8, 0.6, 0.0)])
def test_sigmas_of_another_system(guide, sigmas):
    """Few-step models only know their own noise levels; anything else looks washed out."""
    how = ForcingPreset.execute("self-forcing").result[0]
    refused("are not those of Self Forcing.*same Forcing Preset", guide(plain()), how, sigmas=sigmas)


def test_step_list_in_words():
    with pytest.raises(ForcingError, match="Write for example 1000, 750, 500, 250"):
        ForcingSigmas.execute("custom", "many", "", 5.0, True)


def test_positions_past_the_table(guide):
    refused("positions to 'relative' or 'rebased'", guide(plain()), sampler(block=1), frames=1025)


# -- other nodes ----------------------------------------------------------------------------------------------

HELPERS = {
    "Context windows": lambda model: ContextWindowsManualNode.execute(
        model, 4, 1, "standard_static", 1, False, "pyramid", 2, False).result[0],
    "EasyCache": lambda model: EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).result[0],
    "LazyCache": lambda model: LazyCacheNode.execute(model, 0.2, 0.15, 0.95, False).result[0],
}


@pytest.mark.parametrize("name", HELPERS)
def test_helpers_that_would_leave_holes_in_memory(guide, name):
    """A skipped forward is a frame that later blocks do not see; in core's AR mode EasyCache silently does nothing."""
    refused(f"{name}.*Remove the", guide(HELPERS[name](plain())))


@pytest.mark.parametrize("extra", [{"area": (2, 4, 0, 0), "strength": 1.0}, {"area": (3, 4, 6, 0, 0, 0)}])
def test_conditions_for_a_part_of_the_video(guide, extra):
    """The tokens of a cut-out would be written over those of the whole frame."""
    refused("Remove the area from the conditioning", guide(plain(), [[text()[0][0], extra]]))


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.5, 1.0)])
def test_conditions_for_a_part_of_the_steps(guide, start, end):
    """ComfyUI leaves such a condition out of the clean pass or of the first steps: its store would have holes."""
    cond = [[text()[0][0], {"start_percent": start, "end_percent": end}]]
    refused("Remove the timestep range", guide(plain(), cond + text(1)))


def scheduled(*strengths):
    """A condition with a LoRA whose strength changes at parts of the steps."""
    hooks = comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for n, strength in enumerate(strengths):
        frames.add(comfy.hooks.HookKeyframe(strength, start_percent=n / len(strengths)))
    hooks.set_keyframes_on_hooks(frames)
    return [[text()[0][0], {"hooks": hooks}]]


def test_loras_for_a_part_of_the_steps(guide):
    """ComfyUI never goes back to an earlier strength, but every block goes through all steps again."""
    refused("strength changes over the steps.*Remove the hook keyframes", guide(plain(), scheduled(1.0, 0.5)))
    assert torch.equal(sample(guider(plain(), scheduled(0.5)), sampler()), sample(plain(), sampler()))


def test_conditions_for_everything_are_taken():
    """A full area and a full range of steps are what some nodes always write."""
    whole = [[text()[0][0], {"area": (4, 6, 0, 0), "start_percent": 0.0, "end_percent": 1.0}]]
    assert torch.equal(sample(guider(plain(), whole), sampler()), sample(plain(), sampler()))


@pytest.mark.parametrize(("extra", "name"), [
    ({"clip_vision_output": SimpleNamespace(penultimate_hidden_states=torch.zeros(1, 257, 1280))}, "clip_fea"),
    ({"time_dim_concat": torch.zeros(1, 16, 1, *hostkit.SIZE)}, "time_dim_concat")])
def test_conditioning_that_would_be_ignored(guide, extra, name):
    """Phantom subjects and CLIP vision would silently have no effect."""
    refused(f"{name}.*Connect plain text conditioning", guide(plain(), [[text()[0][0], extra]]))


class Nested(CausalSampler):
    """Starts another rollout on the same run's options in the middle of its own."""

    def sample(self, model_wrap, sigmas, extra_args, callback, *args, **kwargs):
        def start(*ignored):
            super(Nested, self).sample(model_wrap, sigmas, extra_args, None, *args, **kwargs)
        return super().sample(model_wrap, sigmas, extra_args, start, *args, **kwargs)


def test_second_run_on_the_same_options_while_one_is_active():
    """Two rollouts behind one wrapper would write into each other's stores."""
    with pytest.raises(ForcingError, match="Wait until it is done, or interrupt it"):
        sample(plain(), Nested(sampler().rollout))


class Twice(CausalSampler):
    """One rollout after the other, as samplers that refine do."""

    def sample(self, *args, **kwargs):
        first = super().sample(*args, **kwargs)
        assert torch.equal(super().sample(*args, **kwargs), first)
        return first


def test_second_run_on_the_same_options_after_the_first():
    """Guards a finished run that still counts as active, or whose wrapper answers for the second one."""
    assert torch.equal(sample(plain(), Twice(sampler().rollout)), sample(plain(), sampler()))


def test_plan_view_of_another_sampler():
    import comfy.samplers

    with pytest.raises(ForcingError, match="Connect Forcing Preset or Forcing Sampler"):
        ForcingPlanView.execute(plain(), comfy.samplers.ksampler("euler"), {"samples": hostkit.latent(6)}, 1)


def test_guidance_on_a_distilled_model_warns_and_runs(caplog):
    """Not wrong, only rarely wanted: twice the time, burnt colours."""
    how, sigmas = ForcingPreset.execute("self-forcing").result
    sigmas = tuple(sigmas.tolist())
    with caplog.at_level(logging.WARNING):
        result = sample(guider(plain(), text(1), text(2), cfg=3.0), how, sigmas=sigmas)
        assert "Set cfg to 1" in caplog.text and torch.isfinite(result).all()
        caplog.clear()
        sample(guider(plain(), text(1), text(2), cfg=1.0), how, sigmas=sigmas)
        teacher, sigmas = ForcingPreset.execute("causal-forcing-ar-teacher-chunkwise").result
        sample(guider(plain(), text(1), text(2), cfg=3.0), teacher, 3, sigmas=tuple(sigmas.tolist()))
        assert "cfg" not in caplog.text


# -- runs that end early --------------------------------------------------------------------------------------

def in_block(number, action):
    """MODEL in which self-attention of block `number` (1, 2 ... of 3 frames) and later ones does `action`."""
    model, frame = plain().clone(), 6

    def override(attention, q, k, v, *args, **kwargs):
        if k.shape[1] != 512 and k.shape[1] > 3 * frame * (number - 1):
            return action(q)
        return attention(q, k, v, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def nan(q):
    return torch.full_like(q, torch.nan)


def out_of_memory(q):
    raise mm.OOM_EXCEPTION("CUDA out of memory. Tried to allocate 2.00 GiB")


def out_of_ram(q):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory")


FAILURES = {nan: "NaN or infinite.*bf16", out_of_memory: "[0-9] GB.*smaller window",
            out_of_ram: "[0-9] GB.*smaller window"}


@pytest.mark.parametrize("failure", FAILURES)
def test_failure_in_a_later_block_returns_the_finished_ones(caplog, failure):
    """Minutes of finished video must not be lost to the last block."""
    expected = sample(plain(), sampler(), 9)
    with caplog.at_level(logging.ERROR):
        result = sample(in_block(3, failure), sampler(), 9)
    assert torch.equal(result, expected[:, :, :6])
    assert "Stopped after 2 of 3 blocks" in caplog.text and re.search(FAILURES[failure], caplog.text)


@pytest.mark.parametrize("failure", FAILURES)
def test_failure_in_the_first_block_is_explained(failure):
    """Nothing to save: the user needs the numbers and the fix, not a stack of torch frames."""
    with pytest.raises(ForcingError, match=FAILURES[failure]):
        sample(in_block(1, failure), sampler(), 6)
    assert torch.isfinite(sample(plain(), sampler(), 3)).all()


def test_given_frames_are_not_a_finished_block():
    """A failure in the first generated block must not return the start alone as if it were a video."""
    mask = torch.ones(1, 1, 6, 1, 1)
    mask[:, :, :3] = 0
    with pytest.raises(ForcingError, match="NaN"):
        sample(in_block(2, nan), sampler(), start=torch.ones(1, 16, 6, *hostkit.SIZE), mask=mask)


def test_other_errors_are_not_swallowed():
    """A bug in somebody's patch is not a reason to return half a video."""
    def bug(q):
        raise KeyError("patch")

    with pytest.raises(KeyError, match="patch"):
        sample(in_block(2, bug), sampler(), 6)


def interrupt_at(step):
    def tick(now, x0):
        if now == step:
            mm.interrupt_current_processing()
    return tick


@pytest.mark.parametrize("step", [0, 5])
def test_interrupt_stops_before_the_next_forward(step):
    """Cancel must not wait for the block."""
    with hostkit.forwards(plain()) as calls, pytest.raises(mm.InterruptProcessingException):
        sample(plain(), sampler(), 9, on_tick=interrupt_at(step))
    assert len(calls) == step + 1
    assert torch.isfinite(sample(plain(), sampler(), 3)).all()


def test_interrupt_stops_within_a_forward():
    """One forward of a 14B model takes seconds: every layer checks."""
    layers = []

    def cancel(q):
        layers.append(1)
        mm.interrupt_current_processing()
        return q

    with pytest.raises(mm.InterruptProcessingException):
        sample(in_block(1, cancel), sampler(), 6)
    assert len(layers) == 1


def test_interrupt_can_keep_the_finished_blocks():
    """Step 11 is the second one of block 3 (4 steps, then 1 + 4 for every further block)."""
    how = sampler(keep_on_interrupt=True)
    result = sample(plain(), how, 9, on_tick=interrupt_at(11))
    assert torch.equal(result, sample(plain(), sampler(), 9)[:, :, :6])
    assert sample(plain(), how, 9).shape[2] == 9


def test_interrupt_in_the_first_block_has_nothing_to_keep():
    with pytest.raises(mm.InterruptProcessingException):
        sample(plain(), sampler(keep_on_interrupt=True), 9, on_tick=interrupt_at(1))


def test_progress_counts_every_forward_and_shows_the_newest_frame():
    """Core reports 12 forwards as 4 and previews the first frame of a block; the last tick carries the whole video,
    which is what SamplerCustomAdvanced gives out as denoised_output."""
    clip = run(plain(), sampler(), 9)
    with hostkit.forwards(plain()) as calls:
        run(plain(), sampler(), 9)
    assert len(calls) == 4 + 5 + 5
    assert [(step, total) for step, total, _ in clip.ticks] == [(step, 14) for step in range(14)]
    assert {shape[2] for _, _, shape in clip.ticks[:-1]} == {1} and clip.ticks[-1][2][2] == 9


def test_progress_of_a_shortened_run_still_ends():
    clip = run(in_block(2, nan), sampler(), 6)
    assert clip.ticks[-1] == (8, 9, (1, 16, 3, *hostkit.SIZE)) and len(SIGMAS) == 5


def test_partial_denoising_starts_from_the_latents():
    """Sigmas below 1 (video to video): noise is mixed in, not put in place of the latents."""
    start = torch.randn(1, 16, 6, *hostkit.SIZE, generator=torch.Generator().manual_seed(3))
    result = sample(plain(), sampler(), start=start, sigmas=(0.1, 0.0))
    other = sample(plain(), sampler(), start=start, sigmas=TWO_STEPS)
    assert hostkit.relative(result, start) < 0.5 < hostkit.relative(other, start)
