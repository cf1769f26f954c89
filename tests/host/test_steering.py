"""Steering a stream inside ComfyUI: the routes, new prompts and LoRA strengths while it runs, replay, and going on later."""
import asyncio
import base64
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import av
import comfy.model_management as mm
import comfy.sd
import comfy.utils
import folder_paths
import numpy
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.options import RolloutOptions
from forcing_pack.forcing_core.plan import Block
from forcing_pack.forcing_core.policies import RollingOptions, WindowOptions
from forcing_pack.forcing_core.steering import Command, Steering
from forcing_pack.forcing_core.streaming import VideoSink
from forcing_pack.forcing_core.streaming.live import Live
from forcing_pack.forcing_core.streaming.note import read_note
from forcing_pack.nodes import routes
from forcing_pack.nodes import snapshot as snapshots
from forcing_pack.nodes.host import HostDenoiser
from forcing_pack.nodes.micro import clip as micro_clip
from forcing_pack.nodes.sampler import CausalSampler
from forcing_pack.nodes.stream import ForcingStream
from forcing_testkit import hostkit, tiny
from forcing_testkit.hostkit import TWO_STEPS, guider, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = RolloutOptions(cache=WindowOptions(window=6, sink=1, positions="relative"))
EXAMPLES = int(os.environ.get("FORCING_FUZZ", 300))
WORDS = {"fox": 1, "dog": 2}


class Clip:
    """A text encoder without a patcher, which therefore encodes between two blocks."""

    def tokenize(self, text):
        if text not in WORDS:
            raise ForcingError(f"{text!r} is not a word. Use fox or dog.")
        return WORDS[text]

    def encode_from_tokens_scheduled(self, tokens):
        return [[hostkit.text(tokens)[0][0], {"pooled_output": None}]]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tiny.tiny_wan_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors", dim=4)
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


@pytest.fixture
def run(monkeypatch, tmp_path, vae):
    """run(plan, ...): path of the video. plan: frames written -> commands sent then."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    node = ForcingStream.PREPARE_CLASS_CLONE(None)
    node.hidden = SimpleNamespace(prompt={"1": {}}, extra_pnginfo={}, unique_id="7")
    write = VideoSink.write

    def make(plan=None, options=OPTIONS, *, how=None, guide=None, length=3.6, clip=True, **more):
        waiting = dict(plan or {})

        def watched(self, frames):
            write(self, frames)
            for at in [at for at in waiting if self.frames >= at]:
                send(*waiting.pop(at))

        monkeypatch.setattr(VideoSink, "write", watched)
        out = node.execute(SimpleNamespace(seed=3), guide or guider(plain()), how or CausalSampler(options),
                           torch.tensor(TWO_STEPS), {"samples": hostkit.latent(3)}, vae, length, 16.0, "a/b", "mkv lossless",
                           clip=Clip() if clip else None, **more)
        monkeypatch.setattr(VideoSink, "write", write)
        return out.result[0].get_stream_source()
    yield make
    mm.interrupt_current_processing(False)


def the_stream():
    return routes.STREAMS.running(routes.STREAMS.states()[0]["id"])


def send(*commands):
    for command in commands:
        body = json.dumps({"client": "test", **command})
        routes.carry_out(routes.STREAMS, the_stream().id, body)


def pictures(path):
    with av.open(str(path)) as container:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


PLAN = {9: [{"kind": "prompt", "text": "fox", "transition": "recache"}], 21: [{"kind": "seed", "seed": 12}],
        33: [{"kind": "prompt", "text": "dog", "transition": "soft", "blocks": 2}], 45: [{"kind": "stop"}]}


@pytest.mark.parametrize("negative", [None, 5], ids=["cfg 1", "cfg 2"])
def test_a_steered_stream_is_replayed_from_its_file(run, negative):
    """The same file again, from the log in its metadata; the blocks before the first command are those of a plain one."""
    def guide():
        return guider(plain()) if negative is None else guider(plain(), None, hostkit.text(negative), cfg=2.0)

    steered, plainly = run(PLAN, guide=guide()), run(guide=guide())
    log = read_note(steered)["log"]
    assert [(e["block"], e["at_frame"], e["kind"], e["client"]) for e in log] == [
        (1, 9, "prompt", "test"), (2, 21, "seed", "test"), (3, 33, "prompt", "test"), (4, 45, "stop", "test")]
    made, same = pictures(steered), pictures(plainly)
    assert len(made) == 45 and len(same) == 57 and numpy.array_equal(made[:9], same[:9])
    assert not numpy.array_equal(made[9:21], same[9:21])
    assert numpy.array_equal(pictures(run(guide=guide(), replay=json.dumps(read_note(steered)))), made)


def test_a_rolling_stream_is_steered_too(run):
    options = RolloutOptions(block=2, cache=RollingOptions(window=9, sink=2, positions="rebased"))
    with pytest.raises(routes.Problem, match="Set every transition to keep"):
        run({9: [{"kind": "prompt", "text": "fox"}]}, options)
    steered = run({9: [{"kind": "prompt", "text": "fox", "transition": "keep"}]}, options)
    assert numpy.array_equal(pictures(run(options=options, replay=json.dumps(read_note(steered)["log"]))), pictures(steered))
    assert not numpy.array_equal(pictures(run(options=options)), pictures(steered))


def test_the_micro_text_encoder_works_beside_the_sampler(run):
    """It lives on the CPU: its thread encodes, and the list of loaded models stays the sampler's."""
    from forcing_pack.nodes.host_steering import TextEncoder

    encoder, threads = TextEncoder(micro_clip()), []
    assert encoder.background
    steering = Steering(prepare=lambda text: threads.append(threading.current_thread()) or encoder(text), background=True)
    loaded = list(mm.current_loaded_models)
    steering.send(Command("prompt", text="a red circle"))
    made = steering._inbox[0].made.result(20)
    assert made.shape == (1, 24, 4096) and threads[0] is not threading.current_thread()
    assert mm.current_loaded_models == loaded
    with pytest.raises(ForcingError, match="word"):
        encoder.tokens("an unheard of caption")


def patched(strength=1.0):
    """The tiny MODEL with a LoRA as ComfyUI's loader puts it on."""
    low = {}
    for name, (down, up) in hostkit.factors().items():
        low |= {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up}
    return comfy.sd.load_lora_for_models(hostkit.load(), None, low, strength, 0.0)[0]


def test_a_lora_gets_another_strength_between_two_blocks(run):
    """Through the patcher: what follows is what that strength makes of it, and the MODEL is as it came."""
    model = patched()
    kept = {key: list(entries) for key, entries in model.patches.items()}
    whole = pictures(run(guide=guider(model)))
    steered = run({21: [{"kind": "lora", "strength": 0.25}]}, guide=guider(model))
    assert numpy.array_equal(pictures(steered)[:21], whole[:21]) and not numpy.array_equal(pictures(steered)[21:], whole[21:])
    assert model.patches == kept and numpy.array_equal(pictures(run(guide=guider(model))), whole)
    assert numpy.array_equal(pictures(run(guide=guider(model), replay=json.dumps(read_note(steered)))), pictures(steered))
    early = pictures(run(guide=guider(model), replay=json.dumps([
        {"number": 1, "block": 0, "at_frame": 0, "kind": "lora", "strength": 0.25}])))
    assert numpy.array_equal(early, pictures(run(guide=guider(patched(0.25)))))


def with_changed(name):
    """The tiny MODEL with something added to one weight, as ComfyUI puts a LoRA of differences on it."""
    weight, model = hostkit.weights()[name], hostkit.load().clone()
    add = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * weight.float().std()
    assert model.add_patches({f"diffusion_model.{name}": ("diff", (add,))}, 1.0)
    return model


@pytest.mark.parametrize("name", ["blocks.0.cross_attn.k.weight", "text_embedding.0.weight", "time_projection.1.weight"])
def test_nothing_stays_of_what_other_weights_made_of_prompts_and_times(run, monkeypatch, name):
    """The keys of a prompt and the modulations of a noise level are kept from block to block, but not over a new strength:
    the video is that of a run which keeps none."""
    model = with_changed(name)
    plan = {9: [{"kind": "lora", "strength": 0.0}]}
    steered = pictures(run(plan, guide=guider(model), length=2.1))
    text = HostDenoiser._text

    def anew(self, *args):
        self.texts.clear()
        return text(self, *args)
    monkeypatch.setattr(HostDenoiser, "_text", anew)
    assert numpy.array_equal(pictures(run(plan, guide=guider(model), length=2.1)), steered)
    assert not numpy.array_equal(pictures(run(guide=guider(model), length=2.1))[9:], steered[9:])


@pytest.mark.parametrize("command, status, words", [
    ({"kind": "lora", "strength": 1.0}, 409, "no LoRA in the weights"),
    ({"kind": "prompt", "text": "cat"}, 400, "Use fox or dog"),
    ({"kind": "prompt", "text": "fox", "transition": "dissolve"}, 400, "not a transition")])
def test_what_this_stream_cannot_do_is_refused_with_the_fix(run, command, status, words):
    with pytest.raises(routes.Problem, match=words) as caught:
        run({9: [command]}, length=1.0)
    assert caught.value.status == status


def test_prompts_need_a_clip(run):
    with pytest.raises(routes.Problem, match="Connect a CLIP"):
        run(PLAN, clip=False)
    with pytest.raises(ForcingError, match="Connect a CLIP"):
        run(clip=False, replay='[{"number": 1, "block": 1, "at_frame": 9, "kind": "prompt", "text": "fox"}]')


def test_pauses_can_be_cancelled_and_the_file_stays(run):
    def cancel():
        while the_stream() is None or the_stream().status != "paused":
            time.sleep(0.05)
        mm.interrupt_current_processing()

    run({}, length=1.0)  # a finished stream is there to be asked about
    threading.Thread(target=cancel, daemon=True).start()
    assert len(pictures(run({21: [{"kind": "pause"}]}))) == 21
    state = routes.STREAMS.states()[0]
    assert state["status"] == "done" and state["log"][-1]["kind"] == "pause" and state["file"]["type"] == "output"


@pytest.mark.parametrize("stop", [21, 33])
def test_a_stream_goes_on_from_a_snapshot(run, tmp_path, stop):
    """Stopped by command; the second file continues the first one, under the prompt that ruled."""
    plan = {at: commands for at, commands in PLAN.items() if at <= 33}
    whole = pictures(run(plan))
    saving = snapshots.ForcingSnapshot.execute(CausalSampler(OPTIONS), "s", 0, True).result[0]
    first = run({at: [*commands, *([{"kind": "stop"}] * (at == stop))] for at, commands in plan.items()}, how=saving)
    resuming = snapshots.ForcingResume.execute(CausalSampler(OPTIONS), "s.safetensors").result[0]
    rest = {at: c for at, c in plan.items() if at >= stop}
    before = pictures(first)
    assert len(before) == stop
    second = run({0: rest[stop], **{at - max(0, stop - 32): c for at, c in rest.items() if at > stop}}, how=resuming)
    start = read_note(second)["start_frame"]
    assert start == max(0, stop - 32)
    assert numpy.array_equal(numpy.concatenate([before[:start], pictures(second)]), whole)
    with pytest.raises(ForcingError, match="snapshot is of a stream"):
        hostkit.run(plain(), resuming, 24, sigmas=TWO_STEPS)


def test_a_snapshot_of_a_clip_is_no_stream(run):
    saving = snapshots.ForcingSnapshot.execute(CausalSampler(OPTIONS), "c", 2, False).result[0]
    hostkit.run(plain(), saving, 12, sigmas=TWO_STEPS)
    with pytest.raises(ForcingError, match="of a clip with all its latents"):
        run(how=snapshots.ForcingResume.execute(CausalSampler(OPTIONS), "c.safetensors").result[0])


# -- routes ---------------------------------------------------------------------------------------------------

def client(test):
    """Run an async test with (aiohttp client, streams with the running stream "p.1")."""
    async def go():
        streams = routes.Streams()
        streams.begin(Live("p.1", "1", "p", 16.0, Steering()))
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(routes.table(streams))
        async with TestClient(TestServer(app)) as asked:
            await test(asked, streams)
    asyncio.run(go())


BODIES = [(b'{"kind": "pause"}', 200), (b"{", 400), (b"", 400), (b"[]", 400), (b"\xff\xfe", 400), (b'{"kind": "boom"}', 400),
          (b'{"kind": "seed", "seed": 1e999}', 400), (b'{"kind": "seed", "seed": NaN}', 400), (b"[" * 60000, 400),
          (b'{"kind": "seed", "seed": ' + b"9" * 6000 + b"}", 400), (b'{"kind": "prompt", "text": "a"}', 409),
          (b" " * 65535 + b"{}", 413), (b'{"kind": "prompt", "text": "' + b"a" * 70000 + b'"}', 413)]


def test_commands_are_answered_without_tracebacks():
    async def test(asked, streams):
        for body, status in BODIES:
            answer = await asked.post("/forcing/streams/p.1/commands", data=body)
            said = await answer.json()
            assert answer.status == status, (body[:60], said)
            assert said == {"number": 1, "at_block": 0} if status == 200 else list(said) == ["error"] and \
                "Traceback" not in said["error"] and len(said["error"]) < 300
        for path in ("/forcing/streams/x", "/forcing/streams/..%2f..%2fetc", "/forcing/streams/x/frames"):
            assert (await asked.get(path)).status == 404
        assert (await asked.post("/forcing/streams/x/commands", data=b"{}")).status == 404
        streams.running("p.1").over()
        answer = await asked.post("/forcing/streams/p.1/commands", data=b'{"kind": "pause"}')
        assert answer.status == 409 and "is over" in (await answer.json())["error"]
        assert (await asked.get("/forcing/streams/p.1")).status == 200
    client(test)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(
    inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)
NAMES = ("text", "transition", "blocks", "seed", "strength", "name", "client")
NEAR = st.fixed_dictionaries({"kind": st.sampled_from(["prompt", "seed", "lora", "pause", "resume", "stop"])},
                             optional={name: JSON | st.sampled_from(["fox", "cut", 3, 1.0]) for name in NAMES})


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given((JSON | NEAR).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200))
def test_any_body_is_a_command_or_a_problem(body):
    """Never another exception; what is taken is in the mailbox and can be carried out."""
    streams, steering = routes.Streams(), Steering(prepare=lambda text: text)
    streams.begin(Live("p.1", "1", "p", 16.0, steering))
    try:
        said = routes.carry_out(streams, "p.1", body)
    except routes.Problem as problem:
        assert problem.status in (400, 409, 413) and str(problem)
        return
    assert said == {"number": 1, "at_block": 0}
    steering.send(Command("stop"))
    assert len(steering.boundary(Block(0, 0, 3))) == 2
    json.dumps(streams.state("p.1"))


def test_a_failure_inside_is_an_answer_too(caplog):
    async def test(asked, streams):
        streams.running("p.1").steering.check = lambda command: 1 / 0
        answer = await asked.post("/forcing/streams/p.1/commands", data=b'{"kind": "pause"}')
        assert answer.status == 500 and "division" not in await answer.text()
    client(test)
    assert "ZeroDivisionError" in caplog.text


def test_states_pictures_and_the_last_finished_ones():
    async def test(asked, streams):
        live = streams.running("p.1")
        live.previews.after(-1)
        live.previews.push(0, numpy.zeros((3, 64, 64, 3), numpy.uint8))
        found = await (await asked.get("/forcing/streams/p.1/frames?after=0")).json()
        assert (found["first"], found["newest"], found["fps"], len(found["frames"])) == (1, 2, 16.0, 2)
        assert base64.b64decode(found["frames"][0])[:2] == b"\xff\xd8"
        assert (await asked.get("/forcing/streams/p.1/frames?after=1;2")).status == 400
        for number in range(12):
            other = Live(f"q.{number}", "1", "q", 16.0, Steering())
            streams.begin(other)
            other.over("broken")
        states = (await (await asked.get("/forcing/streams")).json())["streams"]
        assert [s["id"] for s in states] == ["p.1", *(f"q.{n}" for n in range(11, 3, -1))]
        assert states[1]["status"] == "failed" and states[1]["error"] == "broken"
    client(test)


def test_two_clients_see_what_either_does():
    async def test(asked, streams):
        one, two = await asked.ws_connect("/forcing/streams/p.1/ws"), await asked.ws_connect("/forcing/streams/p.1/ws")
        assert (await one.receive_json())["type"] == "state" and (await two.receive_json())["status"] == "starting"
        await one.send_json({"kind": "seed", "seed": 4, "client": "one"})
        await two.send_json({"kind": "seed", "seed": 5, "client": "two"})
        assert await one.receive_json() == {"type": "ack", "number": 1, "at_block": 0}
        assert (await two.receive_json())["number"] == 2
        await two.send_str("{")
        assert (await two.receive_json())["status"] == 400
        live = streams.running("p.1")
        live.steering.boundary(SimpleNamespace(index=0, first=0))
        live.changed()
        for socket in (one, two):
            state = await socket.receive_json()
            assert [(e["client"], e["seed"]) for e in state["log"]] == [("one", 4), ("two", 5)]
        await one.send_str("x" * 70000)
        assert (await one.receive()).type.name in ("CLOSE", "CLOSED", "ERROR")
        await two.close()
    client(test)


def test_routes_are_only_added_where_there_is_a_server(monkeypatch):
    table, told = web.RouteTableDef(), []
    instance = SimpleNamespace(routes=table, send_sync=lambda event, state: told.append((event, state["id"])))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=type("P", (), {})))
    routes.register()
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    routes.register()
    assert [(route.method, route.path) for route in table] == [(method, path) for method, path, _ in routes.ROUTES]
    assert {route.path.split("/")[1] for route in table} == {"forcing"}
    streams = routes.Streams()
    streams.begin(Live("p.1", "1", "p", 16.0, Steering()))
    assert told == [("forcing.stream", "p.1")]


def test_comfyui_serves_the_routes(comfy_server):
    """Behind its own middleware: a page of another site is turned away."""
    for prefix in ("", "/api"):
        assert comfy_server.get(f"{prefix}/forcing/streams") == {"streams": []}
    foreign = urllib.request.Request(f"{comfy_server.url}/forcing/streams", headers={"Sec-Fetch-Site": "cross-site"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(foreign, timeout=10)
