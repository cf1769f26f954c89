"""The pack's nodes in a real ComfyUI: from checkpoint to mp4, with progress, previews, interrupt and errors."""
import io

import av
import pytest
import torch
from forcing_testkit import tiny
from forcing_testkit.client import PromptFailed, PromptInterrupted
from forcing_testkit.graphs import core_ar_video
from PIL import Image
from safetensors.torch import load_file

FORWARDS = 4 + 5 + 5  # 9 latent frames in blocks of 3: four steps, and a clean pass before every further block


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module", autouse=True)
def official_file(comfy_models):
    """A container as Self Forcing's authors publish it."""
    return tiny.tiny_wan(comfy_models / "diffusion_models" / "self_forcing_dmd.pt", container="generator_ema",
                         prefix="model.")


def graph(length=9, unit="latent frames", seed=7, size=64, keep_on_interrupt=False, **changes):
    """Text to video with our nodes around SamplerCustomAdvanced. changes: nodes by id."""
    return {
        "model": node("ForcingLoadCheckpoint", checkpoint="self_forcing_dmd.pt", system="auto", weights="auto",
                      weight_dtype="default", lora="none", lora_strength=1.0),
        "text": node("TestTextEncode", text="a red ball rolls along a wooden floor"),
        "guider": node("ForcingGuider", model=["model", 0], positive=["text", 0], cfg=1.0),
        "preset": node("ForcingPreset", system="self-forcing", keep_on_interrupt=keep_on_interrupt),
        "latent": node("ForcingEmptyLatent", width=size, height=size, length=length, unit=unit, block=3, fps=16.0,
                       batch_size=1),
        "noise": node("RandomNoise", noise_seed=seed),
        "sample": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["preset", 0],
                       sigmas=["preset", 1], latent_image=["latent", 0]),
        "vae": node("VAELoader", vae_name="tiny_wan_vae.safetensors"),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "video": node("CreateVideo", images=["decode", 0], fps=16.0),
        "video_file": node("SaveVideo", video=["video", 0], filename_prefix="video/forcing", format="mp4",
                           codec="h264"),
        "latent_file": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/forcing"),
    } | changes


def frame_count(path):
    with av.open(str(path)) as video:
        return sum(1 for _ in video.decode(video=0))


def latents(server, entry):
    path, = server.files(entry, "latent_file")
    return load_file(path)["latent_tensor"]


def of_sampler(events, kind):
    return [event for event in events.of(kind) if event.data.get("node") == "sample"]


@pytest.fixture(scope="module")
def made(comfy_server, official_file):
    """History entry of one video of 9 latent frames, and the events it sent."""
    with comfy_server.events() as events:
        entry = comfy_server.run(graph())
        events.wait_for("execution_success")
    return entry, events


def test_checkpoint_to_mp4(comfy_server, made):
    """9 latent frames are 33 frames of video."""
    video, = comfy_server.files(made[0], "video_file")
    assert frame_count(video) == 33
    result = latents(comfy_server, made[0])
    assert result.shape == (1, 16, 9, 8, 8) and torch.isfinite(result).all()
    assert (result[:, :, 3:6] - result[:, :, :3]).abs().mean() > 1e-3


def test_progress_reports_every_forward(made):
    """Core reports 4 for all of them: the bar would stand still for minutes of a long video."""
    reports = [(event.data["value"], event.data["max"]) for event in of_sampler(made[1], "progress")]
    assert {total for _, total in reports} == {FORWARDS}
    assert [value for value, _ in reports] == list(range(1, FORWARDS + 1))


def test_previews_are_pictures_of_the_video(made):
    """One for every report that is not held back; ComfyUI makes them from what the sampler shows."""
    previews = [event for event in made[1].of("preview") if event.image]
    assert len(previews) >= 3
    sizes = {Image.open(io.BytesIO(event.image)).size for event in previews}
    assert len(sizes) == 1 and min(sizes.pop()) >= 8
    assert previews[0].image != previews[-1].image


def test_core_nodes_take_our_model_and_our_sampler_takes_theirs(comfy_server, made):
    """Same weights, same sigmas: a graph of core's loader, shift, schedule and guider gives the same latents."""
    core = core_ar_video(unet="tiny_wan.safetensors", seed=7)
    mixed = graph(model=core["model"], unet=core["unet"], guider=core["guider"], sigmas=core["sigmas"])
    mixed["sample"]["inputs"]["sigmas"] = ["sigmas", 0]
    result = latents(comfy_server, comfy_server.run(mixed))
    ours = latents(comfy_server, made[0])
    assert (result - ours).norm() / ours.norm() <= 1e-3  # the schedules differ in the last digits of float32


def test_seconds_are_rounded_to_whole_blocks(comfy_server):
    entry = comfy_server.run(graph(length=0.5, unit="seconds"))
    assert latents(comfy_server, entry).shape[2] == 3


def test_plan_view_announces_in_the_graph(comfy_server):
    """Runs without sampling: the picture and the bytes come from the shapes alone."""
    view = {"plan": node("ForcingPlanView", model=["model", 0], sampler=["preset", 0], latent=["latent", 0],
                         conditions=1),
            "bytes": node("PreviewAny", source=["plan", 2])}
    needed = {name: value for name, value in graph().items() if name in ("model", "preset", "latent")}
    entry = comfy_server.run(needed | view)
    assert entry["outputs"]["plan"]["images"]
    assert entry["outputs"]["bytes"]["text"] == [str(2 * 9 * 16 * 256 * 4 * 2)]


def long_graph(seed, **settings):
    """1200 latent frames in a window: minutes, if nobody interrupts."""
    cache = node("ForcingCache", **{"policy": "window", "policy.window": 12, "policy.sink": 3,
                                    "policy.positions": "relative"})
    prompt = graph(length=1200, seed=seed, cache=cache, **settings)
    prompt["preset"]["inputs"]["cache"] = ["cache", 0]
    return {name: value for name, value in prompt.items() if name not in ("decode", "video", "video_file", "vae")}


def started(events, prompt_id, count=8):
    """Wait until so many forwards of this prompt are reported."""
    events.wait_for("progress", prompt_id, timeout=60, count=count)


def test_interrupt_ends_the_prompt_and_leaves_the_server_usable(comfy_server):
    """Cancel has to act within a forward, and leave neither a store nor a wrapper for the next prompt."""
    with comfy_server.events() as events:
        prompt_id = comfy_server.queue(long_graph(seed=21))
        started(events, prompt_id)
        comfy_server.interrupt(prompt_id)
        with pytest.raises(PromptInterrupted) as stopped:
            comfy_server.wait(prompt_id, timeout=20)
        last = events.of("progress", prompt_id)[-1].data
    assert stopped.value.node_id == "sample" and last["value"] < last["max"]
    assert latents(comfy_server, comfy_server.run(graph(length=3, seed=22))).shape[2] == 3


def test_interrupt_can_keep_what_is_finished(comfy_server):
    """With the switch on, the graph goes on with the whole blocks finished so far."""
    with comfy_server.events() as events:
        prompt_id = comfy_server.queue(long_graph(seed=7, keep_on_interrupt=True))
        started(events, prompt_id, count=12)
        comfy_server.interrupt(prompt_id)
        entry = comfy_server.wait(prompt_id, timeout=20)
    result = latents(comfy_server, entry)
    assert 3 <= result.shape[2] < 1200 and result.shape[2] % 3 == 0
    assert torch.isfinite(result).all()


def test_our_errors_reach_the_user_in_our_words(comfy_server):
    """The node's error text is all that a user sees."""
    with pytest.raises(PromptFailed, match="Use 6 or 9") as failure:
        comfy_server.run(graph(length=7))
    assert failure.value.node_id == "latent" and "ForcingError" in failure.value.exception_type


def test_errors_of_the_sampler_name_the_sampling_node(comfy_server):
    """Sigmas of another schedule, found only when sampling starts."""
    prompt = graph(sigmas=node("ForcingSigmas", system="custom", steps="1000, 500", first_block_steps="", shift=5.0,
                               warp=True))
    prompt["sample"]["inputs"]["sigmas"] = ["sigmas", 0]
    with pytest.raises(PromptFailed, match="Connect the SIGMAS output of the same Forcing") as failure:
        comfy_server.run(prompt)
    assert failure.value.node_id == "sample"
