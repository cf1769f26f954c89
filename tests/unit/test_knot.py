"""Knots and references: what is pinned, emitted, stored and fused, where the reference stands, and what nothing must change."""
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core import snapshot
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.options import RolloutOptions
from forcing_pack.forcing_core.plan import REFERENCE, layout
from forcing_pack.forcing_core.policies import KINDS, RecomputeOptions, ReferenceOptions, WindowOptions, build
from forcing_pack.forcing_core.policies.reference import with_reference
from forcing_pack.forcing_core.rollout import ROLLOUTS, Knot, RolloutState, Switch, calls, knot_rollout, most_frames
from forcing_pack.forcing_core.schedule import levels
from forcing_testkit import forcing_corekit as core
from forcing_testkit.forcing_corekit import FakeDenoiser, Recorder, gap
from forcing_testkit.policykit import GRID, LEVELS, SIZE, TOKENS, attended, network

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = WindowOptions(window=8, sink=1, block=3, positions="relative")
AHEAD = ReferenceOptions(window=8, sink=1, block=3, positions="relative")
KNOT = Knot(1)


def noise(seed=5, batch=1):
    return BlockNoise(seed, (batch, core.CHANNELS), SIZE)


def denoiser(options=WINDOW, frames=12, ahead=1, prompts=1):
    net = network()
    memory = make_memory(options, frames, layers=net.config.layers, grid=GRID, head_dim=core.HEAD_DIM, device="cpu",
                         ahead=ahead)
    return NetworkDenoiser(net, [Condition([core.prompts(seed=i) for i in range(prompts)], memory)])


def roll(target, frames=12, *, knot=KNOT, block=3, **more):
    """Emitted blocks of a knot rollout."""
    return [x0 for _, x0 in knot_rollout(target, layout(frames, block), LEVELS, noise(), knot=knot, block=block, **more)]


def noisy(recorder, first):
    return [call for call in recorder.calls if call.phase == "noisy" and call.first == first]


# -- the rollout -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("frames", "k"), [(12, 1), (12, 3), (7, 2)])
def test_emitted_frames_are_those_of_the_blocks(frames, k):
    made = roll(FakeDenoiser(), frames, knot=Knot(k))
    assert [x0.shape[2] for x0 in made] == [block.frames for block in layout(frames, 3)]


@pytest.mark.parametrize(("pin", "told"), [("timestep", lambda t: 0.0), ("level", lambda t: t)])
@pytest.mark.parametrize("k", [1, 2])
def test_the_pinned_frames_are_the_knot_before_every_forward(k, pin, told):
    inner = Recorder(denoiser(ahead=k))
    roll(inner, knot=Knot(k, pin=pin))
    for first in (3, 6, 9):
        knot = noisy(inner, first - 3)[-1].out[:, :, 3:]
        steps = noisy(inner, first)
        assert len(steps) == len(LEVELS) and knot.shape[2] == k
        for step, level in zip(steps, LEVELS):
            assert torch.equal(step.x[:, :, :k], knot)
            assert step.timesteps == (told(level.timestep),) * k + (level.timestep,) * 3
    assert all(step.timesteps == (level.timestep,) * (3 + k) for step, level in zip(noisy(inner, 0), LEVELS))


def test_the_unpinned_frames_are_those_of_the_schedule():
    """The pin must not touch what lies behind it: noise at first, then the network's answer with fresh noise."""
    inner = Recorder(denoiser())
    roll(inner)
    first, second = noisy(inner, 3)
    longer = replace(layout(12, 3)[1], frames=4)
    assert torch.equal(first.x[:, :, 1:], noise().initial(longer)[:, :, 1:])
    sigma = LEVELS[1].sigma
    again = (1 - sigma) * first.out + sigma * noise().renoise(longer, 0)
    assert gap(second.x[:, :, 1:], again[:, :, 1:]) < 1e-6


@pytest.mark.parametrize("fuse", [True, False])
def test_fusion_is_the_mean_of_the_knot_and_the_answer(fuse):
    inner = Recorder(denoiser(ahead=2))
    made = roll(inner, knot=Knot(2, fuse, "level"))
    for first, x0 in zip((3, 6, 9), made[1:]):
        knot, answer = noisy(inner, first - 3)[-1].out[:, :, 3:], noisy(inner, first)[-1].out
        assert gap(knot, answer[:, :, :2]) > 1e-2
        assert torch.equal(x0[:, :, :2], (knot + answer[:, :, :2]) / 2 if fuse else answer[:, :, :2])
        assert torch.equal(x0[:, :, 2:], answer[:, :, 2:3])
    assert torch.equal(made[0], noisy(inner, 0)[-1].out[:, :, :3])


def test_by_timestep_the_network_gives_the_knot_back():
    """Its frames have no noise to be taken off, so there is nothing to fuse."""
    assert all(torch.equal(a, b) for a, b in zip(roll(denoiser()), roll(denoiser(), knot=Knot(1, fuse=False))))


def test_the_store_grows_by_a_block_and_never_holds_a_knot():
    options = WindowOptions(block=3)
    target = denoiser(options, ahead=2)
    memory, seen = target.conditions[0].memory, []
    for block, _ in knot_rollout(target, layout(12, 3), LEVELS, noise(), knot=Knot(2)):
        seen.append(memory.store.frames)
        assert memory.store.frames == tuple(range(block.end))
    assert [len(frames) for frames in seen] == [3, 6, 9, 12]


def test_a_knot_is_attended_to_as_a_longer_block_is():
    """The same forward with frames that are all stored, which is what every oracle of this folder covers."""
    x, level = core.latents(8), LEVELS[0]
    knotted, plain = denoiser(WindowOptions(block=3), ahead=1), denoiser(WindowOptions(block=3), ahead=0)
    for target in (knotted, plain):
        target(x[:, :, :3], (LEVELS[1],) * 3, 0, "clean")
    made, expected = (target(x[:, :, 3:7], (level,) * 4, 3, "noisy") for target in (knotted, plain))
    assert gap(made, expected) < 1e-5
    alone = denoiser(WindowOptions(block=3), ahead=0)
    alone(x[:, :, :3], (LEVELS[1],) * 3, 0, "clean")
    assert gap(made[:, :, :3], alone(x[:, :, 3:6], (level,) * 3, 3, "noisy")) > 1e-3  # the knot is seen


@pytest.mark.parametrize(("options", "other"), [
    (WINDOW, WINDOW), (AHEAD, WINDOW), (RecomputeOptions(window=6, block=3), RecomputeOptions(window=6, block=3))])
def test_without_knot_and_reference_it_is_the_rollout_that_it_is_added_to(options, other):
    """Bit for bit, and a memory with room for a reference is a plain window."""
    made = roll(denoiser(options, ahead=0), knot=Knot(0), over=options.rollout, window=options.window)
    plain = ROLLOUTS[other.rollout](denoiser(other, ahead=0), layout(12, 3), LEVELS, noise(), block=3, window=other.window)
    assert torch.equal(torch.cat(made, dim=2), torch.cat([x0 for _, x0 in plain], dim=2))


def test_a_knot_over_a_recomputed_memory():
    inner = Recorder(denoiser(RecomputeOptions(window=6, block=3)))
    made = roll(inner, over="recompute", window=6)
    assert [x0.shape[2] for x0 in made] == [3] * 4
    knot = noisy(inner, 3)[-1].out[:, :, 3:]
    assert all(torch.equal(call.x[:, :, :1], knot) for call in noisy(inner, 6))


@pytest.mark.parametrize(("transition", "dropped"), [("cut", True), ("jump", True), ("keep", False)])
def test_another_scene_does_not_begin_with_the_knot_of_the_last(transition, dropped):
    inner = Recorder(denoiser(replace(WINDOW, window=6), prompts=2))
    roll(inner, switches=[Switch(6, 1, transition=transition)])
    knot, step = noisy(inner, 3)[-1].out[:, :, 3:], noisy(inner, 6)[0]
    assert torch.equal(step.x[:, :, :1], knot) is not dropped
    assert (step.timesteps[0] == 0) is not dropped


@pytest.mark.parametrize("references", [0, 1])
def test_announced_calls_are_those_that_run(references):
    inner = Recorder(FakeDenoiser())
    roll(inner, 9, knot=Knot(2), reference=core.latents(1) if references else None)
    told = list(calls("knot", layout(9, 3), len(LEVELS), ahead=2, references=references))
    assert inner.events == [(call.phase, call.first, call.frames) for call in told]
    assert most_frames("knot", 3, 4, ahead=2) == 5


def test_a_denoiser_with_channels_for_given_frames_is_told_of_them():
    class Pinned(FakeDenoiser):
        pins = []

        def pin(self, first, latents):
            self.pins.append((first, latents))

    made, reference = Recorder(Pinned()), core.latents(1)
    made.pin = made.inner.pin
    roll(made, 9, reference=reference)
    assert [first for first, _ in Pinned.pins] == [REFERENCE, 3, 6]
    assert torch.equal(Pinned.pins[0][1], reference)
    assert torch.equal(Pinned.pins[1][1], noisy(made, 0)[-1].out[:, :, 3:])


def test_a_resumed_rollout_goes_on_with_the_knot(tmp_path):
    """Bit for bit, with a reference in the memory that is not written again."""
    more = {"knot": Knot(2), "reference": core.latents(1, seed=9)}
    whole = roll(denoiser(AHEAD, ahead=2), 15, **more)
    first, state = denoiser(AHEAD, ahead=2), RolloutState()
    identity = snapshot.Identity("tiny", snapshot.settings(AHEAD), (1, core.CHANNELS, *SIZE))
    made = zip(range(3), knot_rollout(first, layout(15, 3), LEVELS, noise(), block=3, resume=state, **more))
    begun = [x0 for _, (_, x0) in made]
    snapshot.save(tmp_path / "a", identity, first, state, seed=5)
    target = denoiser(AHEAD, ahead=2)
    again = snapshot.load(tmp_path / "a").resume(identity, target)
    rest = roll(target, 15, resume=again, **more)
    assert torch.equal(torch.cat(begun + rest, dim=2), torch.cat(whole, dim=2))


# -- the reference ---------------------------------------------------------------------------------------------

def passes(options, k, blocks, block=3):
    """Every pass of a knot rollout over a memory without a network, with the position of the reference in it."""
    memory = make_memory(options, blocks * block, layers=1, grid=GRID, head_dim=core.HEAD_DIM, device="cpu", ahead=k)
    draw = torch.Generator().manual_seed(1)
    for call in calls("knot", layout(blocks * block, block), 2, ahead=k, references=options.references):
        now = memory.begin(call.first, call.frames, call.phase)
        q, keys, v = torch.randn(3, 1, call.frames * TOKENS, 2, core.HEAD_DIM, generator=draw)
        attended(now, 0, q, keys, v)
        yield now, keys


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("positions", ["relative", "rebased", "absolute"])
def test_the_reference_is_always_ahead(positions, k):
    options = replace(AHEAD, positions=positions, limit=1024 if positions == "absolute" else 9, lookahead=5, stride=4)
    stands = {}
    for now, _ in passes(options, k, 20):
        place = dict(zip(now.plan.read, now.plan.positions))
        if now.call.first == REFERENCE:
            continue
        distance = place[REFERENCE] - now.plan.query[-1]
        assert distance >= 1 and place[REFERENCE] == max(place.values())
        last = now.call.first + 3 - 1 + k  # of the block with its knot
        stand = last + distance if now.call.phase == "noisy" else now.call.first + 2 + distance
        assert (stand - 5) % 4 == 0 and stand - last <= max(4, 5 - k)
        assert stands.setdefault(now.call.first, stand) == stand  # one place for all passes of a block
    assert len(set(stands.values())) > 10  # it moves


def test_moving_the_reference_is_a_rotation_of_its_raw_keys():
    written = None
    for now, keys in passes(replace(AHEAD, window=None, positions="absolute"), 1, 8):
        written = keys if now.call.first == REFERENCE else written
        place = dict(zip(now.plan.read, now.plan.positions))[REFERENCE]
        read, _ = now.store.read(0, replace(now.plan, read=(REFERENCE,), positions=(place,)), now.rope)
        assert gap(read, core.rotated(written, [place], GRID)) < 1e-5
    assert place > 20


def test_the_reference_is_seen_by_every_block():
    reference = core.latents(1, seed=3)
    made, other = (roll(denoiser(AHEAD), 18, reference=r) for r in (reference, -reference))
    assert all(gap(a, b) > 1e-3 for a, b in zip(made, other))
    assert gap(made[-1], roll(denoiser(AHEAD), 18)[-1]) > 1e-3


@pytest.mark.parametrize("way", ["forget", "flush"])
def test_what_empties_the_memory_leaves_the_reference(way):
    target = denoiser(AHEAD)
    roll(target, 12, reference=core.latents(1))
    store = target.conditions[0].memory.store
    assert store.frames[-1] == REFERENCE and len(store.frames) > 4
    target.forget() if way == "forget" else target.flush(2)
    assert store.frames == ((REFERENCE,) if way == "forget" else (0, 10, 11, REFERENCE))


def test_a_cut_keeps_the_reference_ahead_of_the_next_scene():
    target = denoiser(AHEAD, prompts=2)
    roll(target, 12, reference=core.latents(1), switches=[Switch(6, 1, transition="cut")])
    assert target.conditions[0].memory.store.frames == (*range(6, 12), REFERENCE)


def test_jumping_moves_the_reference_along():
    memory = make_memory(replace(AHEAD, window=6), 30, layers=1, grid=GRID, head_dim=core.HEAD_DIM, device="cpu")
    draw = torch.randn(3, 1, 3 * TOKENS, 2, core.HEAD_DIM, generator=torch.Generator().manual_seed(1))
    for first, frames, phase in ((REFERENCE, 1, "clean"), (0, 3, "clean"), (3, 3, "clean"), (6, 3, "noisy")):
        if first == 6:
            memory.jump(6, 42)
        now = memory.begin(first, frames, phase)
        attended(now, 0, *draw[:, :, :frames * TOKENS])
    assert max(now.plan.positions) == now.plan.positions[-1] > now.plan.query[-1] > 42


# -- what is refused -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("settings", "match"), [
    ({"cache": KINDS["rolling"][0](window=21, sink=3)}, "rolling rollout denoises neighbouring blocks together"),
    ({"cache": KINDS["per_step"][0]()}, "per_step rollout keeps every denoising step's own noisy frames.*such as self-forcing"),
    ({"cache": KINDS["routing"][0]()}, "cannot attend to frames that it does not keep"),
    ({"cache": KINDS["merging"][0]()}, "cannot attend to frames that it does not keep"),
    ({"knot": Knot(4)}, "longer than a block of 3. Use at most 3"),
    ({"noise": "comfy"}, "Set noise to 'per block'"),
])
def test_what_does_not_go_with_a_knot_is_refused_by_name(settings, match):
    with pytest.raises(ForcingError, match=match):
        RolloutOptions(**{"knot": KNOT, **settings})
    RolloutOptions(**{**settings, "knot": Knot(0)})


@pytest.mark.parametrize("kind", sorted(name for name, (kind, _) in KINDS.items() if kind.overlaps and kind.rollout == "block"))
def test_every_other_memory_takes_a_knot(kind):
    """Finite, and another video than without it."""
    options = replace(KINDS[kind][0](), block=3)
    made = torch.cat(roll(denoiser(options, 9), 9), dim=2)
    assert torch.isfinite(made).all()
    plain = ROLLOUTS["block"](denoiser(options, 9, ahead=0), layout(9, 3), LEVELS, noise(), block=3)
    assert gap(made, torch.cat([x0 for _, x0 in plain], dim=2)) > 1e-3


def test_settings_without_sense_are_refused():
    for make in (lambda: Knot(-1), lambda: Knot(1, pin="x"), lambda: replace(AHEAD, stride=0),
                 lambda: with_reference(KINDS["bounded"][0](), 1, 8, 4)):
        with pytest.raises(ForcingError, match="(Use at least|Choose the policy 'window')"):
            make()
    with pytest.raises(ForcingError, match="Set references to 2"):
        denoiser(AHEAD)(core.latents(2), levels([500], 5.0) * 2, REFERENCE, "clean")


def test_a_window_becomes_one_with_a_reference():
    made = with_reference(WINDOW, 2, 6, 3)
    assert (made.window, made.sink, made.positions, made.references, made.lookahead) == (8, 1, "relative", 2, 6)
    assert build(made, 40).capacity == build(WINDOW, 40).capacity + 2
