"""The live panel: pacing by itself, its drawing and commands against a made-up stream, and a real one on the micro model."""
import base64
import io
import json
import re
import time

import av
import pytest
from forcing_testkit import micro
from PIL import Image

# -- by themselves --------------------------------------------------------------------------------------------

PLAY = """({ live_player: { FrameQueue } }, steps) => {
    const queue = new FrameQueue()
    return steps.map(([now, first, count]) => {
        if (count) queue.push(first, Array(count).fill('x'), 16, now)
        return queue.due(now)?.number ?? null
    }).concat(queue.dropped)
}"""


def test_frames_are_paced_by_the_video(js):
    """By hand, at 16 a second: one each 62.5 ms, the last one stays, and late blocks go on from when they come."""
    steps = [[1.0, 0, 4], [1.03, 0, 0], [1.07, 0, 0], [1.13, 0, 0], [1.19, 0, 0], [1.5, 0, 0], [3.0, 4, 2], [3.07, 0, 0]]
    assert js(PLAY, steps) == [0, None, 1, 2, 3, None, 4, 5, 0]


def test_late_frames_are_left_out(js):
    """A drawing that took 0.3 s skips what was due meanwhile; what comes twice is shown once."""
    assert js(PLAY, [[0.0, 0, 8], [0.3, 0, 0], [0.3, 0, 8], [0.5, 0, 0]]) == [0, 4, None, 7, 5]


def test_a_picture_far_behind_jumps_to_the_newest_block(js):
    """Made four times as fast as it plays: the picture never lags by more than two seconds. A gap is no wait either."""
    blocks = [[0.25 * i, 16 * i, 16] for i in range(5)]
    *shown, dropped = js(PLAY, blocks)
    assert shown == [0, 4, 32, 36, 64] and dropped == 64 - 4
    assert js(PLAY, [[0.0, 0, 2], [0.2, 90, 2], [0.27, 0, 0]]) == [0, 90, 91, 1]


def test_a_turn_is_shown_as_soon_as_it_is_there(js):
    """Frames 0 to 31 wait, 32 is the first of another prompt: it leaves out what waits, and plays on from there. Told again it
    does nothing; told late it jumps at once; a turn that was shown already is none."""
    turn = """({ live_player: { FrameQueue } }, steps) => {
        const queue = new FrameQueue()
        return steps.map(([now, first, count, turn]) => {
            if (count) queue.push(first, Array(count).fill('x'), 16, now)
            if (turn >= 0) queue.turnAt(turn, now)
            return queue.due(now)?.number ?? null
        }).concat(queue.dropped)
    }"""
    assert js(turn, [[0.0, 0, 32, -1], [0.07, 0, 0, 32], [0.15, 32, 12, -1], [0.22, 0, 0, 32], [0.29, 0, 0, 1]]) == [
        0, 1, 32, 33, 34, 30]
    assert js(turn, [[0.0, 0, 32, -1], [0.07, 0, 0, 16], [0.14, 0, 0, -1]]) == [0, 16, 17, 15]
    assert js(turn, [[0.0, 0, 12, -1], [0.2, 0, 0, -1], [0.27, 0, 0, 2]]) == [0, 3, 4, 2]


def test_the_running_stream_of_a_node_wins(js):
    found = js("""async ({ live_client: { LiveClient } }) => {
        const api = Object.assign(new EventTarget(), { fetchApi: async () => ({ ok: true, json: async () => ({ streams: [
            { id: 'a', node: '3:7', status: 'running' }, { id: 'old', node: '8', status: 'done' }] }) }) })
        const client = new LiveClient(api)
        await client.refresh()
        const seen = [client.latest(['3:7'])?.id, client.latest(['7'])?.id, client.latest(['8'])?.id]
        client.take({ id: 'b', node: '3:7', status: 'failed' })
        seen.push(client.latest(['7', '3:7']).id)
        client.take({ id: 'a', node: '3:7', status: 'done' })
        client.take({ id: 'c', node: '3:7', status: 'starting' })
        return [...seen, client.latest(['3:7']).id]
    }""")
    assert found == ["a", None, None, "a", "c"]


def test_bytes(js):
    wanted = {0: "0 B", 999: "999 B", 1770000: "1.77 MB", 637_000_000: "637 MB", 1234567890: "1.23 GB", 81e9: "81.0 GB"}
    found = js("({ live_panel: { bytes } }, counts) => counts.map(bytes)", list(wanted))
    assert found == list(wanted.values())


# -- a made-up stream -----------------------------------------------------------------------------------------

BLOCK_FRAMES, DECODE = 12, 0.7  # s to decode a block, encode its previews, send and draw them
STATE = {"id": "made.up", "node": "", "prompt_id": "made", "status": "running", "block": 3, "frames": 45, "seconds": 2.8,
         "fps": 16, "speed": 11.25, "buffered_seconds": -1.5, "memory_bytes": 1234567890, "store_bytes": 81_000_000,
         "window": {"kept": [[0, 3], [6, 12]], "policy": "Window"}, "prompt": "a red circle", "seed": 7,
         "lora": [{"name": "lora 1", "strength": 1.0}], "error": None, "log": [],
         "file": {"filename": "Forcing_00001_.mp4", "subfolder": "video", "type": "output", "format": "mp4"}}
HOSTILE = "<img src=x onerror='window.hacked = 1'> a blue circle"
TELL = "state => window.comfyAPI.api.api.dispatchCustomEvent('forcing.stream', state)"


def jpeg():
    data = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(data, "JPEG")
    return base64.b64encode(data.getvalue()).decode()


class Panel:
    def __init__(self, comfy):
        self.comfy, self.page = comfy, comfy.page
        self.root = self.page.get_by_role("group", name="Live video")
        self.prompt = self.root.get_by_role("textbox", name="Prompt of what comes next")

    def button(self, name):
        return self.root.get_by_role("button", name=name)

    def status(self, wanted, timeout=120_000):
        self.page.wait_for_function("wanted => document.querySelector('.forcing-live')?.dataset.status === wanted", arg=wanted,
                                    timeout=timeout)

    def shows(self, frame, timeout=120_000):
        """Wait until a frame of that number, or a later one, is on the screen."""
        self.page.wait_for_function("n => Number(document.querySelector('.forcing-picture').dataset.frame ?? -1) >= n",
                                    arg=frame, timeout=timeout)

    def logs(self, words, timeout=120_000):
        self.page.wait_for_function("words => document.querySelector('.forcing-log').textContent.includes(words)", arg=words,
                                    timeout=timeout)


@pytest.fixture
def made_up(rendered, add_node):
    """(panel, tell, commands, answers): a panel of a stream that the test makes up."""
    commands, answers = [], [(200, {"number": 1, "at_block": 4})]

    def respond(route):
        if "/commands" in route.request.url:
            commands.append(json.loads(route.request.post_data))
            status, body = answers[-1]
            return route.fulfill(status=status, json=body)
        after = int(re.search(r"after=(-?\d+)", route.request.url)[1])
        numbers = range(after + 1, 45)
        route.fulfill(json={"first": after + 1, "fps": 16, "frames": [jpeg() for _ in numbers], "newest": 44})

    rendered.page.route("**/forcing/streams/made.up/**", respond)
    node = add_node("ForcingStream")
    panel = Panel(rendered)
    panel.root.wait_for()
    yield panel, lambda **change: rendered.evaluate(TELL, STATE | {"node": str(node)} | change), commands, answers
    rendered.evaluate(TELL, STATE | {"status": "done"})
    rendered.page.unroute("**/forcing/streams/made.up/**")


def test_shows_a_stream_and_sends_commands(made_up, rendered, picture, request):
    panel, tell, commands, answers = made_up
    assert panel.button("Pause").is_disabled() and panel.prompt.is_disabled()
    tell()
    panel.shows(44, 20_000)
    for words in ("running", "11.3 frames/s", "\u22121.5 s", "2.8 s, block 3", "1.23 GB, cache 81.0 MB",
                  "9 latent frames (Window)"):
        assert words in panel.root.inner_text()
    assert panel.prompt.input_value() == "a red circle"
    rendered.set_setting("Comfy.ColorPalette", "light")
    picture(f"live_{request.node.callspec.id}_light", panel.root)
    panel.prompt.fill(HOSTILE)
    panel.root.get_by_role("combobox").select_option("soft")
    panel.root.get_by_role("spinbutton", name="Blocks").fill("6")
    panel.prompt.press("Control+Enter")
    panel.root.get_by_text("acts from block 4").wait_for()
    tell(block=4)  # the stream does not know it yet
    assert panel.prompt.input_value() == HOSTILE
    panel.root.get_by_role("spinbutton", name="Seed").fill("99")
    panel.button("Set the seed").click()
    panel.root.get_by_role("slider", name="lora 1").fill("0.5")
    panel.button("Pause").click()
    tell(status="paused")
    panel.button("Resume").click()
    panel.button("Stop and keep").click()
    for _ in range(100):  # a request is on its way after its click has returned
        if len(commands) < 6:
            panel.page.wait_for_timeout(50)
    sent = [{key: value for key, value in command.items() if key != "client"} for command in commands]
    assert sent == [{"kind": "prompt", "text": HOSTILE, "transition": "soft", "blocks": 6}, {"kind": "seed", "seed": 99},
                    {"kind": "lora", "strength": 0.5, "name": "lora 1"}, {"kind": "pause"}, {"kind": "resume"},
                    {"kind": "stop"}]
    assert all(re.fullmatch("page .+", command["client"]) for command in commands)
    assert panel.comfy.evaluate("app.graph.nodes.length") == 1  # Control+Enter ran nothing, no key reached the graph


def test_texts_of_others_are_only_text(made_up):
    """What another client wrote is shown as it is, and an own half-written prompt survives it."""
    panel, tell, commands, answers = made_up
    tell()
    panel.prompt.fill("half a")
    tell(prompt=HOSTILE, log=[{"number": 1, "block": 2, "at_frame": 21, "kind": "prompt", "text": HOSTILE,
                               "transition": "cut", "blocks": 4, "client": "<b>someone</b>"}])
    panel.logs("<img src=x")
    assert panel.prompt.input_value() == "half a"
    line, = panel.root.locator("li").all_inner_texts()
    assert line == f'block 2: cut to "{HOSTILE}", by <b>someone</b>'
    answers.append((409, {"error": "<b>There</b> is no text encoder."}))
    panel.prompt.press("Control+Enter")
    panel.root.get_by_text("refused it: <b>There</b> is no text encoder.").wait_for()
    tell(status="failed", error=HOSTILE)
    assert HOSTILE in panel.root.inner_text() and panel.prompt.is_disabled()
    assert panel.comfy.evaluate("window.hacked === undefined && !document.querySelector('.forcing-live :is(img, li b)')")


def test_finds_its_node_in_a_subgraph(made_up):
    panel, tell, commands, answers = made_up
    place = panel.comfy.evaluate("""() => {
        const { node, subgraph } = app.graph.convertToSubgraph(new Set(app.graph.nodes))
        app.canvas.openSubgraph(subgraph, node)
        return `${node.id}:${subgraph.nodes[0].id}`
    }""")
    tell(node=place, status="paused")
    panel.status("paused", 20_000)


# -- a real one -----------------------------------------------------------------------------------------------

LOOK = """() => {
    const stream = app.graph.nodes.find(node => node.type === 'ForcingStream')
    Object.assign(app.canvas.ds, { scale: 0.9, offset: [100 - stream.pos[0], 120 - stream.pos[1]] })
    app.canvas.setDirty(true, true)
}"""


@pytest.fixture(scope="module")
def bundled(require):
    require(micro.trained(), "web tests of the bundled model: its weights are not in forcing_core/micro/weights",
            "run 'python -m forcing_core train micro --out forcing_core/micro/weights', or check out the whole repository")


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def endless():
    """Three prompts by a track, then what the panel says, until it says stop."""
    script = "\n".join(f"{start} | a {colour} circle moving left on a dark background"
                       for start, colour in (("0", "red"), ("1", "green"), ("2 | keep", "blue")))
    return {
        "model": node("ForcingMicroModel", model="long"),
        "track": node("ForcingPromptTrack", clip=["model", 1], script=script, transition="recache", soft_blocks=4),
        "preset": node("ForcingPreset", system="longlive-infinity", keep_on_interrupt=False),
        "guider": node("ForcingGuider", model=["model", 0], positive=["track", 0], cfg=1.0),
        "noise": node("RandomNoise", noise_seed=time.time_ns() % 1000000),
        "latent": node("ForcingEmptyLatent", width=64, height=64, length=5.0, unit="seconds", block=3, fps=16.0, batch_size=1),
        "stream": node("ForcingStream", noise=["noise", 0], guider=["guider", 0], sampler=["preset", 0], sigmas=["preset", 1],
                       latent_image=["latent", 0], vae=["model", 2], clip=["model", 1], length=0.0, fps=16.0,
                       filename_prefix="video/live", format="mp4", offload_decoder=False)}


def test_watch_and_steer(bundled, comfy_server, rendered, ended, tmp_path, request, picture):
    """Run, watch, change the prompt, reload, be told by somebody else, pause, resume, stop: the file has every frame."""
    (tmp_path / "endless.json").write_text(json.dumps(endless()))
    rendered.load_workflow(tmp_path / "endless.json")
    rendered.evaluate(LOOK)
    panel, line = Panel(rendered), request.config.get_terminal_writer().line
    began = time.monotonic()
    rendered.page.get_by_test_id("queue-button").click()
    panel.shows(0)
    line(f" Run to the first frame on the screen: {time.monotonic() - began:.1f} s")
    state, = (state for state in comfy_server.get("/forcing/streams")["streams"] if state["status"] == "running")
    address = f"/forcing/streams/{state['id']}"
    panel.prompt.fill("a yellow square moving right on a light background")
    began = time.monotonic()
    panel.button("Change prompt").click()
    panel.logs("yellow square")
    at_frame = comfy_server.get(address)["log"][0]["at_frame"]
    panel.shows(at_frame)
    took, state = time.monotonic() - began, comfy_server.get(address)
    block = BLOCK_FRAMES / min(state["fps"], state["speed"])
    line(f" Change of prompt to its first frame on the screen: {took:.1f} s (frame {at_frame}, a block in {block:.2f} s)")
    assert took <= 2 * block + DECODE
    assert rendered.messages_about("forcing") == [] and rendered.errors == []
    rendered.open()
    rendered.load_workflow(tmp_path / "endless.json")
    rendered.evaluate(LOOK)
    panel.status("running")
    panel.logs("yellow square")
    comfy_server.post(f"{address}/commands", {"kind": "seed", "seed": 5, "client": "a script"})
    panel.logs("seed 5, by a script")
    panel.shows(at_frame + 1)
    panel.button("Pause").click()
    panel.status("paused")
    picture(f"live_{request.node.callspec.id}_dark", panel.root)
    frames = comfy_server.get(address)["frames"]
    panel.button("Resume").click()
    panel.shows(frames)
    panel.button("Stop and keep").click()
    panel.status("done")
    state = comfy_server.get(address)
    assert [entry["kind"] for entry in state["log"]] == ["prompt", "seed", "pause", "resume", "stop"]
    file = comfy_server.output / state["file"]["subfolder"] / state["file"]["filename"]
    with av.open(str(file)) as video:
        assert sum(1 for _ in video.decode(video=0)) == state["frames"] > frames
    assert f"done: {file.name}" in panel.root.inner_text()
    assert rendered.messages_about("forcing") == [] and rendered.errors == []
