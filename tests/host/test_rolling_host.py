"""The rolling rollout inside ComfyUI: the numbers of the standalone one, its progress, memory and previews."""
import comfy.latent_formats
import comfy.sampler_helpers
import pytest
import torch
from forcing_pack.forcing_core import plan_view
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.options import RolloutOptions, blocks_of, levels_from
from forcing_pack.forcing_core.policies import RollingOptions
from forcing_pack.forcing_core.rollout import rolling_rollout
from forcing_pack.forcing_core.standalone import make_denoiser
from forcing_pack.forcing_core.wan import WanConfig, WanModel
from forcing_pack.nodes import host, host_memory
from forcing_pack.nodes.cache import ForcingPlanView
from forcing_pack.nodes.sampler import CausalSampler
from forcing_pack.nodes.sampling import ForcingPreset
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import plain, relative, sample, text

SYSTEMS = {"rolling-forcing": 5, "causal-forcing-longvideo": 4}
THREE = (1.0, 0.9, 0.6, 0.0)


def small(**changes):
    """Options in which three steps of two frames roll through a window of nine."""
    cache = RollingOptions(window=9, sink=2, **changes.pop("cache", {}))
    return RolloutOptions(block=2, cache=cache, **changes)


def standalone(options, frames, sigmas, texts=None, guidance=1.0, batch=1, given=None, noise=None):
    """The same rollout without ComfyUI. given: latents in the graph's scale."""
    net = WanModel(WanConfig(dim=tiny.DIM, ffn_dim=tiny.FFN_DIM, heads=hostkit.HEADS, layers=tiny.LAYERS))
    net.load_state_dict({name: tensor.float() for name, tensor in hostkit.weights().items()})
    form = comfy.latent_formats.Wan21()
    given = None if given is None else form.process_in(given)
    contexts = [cond[0][0].expand(batch, -1, -1) for cond in texts or [text()]]
    denoiser = make_denoiser(net.eval(), options.cache, frames, hostkit.SIZE, contexts, guidance)
    parts = [] if given is None else [given]
    with torch.no_grad(), hostkit.one_thread():
        parts += [x0 for _, x0 in rolling_rollout(
            denoiser, blocks_of(frames, 0 if given is None else given.shape[2], options),
            levels_from(sigmas, options.timesteps), noise or BlockNoise(3, (batch, tiny.CHANNELS), hostkit.SIZE),
            context=given, block=options.block)]
    return form.process_out(torch.cat(parts, dim=2))


def start(frames, batch=1, whole=11):
    """(latent, noise mask) of a video of `whole` frames whose first `frames` are given."""
    latent = torch.randn(batch, 16, whole, *hostkit.SIZE, generator=torch.Generator().manual_seed(21))
    mask = torch.ones(batch, 1, whole, 1, 1)
    mask[:, :, :frames] = 0
    return latent, mask


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_preset_gives_what_it_gives_without_comfyui(system):
    """From the node to the latents, past the warm-up: guards the levels of every frame of a joint pass, of which
    ComfyUI knows nothing."""
    made, sigmas = ForcingPreset.execute(system).result
    steps, blocks = SYSTEMS[system], SYSTEMS[system] + 3
    assert made.rollout.cache == RollingOptions(positions="rebased") and len(sigmas) == steps + 1
    with hostkit.forwards(plain()) as seen:
        clip = hostkit.run(plain(), made, 3 * blocks, sigmas=sigmas.tolist())
    assert relative(clip.latents, standalone(made.rollout, 3 * blocks, sigmas.tolist())) <= 1e-5
    assert [shape[2] for shape in seen][:steps] == [3 * n for n in range(1, steps + 1)]
    assert len(seen) == len(clip.ticks) == (blocks + steps - 1) + (blocks - 1)
    assert {total for _, total, _ in clip.ticks} == {len(seen)}


def test_guidance_a_batch_and_given_frames():
    """Every side has a store of its own, every sample its prompt, and positions go on after three given frames."""
    latent, mask = start(3, batch=2)
    guide = hostkit.guider(plain(), text(4, batch=2), text(2), cfg=2.0)
    clip = hostkit.run(guide, CausalSampler(small()), start=latent, mask=mask, batch=2, sigmas=THREE)
    expected = standalone(small(), 11, THREE, [text(4, batch=2), text(2)], 2.0, 2, latent[:, :, :3])
    assert relative(clip.latents, expected) <= 1e-4
    assert relative(clip.latents[:, :, :3], latent[:, :, :3]) <= 1e-6
    assert clip.ticks[-1][:2] == (2 + 6 + 3 - 1, 2 + 6 + 3)  # given chunks, windows, clean passes


def test_two_positive_conditions_are_averaged():
    result = sample(hostkit.guider(plain(), text(1) + text(2)), CausalSampler(small()), 8, sigmas=THREE)
    assert relative(result, standalone(small(), 8, THREE, [text(1), text(2)], 0.5)) <= 1e-4


def test_guidance_functions_see_every_frames_own_x0():
    """Nodes that change guidance work on x0: that of a frame at 0.6 must not be computed with the sigma of another
    frame of the window."""
    model, seen = plain().clone(), []
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args["denoised"]) or args["denoised"])
    result = sample(model, CausalSampler(small()), 8, sigmas=THREE)
    finished = [x0[:, :, :2] for x0 in seen if x0.shape[2] > 2]  # the oldest block of the last window of each block
    wanted = comfy.latent_formats.Wan21().process_in(result)
    assert min(hostkit.gap(x0, wanted[:, :, 2:4]) for x0 in finished) <= 1e-5


def test_partial_denoising_starts_every_block_from_its_own_latents():
    """A joint pass at a first sigma below 1: guards the share of the other frames, which is not their sigma then."""
    sigmas, (latent, _) = (0.9, 0.6, 0.0), start(0)
    latent = latent[:, :, :10]

    class Mixed(BlockNoise):
        def initial(self, block):
            x0 = comfy.latent_formats.Wan21().process_in(latent)[:, :, block.first:block.end]
            return (1 - 0.9) * x0 + 0.9 * super().initial(block)

    result = sample(plain(), CausalSampler(small()), start=latent, sigmas=sigmas)
    expected = standalone(small(), 10, sigmas, noise=Mixed(3, (1, tiny.CHANNELS), hostkit.SIZE))
    assert relative(result, expected) <= 1e-5


def test_previews_are_of_the_block_that_is_nearly_done():
    """Not of the newest one, which is close to noise. The last preview of a block is what it becomes."""
    shown = []
    clip = hostkit.run(plain(), CausalSampler(small()), 8, sigmas=THREE, on_tick=lambda step, x0: shown.append(x0))
    wanted = comfy.latent_formats.Wan21().process_in(clip.latents)
    assert {x0.shape[2] for x0 in shown[:-1]} == {1} and hostkit.gap(shown[-1], wanted) <= 1e-5
    assert hostkit.gap(shown[2], wanted[:, :, 1:2]) <= 1e-5 and hostkit.gap(shown[4], wanted[:, :, 3:4]) <= 1e-5


def test_activations_of_a_whole_window_are_reserved(monkeypatch):
    """A joint forward is as many times larger as there are steps; reserving one block would end in out of memory."""
    asked, real = [], comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory",
                        lambda model, shape, *a, **k: asked.append(list(shape)) or real(model, shape, *a, **k))
    sample(hostkit.guider(plain()), CausalSampler(small()), 12, sigmas=THREE)
    assert [shape[2] for shape in asked] == [6]


def test_the_stores_are_as_large_as_announced(monkeypatch):
    sizes, free = [], host.HostDenoiser.free
    monkeypatch.setattr(host.HostDenoiser, "free", lambda self: sizes.append(self.nbytes) or free(self))
    sample(plain(), CausalSampler(small()), 16, sigmas=THREE)
    shape = host_memory.shape_of(plain().model, (1, 16, 16, *hostkit.SIZE))
    assert sizes == [host_memory.announced_bytes(small(), shape, 4)] == [2 * tiny.LAYERS * 11 * 6 * tiny.DIM * 4]


def test_finished_blocks_survive_a_failure(monkeypatch):
    """Three blocks of five are final when the sixth window fails."""
    whole, call = sample(plain(), CausalSampler(small()), 10, sigmas=THREE), host.HostDenoiser.__call__

    def failing(self, x, levels, first, phase):
        if (first, phase) == (6, "noisy"):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory")
        return call(self, x, levels, first, phase)

    monkeypatch.setattr(host.HostDenoiser, "__call__", failing)
    assert torch.equal(sample(plain(), CausalSampler(small()), 10, sigmas=THREE), whole[:, :, :6])


def test_the_plan_view_node_knows_the_steps_of_a_preset(monkeypatch):
    """The number of rows is that of the windows, which depends on the steps."""
    drawn, real = [], plan_view.draw
    monkeypatch.setattr(plan_view, "draw", lambda table, *a: drawn.append(table) or real(table, *a))
    for system, steps in SYSTEMS.items():
        made, _ = ForcingPreset.execute(system).result
        ForcingPlanView.execute(plain(), made, {"samples": hostkit.latent(30)}, 1)
        assert len(drawn[-1].rows) == 10 + steps - 1
