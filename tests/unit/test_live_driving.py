"""Worlds that keys steer while they are made: what a frame is driven by, record and replay, waiting, what is refused."""
from types import SimpleNamespace

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.live import ActionTrack, CameraTrack, LiveConfig, LiveDenoiser, LiveModel, live_rollout
from forcing_pack.forcing_core.live.camera_path import preset_path
from forcing_pack.forcing_core.live.conditions import ACTIONS, check_track
from forcing_pack.forcing_core.live.driving import KINDS, ActionDrive, LiveHelm, Pace
from forcing_pack.forcing_core.live.random import fill
from forcing_pack.forcing_core.live.rollout import context_noise
from forcing_pack.forcing_core.micro import live as micro
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import Block
from forcing_pack.forcing_core.steering import Command, Refused, SteeredNoise, Steering, read_log, write_log
from forcing_pack.forcing_core.streaming import ENDLESS

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = micro.live_config(32, 1)
PLAN = {1: [Command("drive", held="left")], 3: [Command("drive", held="forward"), Command("drive", held="back")],
        5: [Command("drive")], 7: [Command("seed", seed=4)], 13: [Command("stop")]}


@pytest.fixture(scope="module")
def net():
    return fill(LiveModel(CONFIG), 1)


@torch.no_grad()
def play(net, plan=None, script=(), new=ENDLESS, prepared=None):
    """(latents, steering, drive, denoiser) of a video; plan: index of a block -> commands that are sent when it is there."""
    drive, noise = ActionDrive(CONFIG, 1 + new, prepared), SteeredNoise(BlockNoise(1, (1, 16), (8, 8)))
    drive.decide(1)
    steering = Steering(script, kinds=KINDS, check=lambda c: drive.read(c.held), pixels=lambda frame: frame)
    denoiser = LiveDenoiser(net, drive, noise, context_noise(CONFIG, 2), CONFIG.window)
    made = []
    for block, x0 in live_rollout(net, drive, torch.zeros(1, 16, 1, 8, 8), new, noise, steps=2, denoiser=denoiser,
                                  steer=LiveHelm(steering, drive, noise, Pace(0))):
        made.append(x0)
        for command in (plan or {}).get(block.index, ()):
            steering.send(command)
    return torch.cat(made, dim=2), steering, drive, denoiser


def names(rows):
    return [[ACTIONS[i] for i in row.nonzero()[:, 0].tolist()] for row in rows]


def test_what_was_played_is_replayed_bit_for_bit(net):
    """An endless world: commands act on the next frame, the log says on which, and it alone makes the same video again."""
    made, steering, drive, denoiser = play(net, PLAN)
    assert made.shape[2] == 14
    assert [(e.block, e.at_frame, e.command.kind, e.command.held) for e in steering.log] == [
        (2, 3, "drive", "left"), (4, 5, "drive", "forward"), (4, 5, "drive", "back"), (6, 7, "drive", ""),
        (8, 9, "seed", ""), (14, 15, "stop", "")]
    again, other, *_ = play(net, script=read_log(write_log(steering.log)))
    assert torch.equal(again, made) and other.log == steering.log
    alone = play(net, new=14)[0]
    assert torch.equal(alone[:, :, :2], made[:, :, :2]) and not torch.equal(alone[:, :, 2], made[:, :, 2])
    assert denoiser.held == tuple(range(7, 14)) and denoiser.nbytes > 0  # frame 14 has had no clean pass


def test_the_same_frames_as_with_a_track_that_was_known_before(net):
    pressed = ["none"] * 3 + ["left"] * 2 + ["back"] * 2 + ["none"] * 8
    rows = torch.zeros(15, len(ACTIONS))
    for frame, name in enumerate(pressed):
        if name != "none":
            rows[frame, ACTIONS.index(name)] = 1
    plan = {at: commands for at, commands in PLAN.items() if at in (1, 3, 5, 13)}
    with torch.no_grad():
        wanted = live_rollout(net, ActionTrack(rows), torch.zeros(1, 16, 1, 8, 8), 14, BlockNoise(1, (1, 16), (8, 8)), steps=2)
        wanted = torch.cat([x0 for _, x0 in wanted], dim=2)
    assert torch.equal(play(net, plan)[0], wanted)


def test_a_prepared_track_drives_until_something_is_held(net):
    prepared = ActionTrack.parse("0: right\n3: left", 6)
    drive = ActionDrive(CONFIG, ENDLESS, prepared)
    drive.decide(8)
    assert names(drive.window(0, 8)) == [["right"]] * 3 + [["left"]] * 3 + [[]] * 2
    drive = ActionDrive(CONFIG, ENDLESS, prepared)
    drive.decide(2)
    drive.hold("forward")
    drive.decide(3)
    drive.hold("")
    drive.decide(5)
    assert names(drive.window(0, 5)) == [["right"], ["right"], ["forward"], [], []]
    assert names(drive.window(1, 2)) == [["right"], ["forward"]]


def test_an_endless_track_remembers_one_window(net):
    drive = ActionDrive(CONFIG, ENDLESS)
    for frame in range(100):
        drive.hold("left" if frame % 2 else "right")
        drive.decide(frame + 1)
    assert len(drive._newest) == CONFIG.window and names(drive.window(98, 2)) == [["right"], ["left"]]


class Clock:
    def __init__(self):
        self.now, self.slept = 10.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(round(seconds, 6))
        self.now += seconds


def test_frames_wait_for_their_time_and_late_ones_do_not():
    """By hand, at 10 a second: the first one at once, then one each 0.1 s; what took too long is not made up for."""
    clock, seen = Clock(), []
    pace = Pace(10.0, lambda: seen.append(clock.now), clock, clock.sleep)
    starts = []
    for work in (0.02, 0.02, 0.5, 0.02, 0.02):
        pace.wait(1)
        starts.append(round(clock.now, 6))
        clock.now += work
    assert starts == [10.0, 10.1, 10.2, 10.7, 10.8] and seen and max(clock.slept) <= 0.05
    Pace(0, lambda: 1 / 0, clock, clock.sleep).wait(1)


def test_a_waiting_world_can_be_interrupted():
    clock = Clock()
    pace = Pace(1.0, lambda: (_ for _ in ()).throw(KeyboardInterrupt), clock, clock.sleep)
    pace.wait(1)
    with pytest.raises(KeyboardInterrupt):
        pace.wait(1)


def test_commands_are_taken_when_a_frame_begins_not_when_it_was_waited_for():
    """What is sent while a frame waits for its time acts on that frame."""
    drive = ActionDrive(CONFIG, ENDLESS)
    steering = Steering(kinds=KINDS, pixels=lambda frame: frame)
    pace = SimpleNamespace(wait=lambda frames: steering.send(Command("drive", held="left")))
    assert LiveHelm(steering, drive, None, pace)(Block(0, 0, 1))
    assert names(drive.window(0, 1)) == [["left"]]


CAMERA = LiveConfig(dim=64, heads=2, layers=1, latent=(4, 4), window=4, rope=(4, 14, 14))
BOTH = ActionTrack.parse("0: left forward", 4)


@pytest.mark.parametrize(("make", "fix"), [
    (lambda: ActionDrive(CONFIG, 9).hold("jump"), "not trained on the action jump. Use left, right, forward, back"),
    (lambda: ActionDrive(CONFIG, 9).hold("left forward"), "Hold one of them"),
    (lambda: ActionDrive(CONFIG, 9).hold("fly"), "Use one of inventory"),
    (lambda: ActionDrive(CONFIG, 9).hold("left=2"), "between 0 and 1"),
    (lambda: ActionDrive(CONFIG, 9).hold("left=x"), "Write it like"),
    (lambda: ActionDrive(CAMERA, 9), "Choose the micro LIVE"),
    (lambda: ActionDrive(CONFIG, 9, BOTH), "Hold one of them"),
    (lambda: ActionDrive(CONFIG, 9, CameraTrack(preset_path("still", 4), (4, 4))), "Connect a track of the kind action"),
    (lambda: check_track(BOTH, CONFIG, 4), "forward and left together"),
    (lambda: check_track(ActionTrack.parse("0: sneak", 4), CONFIG, 4), "not trained on the action sneak"),
    (lambda: check_track(ActionTrack.parse("0: left", 4), CONFIG, 5), "Make the track 5 frames long")])
def test_what_the_network_does_not_know_is_refused_with_a_fix(make, fix):
    with pytest.raises(ForcingError, match=fix):
        make()


def test_a_network_of_all_actions_takes_them_together():
    config = LiveConfig(dim=32, heads=1, layers=1, latent=(4, 4), window=4, rope=(4, 14, 14), condition="action",
                        condition_dim=25)
    drive = ActionDrive(config, 9)
    drive.hold("forward jump cameraX=0.2")
    drive.decide(1)
    assert names(drive.window(0, 1)) == [["forward", "cameraX", "jump"]] and drive.names == ACTIONS


def test_videos_that_prompts_steer_know_no_keys_and_worlds_no_prompts():
    with pytest.raises(Refused, match="knows no command drive. Use one of prompt"):
        Steering().send(Command("drive", held="left"))
    with pytest.raises(Refused, match="knows no command prompt. Use one of drive"):
        Steering(kinds=KINDS, prepare=len).send(Command("prompt", text="a red circle"))
