"""Every example workflow: sound as a file, opens in the real frontend, and makes the video its note promises.

The server gets tiny files under the official names, so loaders and paths stay as they are. Only encoders
of text, sound and pictures and the pose detector are replaced, and the size. The workflow of the bundled model runs as it is.
"""
import importlib
import itertools
import json
import re
import urllib.parse
import urllib.request
import wave
from pathlib import Path

import av
import jsonschema
import pytest
import torch
from forcing_pack.forcing_core.micro import face, live, portrait
from forcing_pack.forcing_core.streaming import Audio, VideoSink
from forcing_testkit import micro, tiny, tiny_animate, tiny_s2v, tiny_vace
from PIL import Image
from safetensors.torch import save_file

PACK = Path(__file__).resolve().parents[2]
FOLDER = PACK / "workflows"
TOOLS = PACK / "tests" / "tools"
# Latent frames of the finished video.
FRAMES = {"hello": 21, "self_forcing_t2v": 21, "causal_forcing_framewise_t2v": 21, "causal_forcing_framewise_i2v": 21,
          "causal_forcing_pp_2step_t2v": 21, "longlive_30s": 120, "extend_video": 42, "low_vram_fp8": 21,
          "longlive_60s_prompts": 240, "multi_scene_story": 81, "rolling_forcing_30s": 120, "reward_forcing_60s": 240,
          "deep_forcing_60s": 240, "compare_long_self_forcing": 60, "compare_micro": 42,
          "endless_stream": 42, "resume_and_branch": 42, "video_continuation": 33, "restyle_video": 21, "live_camera": 21,
          "live_steer": 21, "knot_reference": 81, "sparse_micro": 21, "portrait_micro": 42, "portrait_idle": 42,
          "portrait_vace": 81, "portrait_animate": 74, "portrait_s2v": 60}
NAMES = sorted(FRAMES)
# Decoding 30 s takes minutes on a CPU: 14 blocks, or 10, are still more than any window.
SHORTER = {**dict.fromkeys(("longlive_30s", "longlive_60s_prompts", "multi_scene_story", "rolling_forcing_30s",
                            "reward_forcing_60s", "deep_forcing_60s"), (10.0, 42)), "compare_long_self_forcing": (7.5, 30),
           "knot_reference": (42, 42), "portrait_vace": (42, 42), "portrait_s2v": (57, 15), "portrait_animate": (3, 3)}
# run as they are, with the bundled model
BUNDLED = ("hello", "compare_micro", "endless_stream", "resume_and_branch", "video_continuation", "restyle_video",
           "sparse_micro", "portrait_micro", "portrait_idle", "live_steer")
# No tiny files here: LIVE has a network of its own. See tests/host/test_live_host.py.
NOT_RUN = ("live_camera",)
ENDLESS = 10.0  # seconds that an endless stream is stopped after
ALIKE = {"resume_and_branch": 24}  # latent frames that the videos of a workflow have in common
COMES_ALONG = ("none", "micro LIVE", "inside the checkpoint")  # choices of loaders that no file is downloaded for
PLAYER = ("audioUI", "upload")  # what the page puts below a choice of sounds
PAGE_NODES = {"MarkdownNote"}  # drawn by the page, unknown to the server
EMPTY = ("ForcingEmptyLatent", "WanSoundImageToVideo")  # one of them has size and length
TITLE = 30
DROP_DOWN = "COMFY_DYNAMICCOMBO_V3"  # a combo whose choice brings inputs of its own
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DROP_DOWN}
DOWNLOADABLE = (".safetensors", ".sft", ".ckpt", ".pth", ".pt")  # what the missing-models dialog offers to fetch

PAIR = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
NODE = {"type": "object", "required": ["id", "type", "pos", "size", "flags", "order", "mode", "properties"],
        "properties": {"id": {"type": "integer"}, "type": {"type": "string"}, "pos": PAIR, "size": PAIR,
                       "mode": {"const": 0}, "widgets_values": {"type": "array"}}}
LINK = {"type": "array", "minItems": 6, "maxItems": 6,
        "prefixItems": [*[{"type": "integer"}] * 5, {"type": "string"}]}
SCHEMA = {"type": "object", "required": ["id", "revision", "last_node_id", "last_link_id", "nodes", "links", "groups",
                                         "config", "extra", "version"],
          "properties": {"version": {"const": 0.4}, "nodes": {"type": "array", "items": NODE, "minItems": 1},
                         "links": {"type": "array", "items": LINK}}}


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def workflow(name):
    return read(name)


@pytest.fixture
def nodes(workflow):
    """The nodes that the server knows."""
    return [node for node in workflow["nodes"] if node["type"] not in PAGE_NODES]


@pytest.fixture(scope="module")
def schemas(comfy_server):
    return comfy_server.object_info()


# -- the file -------------------------------------------------------------------------------------------------

def test_every_workflow_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == NAMES


def test_format(workflow):
    jsonschema.validate(workflow, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert workflow["last_node_id"] == max(node["id"] for node in workflow["nodes"])
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    text = json.dumps(workflow)
    assert not re.search(r"/(work|root|home|tmp)/", text)


def test_links_agree_with_both_ends(workflow):
    by_id = {node["id"]: node for node in workflow["nodes"]}
    listed = {(link, node["id"], slot) for node in workflow["nodes"]
              for slot, output in enumerate(node["outputs"]) for link in output["links"] or []}
    assert listed == {(link, source, output) for link, source, output, *_ in workflow["links"]}
    ends = {(item["link"], node["id"], slot) for node in workflow["nodes"]
            for slot, item in enumerate(node["inputs"]) if item["link"] is not None}
    assert ends == {(link, target, slot) for link, _, _, target, slot, _ in workflow["links"]}
    for _, source, output, target, slot, kind in workflow["links"]:
        assert by_id[source]["outputs"][output]["type"] == by_id[target]["inputs"][slot]["type"] == kind


def test_nodes_exist_with_these_sockets_and_widgets(nodes, schemas):
    for node in nodes:
        schema = schemas[node["type"]]
        declared = inputs_of(node, schema)
        assert {item["name"] for item in node["inputs"]} - {*PLAYER} == set(declared), node["type"]
        assert [output["type"] for output in node["outputs"]] == schema["output"], node["type"]
        assert len(node.get("widgets_values", [])) == sum(len(slots(name, declared[name])) for name in declared), node["type"]


def inputs_of(node, schema):
    """{name: declaration} in the order of the page: what the choice of a drop-down brings comes right after it."""
    found = {}
    for name, declared in (pair for part in ("required", "optional") for pair in schema["input"].get(part, {}).items()):
        place = sum(len(slots(before, found[before])) for before in found)
        found[name] = declared
        if declared[0] == DROP_DOWN:
            option, = (option for option in declared[1]["options"] if option["key"] == node["widgets_values"][place])
            found |= {f"{name}.{inner}": what for part in ("required", "optional")
                      for inner, what in option["inputs"].get(part, {}).items()}
    return found


def slots(name, declared):
    """Names of the values that the page saves for an input; a seed brings its control, an image its upload button, a sound
    also a player."""
    kind, *options = declared
    options = options[0] if options else {}
    if not isinstance(kind, list) and kind not in WIDGETS:
        return []
    return [name, *["control_after_generate"] * bool(options.get("control_after_generate")),
            *["upload"] * bool(options.get("image_upload") or options.get("video_upload")),
            *PLAYER * bool(options.get("audio_upload"))]


def values_of(node, schemas):
    """{widget: value} of a saved node."""
    if node["type"] in PAGE_NODES:
        return {"text": node["widgets_values"][0]}
    declared = inputs_of(node, schemas[node["type"]])
    names = [slot for name in declared for slot in slots(name, declared[name])]
    return dict(zip(names, node.get("widgets_values", []), strict=True))


def test_nodes_name_their_package(nodes):
    for node in nodes:
        properties = node["properties"]
        assert properties["Node name for S&R"] == node["type"]
        assert properties["cnr_id"] == ("forcing" if node["type"].startswith("Forcing") else "comfy-core")
        assert re.fullmatch(r"\d+\.\d+\.\d+", properties["ver"])


def test_note_tells_the_true_length(name, workflow):
    note, = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert f"{1 + 4 * (FRAMES[name] - 1)} frames, " in note


def test_loaders_say_where_their_files_come_from(nodes):
    chosen = {"ForcingLoadCheckpoint": (0, 4, 6), "CLIPLoader": (0,), "VAELoader": (0,), "ForcingLiveCheckpoint": (0, 1),
              "UNETLoader": (0,), "ForcingLiveAvatar": (0,), "AudioEncoderLoader": (0,), "CLIPVisionLoader": (0,),
              "CheckpointLoaderSimple": (0,)}
    for node in nodes:
        models = node["properties"].get("models", [])
        values = [node["widgets_values"][slot] for slot in chosen.get(node["type"], ())]
        assert [model["name"] for model in models] == [value for value in values if value not in COMES_ALONG], node["type"]
        for model in models:
            url = urllib.parse.urlsplit(model["url"])
            assert (url.scheme, url.netloc) == ("https", "huggingface.co") and "/resolve/main/" in url.path
            assert urllib.parse.unquote(url.path).endswith("/" + model["name"])
            assert model["name"].endswith(DOWNLOADABLE)
            assert model["directory"] in ("diffusion_models", "loras", "text_encoders", "audio_encoders", "vae", "clip_vision",
                                          "checkpoints")


def test_drawing_is_tidy(workflow):
    """No node lies on another, and every node but the note is in exactly one group."""
    boxes = {node["id"]: box(node) for node in workflow["nodes"]}
    for one, other in itertools.combinations(boxes, 2):
        assert not overlap(boxes[one], boxes[other]), (one, other)
    groups = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in workflow["groups"])]
    assert not any(overlap(one, other) for one, other in itertools.combinations(groups, 2))
    for node in workflow["nodes"]:
        assert sum(overlap(boxes[node["id"]], group) for group in groups) == (node["type"] not in PAGE_NODES)


def box(node):
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_file_is_what_the_script_writes(name, workflow, schemas, monkeypatch):
    """Without the page: same nodes, notes, files and links as tests/tools/examples.py describes."""
    monkeypatch.syspath_prepend(str(TOOLS))
    wanted = importlib.import_module("examples").EXAMPLES[name]().as_dict()
    saved = {node["id"]: node for node in workflow["nodes"]}
    assert {node["id"]: node["type"] for node in wanted["nodes"]} == {key: node["type"] for key, node in saved.items()}
    for node in wanted["nodes"]:
        assert node["models"] == saved[node["id"]]["properties"].get("models", [])
        values = values_of(saved[node["id"]], schemas)
        assert {widget: values[widget] for widget in node["widgets"]} == node["widgets"]
    named = [[link[1], link[2], link[3], saved[link[3]]["inputs"][link[4]]["name"]] for link in workflow["links"]]
    assert sorted(named) == sorted(wanted["links"])


def test_thumbnail(name):
    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size <= 100_000
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.size == (640, 360)


def test_templates_list_has_them_with_pictures(comfy_server):
    assert sorted(comfy_server.get("/api/workflow_templates")["ComfyUI-Forcing"]) == NAMES
    for name in NAMES:
        url = f"{comfy_server.url}/api/workflow_templates/ComfyUI-Forcing/{name}.jpg"
        with urllib.request.urlopen(url, timeout=30) as reply:
            assert reply.headers["Content-Type"] == "image/jpeg"


# -- the page -------------------------------------------------------------------------------------------------

def test_opens_from_the_templates_list(comfy_page, name, workflow):
    comfy_page.open(f"?template={name}&source=ComfyUI-Forcing")
    comfy_page.page.wait_for_function("count => window.app.graph.nodes.length === count", arg=len(workflow["nodes"]))
    assert comfy_page.missing_node_types() == []
    # The page asks huggingface.co how large the files are, which its own security policy forbids here.
    assert [text for text in comfy_page.messages_about("forcing") if "huggingface.co" not in text] == []


def test_page_saves_what_it_opened(comfy_page, name, workflow):
    comfy_page.load_workflow(FOLDER / f"{name}.json")
    saved = comfy_page.serialize()
    assert saved["links"] == workflow["links"]
    for before, after in zip(workflow["nodes"], sorted(saved["nodes"], key=lambda node: node["id"])):
        assert (after["type"], after.get("widgets_values") or []) == (before["type"], before.get("widgets_values", []))
        assert after["properties"] == before["properties"]


POLICIES = """() => {
    app.graph.clear()
    const node = LiteGraph.createNode('ForcingCache')
    app.graph.add(node)
    return node.widgets[0].options.values.map(kind => {
        node.widgets[0].value = kind
        return [kind, node.widgets.map(widget => widget.name)]
    })
}"""


def test_the_cache_shows_the_widgets_of_the_chosen_policy(comfy_page, schemas):
    """All kinds in turn on one node: what the last one brought has to go."""
    declared = schemas["ForcingCache"]
    wanted = {option["key"]: list(inputs_of({"widgets_values": [option["key"]]}, declared))
              for option in declared["input"]["required"]["policy"][1]["options"]}
    assert dict(comfy_page.evaluate(POLICIES)) == wanted and len(wanted) >= 8


# -- the video ------------------------------------------------------------------------------------------------

def tiny_lora(path, rank=4):
    """A PEFT LoRA in its container, as LongLive publishes it."""
    draw = torch.Generator().manual_seed(0)
    factors = {}
    for layer in (f"base_model.model.blocks.{block}.self_attn.{part}" for block in range(tiny.LAYERS) for part in "qkvo"):
        factors[f"{layer}.lora_A.weight"] = torch.randn(rank, tiny.DIM, generator=draw) / tiny.DIM ** 0.5
        factors[f"{layer}.lora_B.weight"] = torch.randn(tiny.DIM, rank, generator=draw) / 10
    torch.save({"generator_lora": factors}, path)


@pytest.fixture(scope="module")
def ready_server(comfy_server, comfy_models):
    """The server with tiny files under the official names, in the official containers, and a start image."""
    weights, loras = comfy_models / "diffusion_models", comfy_models / "loras"
    loras.mkdir(exist_ok=True)
    for name, key in (("self_forcing_dmd", "generator_ema"), ("causal_forcing", "generator_ema"),
                      ("framewise-2step", "generator_ema"), ("longlive_base", "generator"),
                      ("rolling_forcing_dmd", "generator_ema"), ("rewardforcing", None)):
        tiny.tiny_wan(weights / f"{name}.pt", prefix="model.", container=key)
    tiny_lora(loras / "lora.pt")
    tiny.tiny_wan_vae(comfy_models / "vae" / "wan_2.1_vae.safetensors")
    tiny_vace.tiny_vace(weights / "wan2.1_vace_1.3B_fp16.safetensors")
    Image.linear_gradient("L").convert("RGB").save(comfy_server.base / "input" / "example.png")
    driving_video(comfy_server.base / "input" / "driving")
    tiny_animate.tiny_animate(weights / "wan2.2_animate_14B_bf16.safetensors")
    tiny_s2v.tiny_s2v(weights / "wan2.2_s2v_14B_fp8_scaled.safetensors")
    save_file(tiny_s2v.live_avatar_lora(), loras / "liveavatar.safetensors")
    voice_file(comfy_server.base / "input" / "voice.wav")
    return comfy_server


def driving_video(path):
    """A face that moves and hums for 4 s, of another size and rate than the model's."""
    drive = face.track(3, 1, 100)
    pictures = face.paint(face.identities(2, 1), drive, 96)[0].add(1).mul(127.5).byte().permute(1, 2, 3, 0)
    with VideoSink(path, 25, audio=Audio(portrait.voice(drive[0, 3, :64]).numpy(), 16000)) as sink:
        sink.write(pictures.numpy())


def voice_file(path):
    """The same hum by itself."""
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(portrait.voice(face.track(3, 1, 100)[0, 3, :64]).mul(32767).short().numpy().tobytes())


def without_encoder(prompt, seconds=None):
    """The prompt with TestTextEncode for the 6.7 GB text encoder, TestVoice for the 0.6 GB one of sound, TestVision for the
    1.3 GB one of pictures, and TestPose for SDPoseKeypointExtractor and the checkpoint of its own, at a size (and length)
    for tests; start times of prompts and soft transitions are shortened alike."""
    out = {}
    length, = (node["inputs"]["length"] for node in prompt.values() if node["class_type"] in EMPTY)
    share = (seconds or length) / length
    for key, node in prompt.items():
        inputs = dict(node["inputs"])
        if node["class_type"] == "CLIPLoader":
            node, inputs = {"class_type": "TestClip"}, {}
        if node["class_type"] == "ForcingPromptTrack":
            inputs["script"] = re.sub(r"^\d+", lambda found: f"{int(found[0]) * share:g}", inputs["script"], flags=re.M)
            inputs["script"] = re.sub(r"soft (\d+)", lambda found: f"soft {max(2, int(int(found[1]) * share))}",
                                      inputs["script"])
        if node["class_type"] == "ForcingPromptSegment":
            inputs["start"] *= share
        if node["class_type"] == "CLIPTextEncode":
            node, inputs = {"class_type": "TestTextEncode"}, {"text": inputs["text"]}
        if node["class_type"] == "AudioEncoderLoader":
            node, inputs = {"class_type": "TestVoice"}, {}
        if node["class_type"] == "CLIPVisionLoader":
            node, inputs = {"class_type": "TestVision"}, {}
        if node["class_type"] == "CheckpointLoaderSimple":
            continue
        if node["class_type"] == "SDPoseKeypointExtractor":
            node, inputs = {"class_type": "TestPose"}, {"image": inputs["image"]}
        if node["class_type"] in EMPTY:
            inputs |= {"width": 64, "height": 64} | ({"length": seconds} if seconds else {})
        if node["class_type"] in ("ImageScale", "WanVaceToVideo"):
            inputs |= {"width": 64, "height": 64}
        if node["class_type"] == "ForcingStream":
            inputs["length"] *= share
        if node["class_type"] == "LoadVideo":
            inputs["file"] = "driving.mp4"
        out[key] = {"class_type": node["class_type"], "inputs": inputs}
    if every(out, "WanAnimateToVideo"):
        in_short_clips(out, length=1 + 4 * (seconds - 1))
    return out


def in_short_clips(prompt, length):
    """Two clips of Wan Animate, of 5 frames and one step: its motion encoder, of full size, takes seconds for each frame of
    each. The overlap is 1 latent frame then, all of it the knot. length: frames of the video."""
    changes = {"WanAnimateToVideo": {"width": 64, "height": 64, "length": length}, "BasicScheduler": {"steps": 1},
               "ForcingClips": {"clip_frames": 5, "overlap": 1}, "ForcingStream": {"length": length / 16}}
    for kind, inputs in changes.items():
        prompt[only(prompt, kind)]["inputs"] |= inputs


def every(prompt, kind):
    return [key for key, node in prompt.items() if node["class_type"] == kind]


def only(prompt, kind):
    key, = every(prompt, kind)
    return key


def pictures(path, width, fps=16):
    """Pictures [H, W, 3] of a video of `fps` a second."""
    with av.open(str(path)) as video:
        assert (video.streams.video[0].width, video.streams.video[0].average_rate) == (width, fps)
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


@pytest.fixture
def bundled(require):
    require(micro.trained(), "web tests of the bundled model: its weights are not in forcing_core/micro/weights",
            "run 'python -m forcing_core train micro --out forcing_core/micro/weights', or check out the whole repository")


@pytest.fixture
def live_bundled(bundled, require):
    require(live.bundled(), "web tests of the micro LIVE: its weights are not in forcing_core/micro/weights",
            "run 'python -m forcing_core train live --out forcing_core/micro/weights', or check out the whole repository")


def test_run_button_makes_the_video_of_the_bundled_model(bundled, comfy_server, comfy_page):
    """As a newcomer does it: open from the templates list, press Run, see the video."""
    comfy_page.open("?template=hello&source=ComfyUI-Forcing")
    comfy_page.page.wait_for_function("() => window.app.graph.nodes.some(node => node.type === 'SaveVideo')")
    before = set(comfy_server.output.glob("forcing/hello*.mp4"))
    comfy_page.page.get_by_test_id("queue-button").click()
    comfy_page.page.wait_for_function(
        "() => app.nodeOutputs[app.graph.nodes.find(node => node.type === 'SaveVideo').id]?.images?.length", timeout=120_000)
    video, = set(comfy_server.output.glob("forcing/hello*.mp4")) - before
    assert len(pictures(video, 256)) == 81


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("hello", *NOT_RUN)])
def test_makes_its_video(ready_server, comfy_page, name, request):
    """Where there are several, they differ in the end: every column has its own memory."""
    if name in BUNDLED:
        request.getfixturevalue("live_bundled" if name == "live_steer" else "bundled")
    comfy_page.load_workflow(FOLDER / f"{name}.json")
    seconds, frames = SHORTER.get(name, (None, FRAMES[name]))
    prompt = comfy_page.graph_to_prompt()
    for key in every(prompt, "ForcingStream") + every(prompt, "ForcingLiveStream"):
        prompt[key]["inputs"]["length"] = prompt[key]["inputs"]["length"] or ENDLESS
    entry = ready_server.run(prompt if name in BUNDLED else without_encoder(prompt, seconds), timeout=280)
    seen = []
    for key in (key for kind in ("SaveVideo", "ForcingStream", "ForcingLiveStream") for key in every(prompt, kind)):
        video, = ready_server.files(entry, key)
        assert video.parent.name == "forcing" and video.suffix == ".mp4"
        enlarged = name in BUNDLED and prompt[key]["class_type"] == "SaveVideo"
        seen.append(pictures(video, 256 if enlarged else 64, 8 if name == "live_steer" else 16))
        assert len(seen[-1]) == 1 + 4 * (frames - 1)
    assert len({made[-1].tobytes() for made in seen}) == len(seen) > 0
    for number in range(1 + 4 * (ALIKE.get(name, 0) - 1)):
        assert max(abs(made[number].astype(int) - seen[0][number]).mean() for made in seen) < 2  # as far as the codec goes


def test_plan_view_draws_without_sampling(ready_server, comfy_page):
    comfy_page.load_workflow(FOLDER / "longlive_30s.json")
    prompt = without_encoder(comfy_page.graph_to_prompt())
    video = only(prompt, "SaveVideo")
    entry = ready_server.run({key: node for key, node in prompt.items() if key != video})
    picture, = (item for item in entry["outputs"][only(prompt, "ForcingPlanView")]["images"])
    assert picture["type"] == "temp"
    assert only(prompt, "SamplerCustomAdvanced") not in entry["outputs"]
