"""Core's own AR sampler runs end to end on the tiny checkpoints: if this fails, the test bench is broken."""
import av
import pytest
import torch
from forcing_testkit.client import PromptFailed, PromptInterrupted
from forcing_testkit.graphs import core_ar_video
from safetensors.torch import load_file


def frame_count(path):
    with av.open(str(path)) as video:
        return sum(1 for _ in video.decode(video=0))


@pytest.fixture(scope="module")
def run(comfy_server):
    """History entry of one run with 3 latent frames, and the events it sent."""
    with comfy_server.events() as events:
        entry = comfy_server.run(core_ar_video(length=9))
        events.wait_for("execution_success")
    return entry, events


def test_video_has_one_frame_and_four_for_each_further_latent_frame(comfy_server, run):
    video, = comfy_server.files(run[0], "video_file")
    assert frame_count(video) == 9


def test_latent_is_finite_and_moves(comfy_server, run):
    path, = comfy_server.files(run[0], "latent_file")
    latent = load_file(path)["latent_tensor"]
    assert latent.shape == (1, 16, 3, 16, 16)
    assert torch.isfinite(latent).all()
    assert (latent[:, :, 1] - latent[:, :, 0]).abs().mean() > 1e-3


def test_events_name_the_nodes_that_ran(run):
    executed = {event.data["node"] for event in run[1].of("executed")}
    assert {"video_file", "latent_file"} <= executed
    assert run[1].of("progress_state")


def test_failing_node_is_reported_in_its_own_words(comfy_server):
    """A checkpoint without the causal mark is detected as plain T2V, which core's AR sampler refuses."""
    with pytest.raises(PromptFailed) as failure:
        comfy_server.run(core_ar_video(unet="tiny_wan.safetensors"))
    assert failure.value.node_id == "sample"
    assert failure.value.exception_type == "TypeError"


def test_refused_prompt_names_the_input(comfy_server):
    with pytest.raises(PromptFailed, match="unet_name"):
        comfy_server.queue(core_ar_video(unet="absent.safetensors"))


def test_interrupt_ends_the_prompt_and_leaves_the_server_usable(comfy_server):
    with comfy_server.events() as events:
        prompt_id = comfy_server.queue(core_ar_video(length=81, steps=100, seed=8))
        events.wait_for("preview", timeout=30)
        comfy_server.interrupt(prompt_id)
        with pytest.raises(PromptInterrupted):
            comfy_server.wait(prompt_id, timeout=30)
    assert comfy_server.run(core_ar_video(length=1, seed=9))["outputs"]


def test_unchanged_nodes_are_cached_until_memory_is_freed(comfy_server):
    prompt = core_ar_video(length=1, seed=10)
    comfy_server.run(prompt)
    assert "sample" in comfy_server.cached(comfy_server.run(prompt))
    comfy_server.free()
    assert "sample" not in comfy_server.cached(comfy_server.run(prompt))
    assert 0 < comfy_server.memory()["rss"] < comfy_server.memory()["ram_total"]


def test_this_process_has_the_host_modules_and_the_cuda_attention_path(comfy_checkout):
    """The pack's own `nodes` folder is on the path too (`python -m pytest` adds it); the host's must win."""
    import comfy.ldm.modules.attention
    import nodes

    assert nodes.__file__ == str(comfy_checkout / "nodes.py")
    assert comfy.ldm.modules.attention.optimized_attention.__name__ == "attention_pytorch"
