"""Steering: what may be said, when it acts, and that the log says all that is needed to do it again, bit for bit."""
import json
import threading
import time
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core import snapshot
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import Block, layout
from forcing_pack.forcing_core.policies import RecomputeOptions, RollingOptions, WindowOptions, build
from forcing_pack.forcing_core.rollout import ROLLOUTS, RolloutState, Switch
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.steering import (
    Command,
    Helm,
    Refused,
    SteeredNoise,
    Steering,
    read_command,
    read_log,
    write_log,
)
from forcing_testkit import forcing_corekit as core
from forcing_testkit.policykit import GRID, SIZE, network

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = levels([1000, 500], 5.0)
FRAMES, BLOCKS = 16, 8
OPTIONS = {"block": WindowOptions(6, 2, 2, "relative"), "rolling": RollingOptions(8, 2, 2), "recompute": RecomputeOptions(5, 2)}
GOOD = [{"kind": "prompt", "text": "a"}, {"kind": "prompt", "text": "ü" * 20_000, "transition": "soft", "blocks": 2},
        {"kind": "seed", "seed": 0}, {"kind": "seed", "seed": (1 << 64) - 1, "client": "me"}, {"kind": "lora", "strength": -1},
        {"kind": "lora", "strength": 0.5, "name": "lora 2"}, {"kind": "pause"}, {"kind": "resume"}, {"kind": "stop"}]
BAD = [None, [], "pause", {}, {"kind": []}, {"kind": "explode"}, {"kind": "prompt"}, {"kind": "prompt", "text": " "},
       {"kind": "prompt", "text": 3}, {"kind": "prompt", "text": "a" * 20_001}, {"kind": "prompt", "text": "\ud800"},
       {"kind": "prompt", "text": "a\0"}, {"kind": "prompt", "text": "a", "transition": "fade"},
       {"kind": "prompt", "text": "a", "transition": {}}, {"kind": "prompt", "text": "a", "blocks": True},
       {"kind": "prompt", "text": "a", "blocks": 1}, {"kind": "prompt", "text": "a", "path": "/etc"}, {"kind": "seed"},
       {"kind": "seed", "seed": -1}, {"kind": "seed", "seed": 1 << 64}, {"kind": "seed", "seed": 1.0},
       {"kind": "lora", "strength": float("nan")}, {"kind": "lora", "strength": 101}, {"kind": "lora", "strength": "1"},
       {"kind": "lora", "strength": 10 ** 400}, {"kind": "pause", "client": 1}, {"kind": "stop", "blocks": 3}]


@pytest.mark.parametrize("value", GOOD, ids=lambda v: v["kind"])
def test_commands_come_back_as_they_were(value):
    command = read_command(value)
    assert read_command(json.loads(json.dumps(command.plain()))) == command
    assert all(command.plain()[name] == value[name] for name in value)


@pytest.mark.parametrize("value", BAD, ids=lambda v: str(v)[:40])
def test_what_makes_no_sense_is_refused(value):
    with pytest.raises(ForcingError):
        read_command(value)


def encode(text):
    """A prompt's text is a number here."""
    return core.prompts(1, int(text))


def blocks(count=BLOCKS):
    return layout(2 * count, 2)


@pytest.mark.parametrize("text, words", [
    ("{", "no JSON"), ("[1]", "Command 1.*no JSON object"), ("3", "no list"), ('{"log": 3}', "no list"),
    ("[" * 99999, "no JSON"),
    ('[{"kind": "stop"}]', "needs number, block"), ('[{"number": 1, "block": 1e400, "at_frame": 0, "kind": "stop"}]', "needs"),
    ('[{"number": 1, "block": 2, "at_frame": 0, "kind": "stop"}, {"number": 2, "block": 1, "at_frame": 0, "kind": "stop"}]',
     "not in the order"), ('[{"number": 1, "block": NaN, "at_frame": 0, "kind": "stop"}]', "no JSON")])
def test_logs_that_cannot_be_replayed_say_where(text, words):
    with pytest.raises(ForcingError, match=words):
        read_log(text)
    assert read_log(" \n") == ()


# -- the mailbox ----------------------------------------------------------------------------------------------

def test_commands_act_before_the_next_block_in_their_order():
    steering = Steering(prepare=encode)
    assert steering.send(Command("seed", seed=4)) == (1, 0)
    first, second = blocks()[:2]
    assert [e.command.seed for e, _ in steering.boundary(first)] == [4] and steering.boundary(second) == []
    assert steering.send(Command("prompt", text="3")) == (2, 2) and steering.send(Command("seed", seed=5)) == (3, 2)
    (prompt, made), (seed, _) = steering.boundary(blocks()[2])
    assert torch.equal(made, encode("3")) and (prompt.number, prompt.block, prompt.at_frame) == (2, 2, 13)
    assert [entry.number for entry in steering.log] == [1, 2, 3] and seed.command.seed == 5


def test_many_threads_lose_nothing():
    steering, numbers = Steering(), []

    def send(n):
        for i in range(20):
            numbers.append(steering.send(Command("seed", seed=100 * n + i))[0])

    threads = [threading.Thread(target=send, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = steering.boundary(Block(0, 0, 2))
    assert sorted(numbers) == [*range(1, 161)] and [entry.number for entry, _ in taken] == sorted(numbers)


def test_what_cannot_be_done_is_refused():
    steering = Steering()
    with pytest.raises(Refused, match="Connect a CLIP"):
        steering.send(Command("prompt", text="a"))
    with pytest.raises(Refused, match="Connect a CLIP"):
        Steering(read_log('[{"number": 1, "block": 1, "at_frame": 5, "kind": "prompt", "text": "a"}]'))
    for _ in range(256):
        steering.send(Command("pause"))
    with pytest.raises(Refused, match="wait for the next block"):
        steering.send(Command("pause"))
    steering.close()
    with pytest.raises(Refused, match="is over"):
        steering.send(Command("pause"))


def test_a_pause_waits_without_work_and_hears_what_comes():
    steering, block, asked = Steering(), Block(3, 6, 2), []
    steering.send(Command("pause"))
    timer = threading.Timer(0.5, lambda: [steering.send(Command("seed", seed=9)), steering.send(Command("resume"))])
    timer.start()
    began, busy = time.monotonic(), time.process_time()
    taken = steering.boundary(block, lambda: asked.append(steering.paused))
    assert time.monotonic() - began >= 0.4 and time.process_time() - busy < 0.2
    assert [entry.command.kind for entry, _ in taken] == ["pause", "seed", "resume"]
    assert asked and all(asked) and not steering.paused and {entry.block for entry in steering.log} == {3}


def test_a_pause_can_be_interrupted_or_stopped():
    steering = Steering()
    steering.send(Command("pause"))
    with pytest.raises(KeyboardInterrupt):
        steering.boundary(Block(0, 0, 2), lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    steering.send(Command("stop"))
    assert [e.command.kind for e, _ in steering.boundary(Block(1, 2, 2))] == ["stop"] and not steering.paused


def test_no_block_waits_for_a_text_encoder():
    """The prompt acts when it is encoded; what came later acts before it."""
    gate = threading.Event()
    steering = Steering(prepare=lambda text: gate.wait(10) and text, background=True)
    steering.send(Command("prompt", text="slow"))
    steering.send(Command("seed", seed=1))
    assert [e.command.kind for e, _ in steering.boundary(Block(0, 0, 2))] == ["seed"]
    gate.set()
    steering._inbox[0].made.result(10)
    assert [(e.number, made) for e, made in steering.boundary(Block(1, 2, 2))] == [(1, "slow")]


@pytest.mark.parametrize("background", [False, True])
def test_a_prompt_that_cannot_be_encoded_does_not_end_the_video(background):
    def broken(text):
        raise ValueError("no such word")

    steering = Steering(prepare=broken, background=background)
    steering.send(Command("prompt", text="a"))
    if background:
        steering._inbox[0].made.exception(10)
    assert steering.boundary(Block(0, 0, 2)) == [] and steering.log == [] and "no such word" in steering.trouble


# -- rollouts -------------------------------------------------------------------------------------------------

class Run:
    """One steered rollout over a tiny network. plan: block index -> commands sent while the block before it is made."""

    def __init__(self, kind="block", plan=None, script=(), switches=(), sides=1):
        self.options, self.plan, self.switches = OPTIONS[kind], plan or {}, switches
        net = network()
        self.denoiser = NetworkDenoiser(net, [Condition([core.prompts(1, 50 + i), core.prompts(1, 60 + i)], make_memory(
            self.options, FRAMES, layers=net.config.layers, grid=GRID, head_dim=core.HEAD_DIM, device="cpu"))
            for i in range(sides)], 1.5)
        self.steering = Steering(script, prepare=encode)
        self.noise = SteeredNoise(BlockNoise(5, (1, core.CHANNELS), SIZE))
        self.state, self.strengths = RolloutState(), []
        self.helm = Helm(self.steering, self.denoiser, self.noise, 2, lambda name, value: self.strengths.append((name, value)))

    def made(self, stop=BLOCKS):
        """Latents [B, C, F, H, W] of what is left of the first `stop` blocks."""
        parts = []
        self._send(0 if self.state.done is None else self.state.done[0].index + 1)
        for block, x0 in ROLLOUTS[self.options.rollout](
                self.denoiser, blocks(), LEVELS, self.noise, block=2, window=build(self.options, FRAMES).capacity,
                switches=self.switches, resume=self.state, steer=self.helm):
            parts.append(x0)
            if block.index + 1 == stop:
                break
            self._send(block.index + 2 if self.options.rollout == "rolling" else block.index + 1)
        return torch.cat(parts, dim=2)

    def _send(self, index):
        for command in self.plan.get(index, ()):
            self.steering.send(command)

    def saved(self, path):
        snapshot.save(path, self.identity, self.denoiser, self.state, seed=5)
        return list(self.steering.log)

    def resumed(self, path, log):
        self.state = snapshot.load(path).resume(self.identity, self.denoiser)
        self.steering.go_on(log, max(block.index for block in (self.state.done[0], *self.state.in_work)))
        self.switches = self.helm.restore(blocks(), self.switches)
        return self

    @property
    def identity(self):
        return snapshot.Identity("tiny", snapshot.settings(self.options), (1, core.CHANNELS, *SIZE))


def prompt(number, transition="keep", blocks=2):
    return Command("prompt", text=str(number), transition=transition, blocks=blocks)


PLAN = {2: [prompt(1)], 3: [Command("seed", seed=77), Command("lora", strength=0.5)], 5: [prompt(2), Command("pause"),
        Command("resume")]}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_replay_of_the_log_is_bit_identical(kind):
    live = Run(kind, PLAN)
    latents = live.made()
    again = Run(kind, script=read_log(write_log(live.steering.log)))
    assert torch.equal(again.made(), latents) and again.strengths == live.strengths == [(None, 0.5)]
    assert again.steering.log == live.steering.log and len(live.steering.log) == 6
    assert not torch.equal(Run(kind).made(), latents)


@pytest.mark.parametrize("transition", ["recache", "soft", "cut", "keep", "flush", "jump"])
def test_transitions_are_those_of_a_prompt_track(transition):
    """A steered prompt does what a planned one does, from the block on that begins next."""
    live = Run(plan={3: [prompt(1, transition)]})
    latents = live.made()
    plain = Run()
    plain.denoiser.conditions[0].prompts = [core.prompts(1, 50), encode("1")]
    plain.steering = plain.helm.steering = Steering()
    plain.switches = [Switch(6, 1, transition=transition, weight=0.5), *([Switch(8, 1, transition="keep")] * (
        transition == "soft"))]
    assert torch.equal(plain.made(), latents)
    assert torch.equal(latents[:, :, :6], Run().made()[:, :, :6]) and not torch.equal(latents, Run().made())


def test_the_last_of_several_prompts_wins_and_ends_the_track():
    track = [Switch(4, 1, transition="keep"), Switch(12, 0, transition="keep")]
    both = Run(plan={3: [prompt(1, "cut"), prompt(2)]}, switches=track).made()
    assert torch.equal(both, Run(plan={3: [prompt(2)]}, switches=track[:1]).made())
    assert not torch.equal(both, Run(switches=track).made())


def test_guidance_keeps_its_negative_prompt():
    live = Run(plan={2: [prompt(1, "recache")]}, sides=2)
    live.made()
    positive, negative = live.denoiser.conditions
    assert torch.equal(positive.text.context, encode("1")) and torch.equal(negative.text.context, core.prompts(1, 51))


def test_a_seed_is_that_of_the_coming_blocks():
    latents = Run(plan={4: [Command("seed", seed=6)]}).made()
    plain, other = Run(), Run()
    other.noise.inner = replace(other.noise.inner, seed=6)
    assert torch.equal(latents[:, :, :8], plain.made()[:, :, :8])
    noise = SteeredNoise(plain.noise.inner, [(4, 6)])
    for index in (0, 3, 4, 7):
        wanted = (plain if index < 4 else other).noise.inner
        assert torch.equal(noise.initial(blocks()[index]), wanted.initial(blocks()[index]))
        assert torch.equal(noise.renoise(blocks()[index], 1), wanted.renoise(blocks()[index], 1))


def test_stop_ends_between_two_blocks_and_says_so_first():
    live, seen = Run(plan={3: [Command("stop")]}), []
    live.helm.stopped = lambda: seen.append(live.state.done[0].index)
    assert live.made().shape[2] == 6 and seen == [2]
    assert Run(script=live.steering.log).made().shape[2] == 6


@pytest.mark.parametrize("kind, transition, at", [("block", "soft", 3), ("block", "recache", 4), ("block", "soft", 4),
                                                  ("block", "soft", 6), ("rolling", "keep", 4), ("recompute", "recache", 5)])
def test_a_steered_run_goes_on_after_a_snapshot(kind, transition, at, tmp_path):
    """Before, inside and behind a transition; the second prompt comes before and after the snapshot."""
    plan = {1: [prompt(3)], 3: [prompt(1, transition, 3), Command("seed", seed=8), Command("lora", strength=2)],
            6: [prompt(2, "soft" if kind == "block" else "keep")]}
    whole, first, second = Run(kind, plan), Run(kind, plan), Run(kind, {index: plan[index] for index in plan if index > at})
    latents = whole.made()
    before = first.made(stop=at)
    log = first.saved(tmp_path / "a")
    second.plan = {index: commands for index, commands in plan.items() if index > max(e.block for e in log)}
    after = second.resumed(tmp_path / "a", read_log(write_log(log))).made()
    assert torch.equal(torch.cat([before, after], dim=2), latents)
    assert [e.plain() | {"number": 0} for e in second.steering.log] == [e.plain() | {"number": 0} for e in whole.steering.log]


def test_a_log_of_other_blocks_is_refused():
    live = Run(plan={3: [Command("seed", seed=1)]})
    live.made()
    with pytest.raises(ForcingError, match="block 3, frame 21; here block 3 begins at frame 33"):
        Steering(live.steering.log).boundary(Block(3, 9, 3))
