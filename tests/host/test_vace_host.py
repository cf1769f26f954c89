"""VACE beside a causal checkpoint: the sliced control, the memory of its blocks, and the loader that joins two files."""
import pytest
import torch
from forcing_pack.forcing_core.conditioning import Held, Streamed
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.nodes.host_conditioning import SOURCES
from forcing_pack.nodes.host_memory import announced_bytes, element_size, shape_of
from forcing_testkit import densekit, hostkit, tiny
from forcing_testkit.hostkit import SIZE, TWO_STEPS, guider, sample, sampler, text
from forcing_testkit.tiny_vace import vace_state
from safetensors.torch import save_file

FRAMES = 9
EXACT = {"block": 3, "noise": "comfy"}  # with which the time embedding is computed as ComfyUI computes it


@pytest.fixture(scope="module", params=[1, 2], ids=["a block behind layer 0", "a block behind every layer"])
def model(request):
    return hostkit.load(hostkit.weights() | vace_state(request.param))


def control(frames=FRAMES, seed=0):
    """Keys that WanVaceToVideo sets: latents of what stays and of what changes, and the mask."""
    draw = torch.Generator().manual_seed(300 + seed)
    mask = (torch.rand(1, 64, FRAMES, *SIZE, generator=draw) > 0.5).float()
    return torch.randn(1, 32, FRAMES, *SIZE, generator=draw)[:, :, :frames], mask[:, :, :frames]


def controlled(*controls, strengths=None):
    """Conditioning with these controls."""
    values = {"vace_frames": [latents for latents, _ in controls], "vace_mask": [mask for _, mask in controls],
              "vace_strength": strengths or [0.8] * len(controls)}
    return [[text()[0][0], values]]


def whole(model, condition):
    """What ComfyUI hands to its forward for the whole video."""
    values = condition[0][1]
    made = model.model.extra_conds(noise=torch.zeros(1, 16, FRAMES, *SIZE), device="cpu", **values)
    return {"context": condition[0][0], "vace_context": made["vace_context"].cond, "vace_strength": made["vace_strength"].cond}


def first_frames(given, frames):
    return {**given, "vace_context": given["vace_context"][:, :, :, :frames]}


@pytest.mark.parametrize("contexts", [1, 2])
def test_a_rollout_equals_the_stock_model_under_a_dense_mask(model, contexts, monkeypatch):
    """Guards slices, the memory of the control blocks in clean passes, their order in the store, strengths."""
    seen = densekit.watch_forwards(monkeypatch)
    condition = controlled(*(control(seed=s) for s in range(contexts)), strengths=[0.8, -0.4][:contexts])
    sample(guider(model, condition), sampler(**EXACT), FRAMES, sigmas=TWO_STEPS)
    assert len([call for call in seen if call[0] == "noisy"]) == 6
    given = whole(model, condition)
    assert densekit.largest_gap(model, seen, given, first_frames) <= 1e-5
    off = {**given, "vace_strength": [0.0] * contexts}
    assert densekit.largest_gap(model, seen, off, first_frames) > 1e-2  # the control matters


def test_the_first_block_needs_only_its_own_control(model):
    long = sample(guider(model, controlled(control())), sampler(), FRAMES, sigmas=TWO_STEPS)
    short = sample(guider(model, controlled(control(3))), sampler(), 3, sigmas=TWO_STEPS)
    assert torch.equal(long[:, :, :3], short)
    latents, mask = control()
    latents = torch.cat([latents[:, :, :3], -latents[:, :, 3:]], dim=2)
    other = sample(guider(model, controlled((latents, mask))), sampler(), FRAMES, sigmas=TWO_STEPS)
    assert torch.equal(other[:, :, :3], short) and hostkit.relative(other[:, :, 3:6], long[:, :, 3:6]) > 1e-2


def test_a_long_rollout_under_a_window_and_guidance(model):
    """Guards against stores that are settled too early or mixed between the sides, and control that ends before the video."""
    cache = WindowOptions(window=6, sink=1, positions="relative")
    same = controlled(control())
    guide = guider(model, same, [[text(2)[0][0], same[0][1]]], cfg=2.0)
    made = sample(guide, sampler(cache=cache), 15, sigmas=TWO_STEPS)
    assert torch.isfinite(made).all()
    held = [torch.cat([t, t[:, :, -1:].expand(-1, -1, 6, -1, -1)], dim=2) for t in control()]
    longer = controlled(tuple(held))
    guide = guider(model, longer, [[text(2)[0][0], longer[0][1]]], cfg=2.0)
    assert torch.equal(made, sample(guide, sampler(cache=cache), 15, sigmas=TWO_STEPS))


def test_streamed_control_is_asked_for_once_and_in_order(model):
    """The same video as from tensors, though nothing holds the whole control."""
    condition = controlled(control())
    expected = sample(guider(model, condition), sampler(), FRAMES, sigmas=TWO_STEPS)
    context, asked = Held(whole(model, condition)["vace_context"], 3), []

    def make(first, count):
        asked.append((first, count))
        return context.read(first, count)

    streamed = [[text()[0][0], {SOURCES: {"vace_context": Streamed(make, FRAMES)}, "vace_strength": [0.8]}]]
    assert torch.equal(sample(guider(model, streamed), sampler(), FRAMES, sigmas=TWO_STEPS), expected)
    assert asked == [(0, 3), (3, 3), (6, 3)]


def test_bytes_are_those_of_all_layers(model, monkeypatch):
    seen = hostkit.watch_stores(monkeypatch)
    condition = controlled(control(), control(seed=1))
    guide = guider(model, condition)
    sample(guide, sampler(), FRAMES, sigmas=TWO_STEPS)
    guide.conds = {"positive": [condition[0][1]]}
    shape = shape_of(model.model, (1, 16, FRAMES, *SIZE), guide)
    assert shape.layers == tiny.LAYERS + 2 * len(model.model.diffusion_model.vace_blocks)
    assert max(held.nbytes for held in seen) == announced_bytes(sampler().rollout, shape, element_size(model))


def test_conditions_with_different_numbers_of_controls_are_refused(model):
    one, two = controlled(control()), controlled(control(), control(seed=1))
    with pytest.raises(ForcingError, match="1 and 2 VACE controls.*same WanVaceToVideo"):
        sample(guider(model, one, two, cfg=2.0), sampler(), FRAMES, sigmas=TWO_STEPS)


def test_control_on_a_checkpoint_without_its_blocks_is_refused():
    """ComfyUI would pass over it in silence."""
    with pytest.raises(ForcingError, match="no VACE blocks.*vace in Forcing Load Checkpoint"):
        sample(guider(hostkit.plain(), controlled(control())), sampler(), 3, sigmas=TWO_STEPS)


# -- the loader ------------------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files as users have them: a causal checkpoint, and a VACE model with other weights of its own."""
    import folder_paths

    tiny.tiny_wan(tmp_path / "causal.safetensors")
    other = {name: tensor + 1 for name, tensor in hostkit.weights().items()}
    save_file({**other, **vace_state()}, tmp_path / "vace.safetensors")
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda folder, name: str(tmp_path / name))
    return tmp_path


def joined(vace):
    from forcing_pack.nodes.loading import ForcingLoadCheckpoint

    return ForcingLoadCheckpoint.execute("causal.safetensors", "self-forcing", "auto", "default", "none", 1.0, vace).result[0]


def test_the_loader_joins_the_control_blocks_of_another_file(files):
    made, control_blocks = joined("vace.safetensors").model.diffusion_model.state_dict(), vace_state()
    assert type(joined("vace.safetensors").model.diffusion_model).__name__ == "VaceWanModel"
    assert all(torch.equal(made[name], tensor) for name, tensor in {**hostkit.weights(), **control_blocks}.items())
    assert type(joined("none").model.diffusion_model).__name__ == "WanModel"


@pytest.mark.parametrize(("state", "match"), [
    (lambda: hostkit.weights(), "has no VACE blocks. Choose a Wan 2.1 VACE model"),
    (lambda: {**vace_state(), "vace_patch_embedding.weight": torch.zeros(128, 96, 1, 2, 2)}, "VACE model of the same size"),
])
def test_files_that_do_not_fit_are_refused(files, state, match):
    save_file(dict(state()), files / "other.safetensors")
    with pytest.raises(ForcingError, match=match):
        joined("other.safetensors")
