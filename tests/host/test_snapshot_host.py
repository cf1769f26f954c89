"""Snapshots inside ComfyUI: a run that was stopped and resumed gives what an uninterrupted one does."""
import json
import logging

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from comfy.samplers import KSAMPLER
from forcing_pack.forcing_core import snapshot_file
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.options import RolloutOptions
from forcing_pack.forcing_core.policies import (
    BoundedOptions,
    DeepCompressOptions,
    RecomputeOptions,
    RollingOptions,
    WindowOptions,
)
from forcing_pack.nodes import snapshot as nodes
from forcing_pack.nodes.sampler import CausalSampler
from forcing_pack.nodes.track import ForcingPromptSegment
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import TWO_STEPS, guider, plain, sample, text

FRAMES = 12
CACHES = {
    "window": WindowOptions(6, 1, 3, "relative"),
    "int8": WindowOptions(6, 1, 3, "relative", store="int8", offload=True),
    "rolling": RollingOptions(9, 3, 3),
    "bounded": BoundedOptions(slow=3, fast=3, tau=1.1),
    "deep_compress": DeepCompressOptions(6, 1, 3, budget=5, recent=3),
    "recompute": RecomputeOptions(6, 3),
}


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """ComfyUI's output folder for this test; nobody interrupts afterwards."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    yield tmp_path
    mm.interrupt_current_processing(False)


def plainly(cache=CACHES["window"], **options):
    return CausalSampler(RolloutOptions(cache=cache, **options))


def saving(how, name="a", every=2, on_stop=False):
    return nodes.ForcingSnapshot.execute(how, name, every, on_stop).result[0]


def resuming(how, name="a.safetensors"):
    return nodes.ForcingResume.execute(how, name).result[0]


def run(how, source=None, frames=FRAMES, **settings):
    return sample(source or plain(), how, frames, sigmas=TWO_STEPS, **settings)


def stop_at(step):
    def tick(now, x0):
        if now == step:
            mm.interrupt_current_processing()
    return tick


def stopped(how, step, source=None, **settings):
    """A run that the user cancels at this forward."""
    with pytest.raises(mm.InterruptProcessingException):
        run(how, source, on_tick=stop_at(step), **settings)
    mm.interrupt_current_processing(False)


@pytest.mark.parametrize("cache", CACHES.values(), ids=list(CACHES))
def test_resumed_equals_uninterrupted(cache, output):
    """With a file of two blocks, of four: guards what only the host side does (stores by condition, dtypes, scale)."""
    whole = run(plainly(cache))
    stopped(saving(plainly(cache)), 5)
    assert [path.name for path in (output / "snapshots").iterdir()] == ["a.safetensors"]
    assert torch.equal(run(resuming(plainly(cache))), whole)


def test_cancel_saves_the_last_finished_block(output):
    """In the middle of the third block the memory is no longer that of two finished ones: a copy is."""
    how = plainly(DeepCompressOptions(6, 1, 3, budget=5, recent=3))
    whole = run(how)
    for step, done in ((3, 3), (5, 6), (6, 6)):
        stopped(saving(how, every=0, on_stop=True), step)
        latents = snapshot_file.read(output / "snapshots" / "a.safetensors")[1]["latents"]
        assert latents.shape[2] == done
        assert torch.equal(run(resuming(how)), whole)


def test_guidance_batch_and_given_frames(output):
    latent = torch.randn(2, tiny.CHANNELS, 15, *hostkit.SIZE, generator=torch.Generator().manual_seed(21))
    mask = torch.ones(2, 1, 15, 1, 1)
    mask[:, :, :3] = 0
    settings = {"start": latent, "mask": mask, "batch": 2}

    def guide(cfg=2.0):
        return guider(plain(), text(4, batch=2), text(2), cfg=cfg)

    whole = run(saving(plainly(), every=3), guide(), **settings)
    assert torch.equal(run(plainly(), guide(), **settings), whole)
    assert torch.equal(run(resuming(plainly()), guide(), **settings), whole)
    with pytest.raises(ForcingError, match="2 conditions, this run has 1"):
        run(resuming(plainly()), guide(1.0), **settings)
    with pytest.raises(ForcingError, match="given 3, but this run has 0"):
        run(resuming(plainly()), guide(), start=latent, batch=2)


def test_bfloat16_weights(output):
    state = {name: weight.bfloat16() for name, weight in hostkit.weights().items()}
    model = hostkit.load(state)
    whole = run(saving(plainly(), "a%block%"), model)
    kept = sorted(path.name for path in (output / "snapshots").iterdir())
    assert kept == ["a2.safetensors", "a4.safetensors"]
    assert torch.equal(run(resuming(plainly(), kept[0]), model), whole)


def test_progress_counts_what_is_left():
    cache = {"window": 4 * 2 + 3, "rolling": 5 + 3, "recompute": 4 * 2 + 3}
    for name, forwards in cache.items():
        first = hostkit.run(plain(), saving(plainly(CACHES[name])), FRAMES, sigmas=TWO_STEPS)
        assert len(first.ticks) == forwards and first.ticks[-1][:2] == (forwards - 1, forwards)
        stopped(saving(plainly(CACHES[name]), "b"), 5)
        with hostkit.forwards(plain()) as seen:
            second = hostkit.run(plain(), resuming(plainly(CACHES[name]), "b.safetensors"), FRAMES, sigmas=TWO_STEPS)
        assert second.ticks[-1][:2] == (len(seen) - 1, len(seen)) and len(seen) < forwards
        assert torch.equal(first.latents, second.latents)


def test_branches_and_longer_videos(output, caplog):
    """Another seed or prompt from the third block on; a longer latent goes further."""
    longer = run(plainly(), frames=18)
    whole = run(saving(plainly()))
    assert torch.equal(run(resuming(plainly()), frames=18), longer)
    stopped(saving(plainly()), 8)
    with caplog.at_level(logging.INFO):
        for branch in (run(resuming(plainly()), seed=4), run(resuming(plainly()), guider(plain(), text(7)))):
            assert torch.equal(branch[:, :, :6], whole[:, :, :6])
            assert not torch.equal(branch[:, :, 6:9], whole[:, :, 6:9])
    assert "as a branch (seed 3 before)" in caplog.text and "with the same seed" in caplog.text


def test_a_resumed_run_writes_its_own(output):
    """In either order of the nodes, and again from there."""
    whole = run(plainly(), frames=18)
    stopped(saving(plainly()), 8)
    stopped(resuming(saving(plainly(), "b", every=1)), 4, frames=18)
    again = saving(resuming(plainly(), "b.safetensors"), "b", every=1)
    assert torch.equal(run(again, frames=18), whole)
    assert len(nodes.files()) == 2 and nodes.files()[0] == "b.safetensors"


@pytest.mark.parametrize("transition", ["recache", "soft", "flush"])
@pytest.mark.parametrize("second", [0.5, 1.9], ids=["before", "behind"])
def test_a_prompt_track_goes_on(transition, second, output):
    """The second prompt begins in frame 3 or 9; the snapshot is of six frames."""
    guide = guider(plain(), ForcingPromptSegment.execute(text(), text(1), second, transition, 2).result[0])
    whole = hostkit.run(guide, saving(plainly()), 15, sigmas=TWO_STEPS)
    stopped(saving(plainly()), 8, guide, frames=15)
    with hostkit.forwards(plain()) as seen:
        rest = hostkit.run(guide, resuming(plainly()), 15, sigmas=TWO_STEPS)
    assert torch.equal(rest.latents, whole.latents) and not torch.equal(whole.latents, run(plainly(), frames=15))
    assert rest.ticks[-1][:2] == (len(seen) - 1, len(seen))


@pytest.mark.parametrize("name", ["missing", "../a", "a/b", "/etc/passwd", "", ".hidden", "a\0b", "..", "C:x", "a" * 200])
def test_names_stay_in_their_folder(name, output):
    (output / "a.safetensors").write_bytes(b"")
    with pytest.raises(ForcingError, match="is no name of a snapshot|There is no snapshot"):
        resuming(plainly(), f"{name}.safetensors")
    if name != "missing":
        with pytest.raises(ForcingError, match="is no name of a snapshot"):
            saving(plainly(), name)


def test_links_out_of_the_folder_are_refused(output):
    nodes.folder().mkdir()
    (output / "secret.safetensors").write_bytes(b"x")
    (nodes.folder() / "a.safetensors").symlink_to(output / "secret.safetensors")
    with pytest.raises(ForcingError, match="is no name"):
        resuming(plainly())


def test_what_cannot_be_resumed_is_refused(output):
    run(saving(plainly()))
    with pytest.raises(ForcingError, match="already has 12 latent frames, and the latent has 12"):
        run(resuming(plainly()))
    with pytest.raises(ForcingError, match="another model"):
        run(resuming(plainly()), hostkit.load({k: v + 0.01 for k, v in hostkit.weights().items()}), frames=15)
    with pytest.raises(ForcingError, match="window 6, but this run has 9"):
        run(resuming(plainly(WindowOptions(9, 1, 3, "relative"))), frames=15)
    with pytest.raises(ForcingError, match="size"):
        run(resuming(plainly()), frames=15, size=(4, 4))
    with pytest.raises(ForcingError, match="reference order"):
        run(saving(plainly(noise="reference")))
    with pytest.raises(ForcingError, match="Only a causal rollout"):
        saving(KSAMPLER(lambda *_: None))
    path = nodes.path_of("a.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ForcingError, match="cut or changed"):
        run(resuming(plainly()), frames=15)


def test_a_patched_model_is_the_same_model(output):
    """Whether a LoRA is in the weights or added on the fly depends on free memory; both are the file that was loaded."""
    lora = {f"diffusion_model.{name}.weight": ("diff", (0.01 * torch.ones(tiny.DIM, tiny.DIM),))
            for name in ("blocks.0.self_attn.q", "blocks.1.self_attn.k")}
    patched = hostkit.load().clone()
    patched.add_patches(lora)
    whole = run(plainly(), patched)
    stopped(saving(plainly()), 8, patched)
    assert torch.equal(run(resuming(plainly()), patched), whole)
    assert not torch.equal(run(resuming(plainly())), whole)


def test_a_full_disk_does_not_end_the_video(output, caplog, monkeypatch):
    expected = run(plainly())
    monkeypatch.setattr(snapshot_file, "_bytes_of", lambda t: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with caplog.at_level(logging.ERROR):
        assert torch.equal(run(saving(plainly())), expected)
    assert "No snapshot" in caplog.text and "No space left on device" in caplog.text and nodes.files() == []


def test_the_nodes_face_comfyui(output):
    """An empty folder is no error, and a file that was written again is run again."""
    assert nodes.ForcingResume.INPUT_TYPES()["required"]["snapshot"][1]["options"] == []
    run(saving(plainly()))
    assert nodes.ForcingResume.INPUT_TYPES()["required"]["snapshot"][1]["options"] == ["a.safetensors"]
    before = nodes.ForcingResume.fingerprint_inputs("a.safetensors", sampler=None)
    run(saving(plainly()), frames=9)
    assert nodes.ForcingResume.fingerprint_inputs("a.safetensors", sampler=None) != before
    assert nodes.ForcingResume.fingerprint_inputs("b.safetensors", sampler=None) is None
    text_of_file = snapshot_file.read(nodes.path_of("a.safetensors"))[0]
    assert json.loads(text_of_file)["seed"] == 3 and str(output) not in text_of_file
