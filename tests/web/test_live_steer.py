"""Steering a world from its panel: what is sent when, keys, buttons and gamepad, and a real world played and replayed."""
import hashlib
import json
import re
import time

import av
import pytest
from forcing_pack.forcing_core.micro import live
from forcing_pack.forcing_core.streaming.note import read_note
from forcing_testkit import micro

# -- by themselves --------------------------------------------------------------------------------------------

HOLD = """async ({ live_holder: { Holder } }, [steps, together]) => {
    const sent = []
    let block = -1
    const holder = new Holder(async ({ kind, held }) => {
        sent.push(`${kind} ${held}`)
        return held === 'refused' ? null : { at_block: block + 1 }
    })
    holder.together = together
    for (const [act, ...rest] of steps) {
        if (act === 'made') block = rest[0]
        holder[act](...rest)
        if (act === 'press' && rest[0] === 'tap') holder.release('tap') // before the server answered
        await new Promise((resolve) => setTimeout(resolve))
    }
    return sent
}"""


def test_one_command_a_block(js):
    """A press goes at once; its release waits for the block that saw it, and what happened meanwhile is left out."""
    steps = [["made", 4], ["press", "key a", "left"], ["press", "key a", "left"], ["release", "key a"], ["made", 4]]
    assert js(HOLD, [steps, False]) == ["drive left"]
    assert js(HOLD, [[*steps, ["made", 5]], False]) == ["drive left", "drive "]
    taps = [["press", "b", "right"], ["release", "b"], ["press", "c", "back"], ["release", "c"]]
    made = [["made", block] for block in range(5, 10)]
    assert js(HOLD, [[*steps, *taps, *made], False]) == ["drive left", "drive right", "drive back", "drive "]
    assert js(HOLD, [[["made", 4], ["press", "tap", "left"], ["made", 4], ["made", 5]], False]) == ["drive left", "drive "]
    twice = [*steps, ["press", "key a", "left"], ["release", "key a"], *made]
    assert js(HOLD, [twice, False]) == ["drive left", "drive ", "drive left", "drive "]


def test_of_several_keys_the_newest_counts_or_all_of_them(js):
    steps = [["made", 1], ["press", "a", "left"], ["made", 2], ["press", "b", "forward"], ["made", 3], ["release", "b"],
             ["made", 4], ["press", "pad", "left"], ["made", 5], ["releaseAll"], ["made", 6], ["release", "b"]]
    assert js(HOLD, [steps, False]) == ["drive left", "drive forward", "drive left", "drive "]
    assert js(HOLD, [steps, True]) == ["drive left", "drive left forward", "drive left", "drive "]


def test_only_some_sources_are_let_go_of(js):
    steps = [["made", 1], ["press", "key a", "left"], ["made", 2], ["press", "gamepad right", "right"], ["made", 3],
             ["releaseAll", "gamepad"], ["made", 4], ["releaseAll", "key"], ["made", 5]]
    assert js(HOLD, [steps, False]) == ["drive left", "drive right", "drive left", "drive "]


def test_what_the_server_refused_was_not_told(js):
    steps = [["made", 1], ["press", "a", "refused"], ["made", 2], ["press", "b", "left"], ["made", 3]]
    assert js(HOLD, [steps, False]) == ["drive refused", "drive left"]


def test_a_gamepad_holds_by_stick_and_cross(js):
    held = js("""({ live_pad: { gamepadHolds } }, pads) => pads.map(({ axes, down }) =>
        [...gamepadHolds({ axes, buttons: Array.from({ length: 16 }, (_, i) => ({ pressed: down.includes(i) })) })])""",
              [{"axes": [0.2, -0.9], "down": []}, {"axes": [0.8, 0.1], "down": [12]}, {"axes": [], "down": [0, 14]},
               {"axes": [0, 0], "down": []}])
    assert [sorted(names) for names in held] == [["forward"], ["forward", "right"], ["jump", "left"], []]


# -- a made-up world ------------------------------------------------------------------------------------------

DRIVE = {"actions": ["left", "right", "forward", "back"], "held": "", "together": False}
STATE = {"id": "made.world", "node": "", "prompt_id": "made", "status": "running", "block": 3, "frames": 5, "seconds": 0.6,
         "fps": 8, "speed": 8.0, "buffered_seconds": 0, "memory_bytes": 1234567890, "store_bytes": 81_000, "drive": DRIVE,
         "window": {"kept": [[0, 4]], "policy": "LIVE"}, "prompt": "", "seed": 7, "lora": [], "error": None, "log": [],
         "file": {"filename": "Forcing_00001_.mp4", "subfolder": "video", "type": "output", "format": "mp4"}}
TELL = "state => window.comfyAPI.api.api.dispatchCustomEvent('forcing.stream', state)"
GAMEPAD = """down => {
    const pad = { connected: true, axes: [0, 0], buttons: Array.from({ length: 16 }, (_, i) => ({ pressed: i === down })) }
    navigator.getGamepads = () => down === null ? [null] : [null, pad]
    window.dispatchEvent(new Event('gamepadconnected'))
}"""


class Panel:
    def __init__(self, comfy):
        self.comfy, self.page = comfy, comfy.page
        self.root = self.page.get_by_role("group", name="Live video")

    def button(self, name):
        return self.root.get_by_role("button", name=name)

    def focus(self):
        self.root.locator(".forcing-screen").click()

    def status(self, wanted, timeout=120_000):
        self.page.wait_for_function("wanted => document.querySelector('.forcing-live')?.dataset.status === wanted", arg=wanted,
                                    timeout=timeout)

    def shows(self, frame, timeout=120_000):
        """Wait until a frame of that number, or a later one, is on the screen."""
        self.page.wait_for_function("n => Number(document.querySelector('.forcing-picture').dataset.frame ?? -1) >= n",
                                    arg=frame, timeout=timeout)


@pytest.fixture
def made_up(rendered, add_node):
    """(panel, tell, held): a panel of a world that the test makes up; held(): what was sent since it was last asked."""
    commands = []

    def respond(route):
        if "/commands" in route.request.url:
            commands.append(json.loads(route.request.post_data))
            return route.fulfill(json={"number": len(commands), "at_block": 0})
        route.fulfill(json={"first": 0, "fps": 8, "frames": [], "newest": -1})

    rendered.page.route("**/forcing/streams/made.world/**", respond)
    node = add_node("ForcingLiveStream")
    panel = Panel(rendered)
    panel.root.wait_for()

    def held(count):
        until = time.monotonic() + 20
        while len(commands) < count and time.monotonic() < until:
            panel.page.wait_for_timeout(20)
        panel.page.wait_for_timeout(50)
        seen = [command["held"] for command in commands if command["kind"] == "drive"]
        commands.clear()
        return seen

    yield panel, lambda **change: rendered.evaluate(TELL, STATE | {"node": str(node)} | change), held
    rendered.evaluate(GAMEPAD, None)
    rendered.evaluate(TELL, STATE | {"status": "done"})
    rendered.page.unroute("**/forcing/streams/made.world/**")


def test_keys_buttons_and_gamepad_hold(made_up, rendered, picture, request):
    panel, tell, held = made_up
    keyboard = panel.page.keyboard
    assert panel.button("Left").is_disabled() and panel.root.get_by_text("Click here, then arrow keys").count()
    tell()
    panel.focus()
    panel.root.get_by_text("Arrow keys, WASD or a gamepad", exact=True).wait_for()
    keyboard.down("ArrowLeft")
    keyboard.down("KeyW")
    assert held(2) == ["left", "forward"]
    tell(drive=DRIVE | {"held": "forward"})
    panel.root.locator('[data-action="forward"][aria-pressed="true"]').wait_for()
    picture(f"live_steer_{request.node.callspec.id}", panel.root)
    keyboard.up("KeyW")
    keyboard.up("ArrowLeft")
    assert held(2) == ["left", ""]
    keyboard.press("KeyX")
    keyboard.press("Control+KeyA")
    panel.button("Back").hover()
    panel.page.mouse.down()
    assert held(1) == ["back"]
    panel.page.mouse.up()
    assert held(1) == [""]
    rendered.evaluate(GAMEPAD, 15)
    assert held(1) == ["right"]
    rendered.evaluate(GAMEPAD, 5)
    assert held(1) == [""]
    assert rendered.evaluate("app.graph.nodes.length") == 1 and rendered.messages_about("forcing") == []


def test_keys_are_let_go_of_with_the_focus_and_never_taken_from_elsewhere(made_up, rendered):
    panel, tell, held = made_up
    tell()
    panel.focus()
    panel.page.keyboard.down("ArrowRight")
    assert held(1) == ["right"]
    rendered.evaluate("document.activeElement.blur()")
    assert held(1) == [""]
    panel.page.keyboard.up("ArrowRight")
    panel.page.keyboard.press("ArrowUp")
    panel.button("Forward").focus()
    panel.page.keyboard.press("Enter")
    assert held(2) == ["forward", ""]
    tell(status="done")
    panel.focus()
    panel.page.keyboard.press("ArrowDown")
    assert held(0) == []


def test_what_was_held_is_told_in_words(made_up):
    panel, tell, held = made_up
    entry = {"kind": "drive", "client": "a script"}
    log = [{"number": 1, "block": 1, "at_frame": 2, "held": "left", **entry}, {"number": 2, "block": 2, "at_frame": 3, **entry}]
    tell(log=log)
    panel.root.get_by_text("block 1: holds left, by a script").wait_for()
    panel.root.get_by_text("block 2: holds nothing, by a script").wait_for()
    assert panel.root.get_by_role("textbox").count() == 0  # nothing of prompts


# -- a real one -----------------------------------------------------------------------------------------------

LOOK = """() => {
    const stream = app.graph.nodes.find(node => node.type === 'ForcingLiveStream')
    Object.assign(app.canvas.ds, { scale: 0.9, offset: [100 - stream.pos[0], 120 - stream.pos[1]] })
    app.canvas.setDirty(true, true)
}"""


@pytest.fixture(scope="module")
def bundled(require):
    require(micro.trained() and live.bundled(), "web tests of micro LIVE: its weights are not in forcing_core/micro/weights",
            "run 'python -m forcing_core train live --out forcing_core/micro/weights', or check out the whole repository")


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def world(**more):
    stream = {"seed": time.time_ns() % 1000000, "length": 0.0, "fps": 8.0, "real_time": True,
              "filename_prefix": "video/steer", "format": "mkv lossless", "steps": 4, "window": 8, **more}
    return {"live": node("ForcingLiveCheckpoint", checkpoint=live.CHOICE, autoencoder="inside the checkpoint", dtype="default"),
            "start": node("ForcingMicroWorld", shape="square", colour="red", background="light"),
            "stream": node("ForcingLiveStream", live=["live", 0], image=["start", 0], **stream)}


def hashes(path):
    with av.open(str(path)) as video:
        return [hashlib.sha256(frame.to_ndarray(format="rgb24").tobytes()).hexdigest() for frame in video.decode(video=0)]


def test_play_and_replay(bundled, comfy_server, rendered, ended, tmp_path, request):
    """Run, steer by keyboard and pad, stop: the record alone makes the same frames again, and no record others."""
    played = world()
    (tmp_path / "world.json").write_text(json.dumps(played))
    rendered.load_workflow(tmp_path / "world.json")
    rendered.evaluate(LOOK)
    panel = Panel(rendered)
    rendered.page.get_by_test_id("queue-button").click()
    panel.shows(1)
    state, = (state for state in comfy_server.get("/forcing/streams")["streams"] if state["status"] == "running")
    address = f"/forcing/streams/{state['id']}"
    panel.focus()
    began = time.monotonic()
    panel.page.keyboard.down("ArrowLeft")
    panel.root.get_by_text("holds left").first.wait_for(timeout=60_000)
    at = comfy_server.get(address)["log"][0]["at_frame"]
    panel.shows(at)
    request.config.get_terminal_writer().line(
        f" Key to its first frame on the screen: {time.monotonic() - began:.2f} s (frame {at})")
    panel.page.keyboard.up("ArrowLeft")
    panel.root.get_by_text("holds nothing").first.wait_for(timeout=60_000)
    panel.page.keyboard.press("KeyW")
    panel.root.get_by_text("holds forward").first.wait_for(timeout=60_000)
    panel.button("Right").hover()
    panel.page.mouse.down()
    panel.root.get_by_text("holds right").first.wait_for(timeout=60_000)
    panel.page.mouse.up()
    panel.shows(comfy_server.get(address)["frames"] + 2)
    panel.button("Stop and keep").click()
    panel.status("done")
    state = comfy_server.get(address)
    file = comfy_server.output / state["file"]["subfolder"] / state["file"]["filename"]
    made, log = hashes(file), comfy_server.get(f"{address}/log")
    assert len(made) == state["frames"] > at and read_note(file)["log"] == log["log"]
    held = [entry.get("held", "") for entry in log["log"] if entry["kind"] == "drive"]
    assert list(dict.fromkeys(held)) == ["left", "", "forward", "right"] and log["log"][-1]["kind"] == "stop"
    assert all(re.fullmatch("page .+", entry["client"]) for entry in log["log"])
    assert rendered.messages_about("forcing") == [] and rendered.errors == []
    seed = played["stream"]["inputs"]["seed"]
    again, alone = (comfy_server.run(world(seed=seed, real_time=False, **more), timeout=240)
                    for more in ({"replay": json.dumps(log)}, {"length": (len(made) - 1) / 8}))
    assert hashes(comfy_server.files(again, "stream")[0]) == made
    other = hashes(comfy_server.files(alone, "stream")[0])
    assert len(other) == len(made) and other[:at] == made[:at] and other[at] != made[at]
