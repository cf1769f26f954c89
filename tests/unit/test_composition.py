"""Every cache policy with every store, length, block grid, given frames and prompt switches: what has to hold for all.

Policies come from KINDS and their settings from the fields of their options, so a new policy is tested by being there.
"""
import json
from dataclasses import dataclass, replace

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import memory_bytes, memory_host_bytes
from forcing_pack.forcing_core.policies import KINDS, DeepSinkOptions, WindowOptions
from forcing_pack.forcing_core.policies.base import storage_of
from forcing_pack.forcing_core.rollout import RolloutState
from forcing_pack.forcing_core.saved import Saved, copied, split
from forcing_testkit import composekit as kit
from forcing_testkit.forcing_corekit import gap
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = {"model": 1e-4, "int8": 5e-3, "fp8": 2e-2}  # a last digit may round to the next code, which lie that far apart

by_kind = pytest.mark.parametrize("kind", [kind for kind, _ in KINDS.values()], ids=list(KINDS))


def examples(count):
    """Always the same ones, so that a failure is one for everybody. They are small as they are, and making them smaller
    takes minutes."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@by_kind
@examples(12)
@given(data=st.data())
def test_a_pass_sees_nothing_of_the_future_and_only_what_is_held(kind, data):
    made = data.draw(kit.combinations(kind, longest=30))

    def note(now):
        plan, call = now.plan, now.call
        assert max((*plan.read, *plan.own, *plan.write)) <= call.span[-1]
        assert {*plan.write, *plan.own} <= {*call.span} and not {*plan.own} & {*plan.read}
        assert {*plan.evict} <= {*call.held} and {*plan.read} <= {*now.store.frames}
        assert len(plan.positions) == len(plan.read) and len(plan.query) == call.frames

    kit.walk(made, note)


@by_kind
@examples(12)
@given(data=st.data())
def test_every_frame_has_a_place_of_its_own_in_time(kind, data):
    check_places(data.draw(kit.combinations(kind, longest=30)))


def test_a_short_last_block_leaves_the_moving_sink_behind_the_rest():
    check_places(kit.Combination(DeepSinkOptions(window=5, sink=1, block=3), 7))


def check_places(made):
    """In the order of time and below the limit: two frames in one place cannot be told apart."""
    limit = getattr(made.options, "limit", made.frames)
    anywhere = made.options.positions == "relative" or any(s.transition == "jump" for s in made.switches)

    def note(now):
        plan, call = now.plan, now.call
        at = {**dict(zip(call.span, plan.query)), **dict(zip(plan.read, plan.positions))}
        laid = now.order if hasattr(now.store, "order") else plan.read
        places = [at[frame] for frame in sorted(laid)]
        assert all(a < b for a, b in zip(places, places[1:])), (plan, call)
        assert anywhere or max((*plan.positions, *plan.query)) < limit
        new = {*plan.write, *plan.own}
        assert all(at[frame] == place for frame, place in zip(call.span, plan.query) if frame in new)

    kit.walk(made, note)


@by_kind
@examples(12)
@given(data=st.data())
def test_a_sink_frame_is_never_lost(kind, data):
    """The first frames of a scene stay until the memory is emptied (cut, or a recache that renews the sink), and every
    denoising step sees them."""
    made = data.draw(kit.combinations(kind, longest=30))
    scene = set()

    def note(now):
        if not now.call.held:
            scene.clear()
        scene.update(now.plan.write)
        sink = sorted(scene)[:getattr(made.options, "sink", 0)]
        assert {*sink} <= {*now.store.frames}
        if now.call.phase == "noisy":
            assert {f for f in sink if f < now.call.first} <= {*now.plan.read}

    kit.walk(made, note)


@by_kind
@examples(6)
@given(data=st.data())
def test_later_frames_change_nothing_before_them(kind, data):
    """Neither their noise nor their being asked for."""
    made = data.draw(kit.combinations(kind))
    assume(len(made.blocks) > 1 + made.ahead)
    edge = data.draw(st.integers(0, len(made.blocks) - 2 - made.ahead))
    final, seen = made.blocks[edge].end - made.given, made.blocks[edge + made.ahead].end
    whole, other = kit.video(made), kit.video(made, changed=seen)
    assert torch.equal(whole[:, :, :final], other[:, :, :final])
    assert gap(whole[:, :, seen - made.given:], other[:, :, seen - made.given:]) > 0
    shorter = made.until(seen)
    if kit.can_run(shorter):  # not a jump in time, where the video fits into its window
        assert gap(kit.video(shorter)[:, :, :final], whole[:, :, :final]) <= made.rounding(shorter)


@by_kind
@pytest.mark.parametrize("batch", [1, 2])
@examples(5)
@given(data=st.data())
def test_bytes_are_what_was_announced(kind, batch, data):
    """Never more, and all of it once a block is finished, unless the memory was emptied before it was full."""
    made = data.draw(kit.combinations(kind))
    memory, storage = kit.empty(made), storage_of(made.options)
    sizes = {"layers": kit.CONFIG.layers, "frame_tokens": kit.TOKENS, "dim": kit.CONFIG.dim, "batch": batch,
             "element_size": 4}
    most = memory_bytes(memory.policy, storage, **sizes), memory_host_bytes(memory.policy, storage, **sizes)
    phases = []

    def after(held, phase):
        phases.append(phase)
        assert all(a <= b for a, b in zip(kit.taken(held), most, strict=True))

    kit.video(made, samples=tuple(range(batch)), into=memory, after=after)
    if "clean" in phases and not made.forgets:
        assert kit.taken(memory) == most
    memory.free()
    assert kit.taken(memory) == (0, 0)


@by_kind
@examples(5)
@given(data=st.data())
def test_a_batch_is_its_samples(kind, data):
    made = data.draw(kit.combinations(kind))
    if hasattr(made.options, "reuse_cap"):  # where a cap leaves too few tokens, all samples take as many as the poorest
        made = replace(made, options=replace(made.options, reuse_cap=None))
    both = kit.video(made, samples=(0, 1))
    near = NEAR[storage_of(made.options).codec]
    assert gap(both[0], both[1]) > 0.1
    for sample in (0, 1):
        assert gap(kit.video(made, samples=(sample,))[0], both[sample]) <= near


@by_kind
@examples(6)
@given(data=st.data())
def test_going_on_from_what_was_saved_is_going_on(kind, data):
    """In fresh objects that know only the file's content, with the store where it was or in the other memory."""
    made = data.draw(kit.combinations(kind))
    assume(len(made.blocks) > 1)
    stop, noise = data.draw(st.integers(1, len(made.blocks) - 1)), kit.SampleNoise((0,))
    target, state = kit.denoiser(kit.empty(made)), RolloutState()
    first = kit.rollout(made, target, noise, blocks=stop, resume=state)
    plain, tensors = split(copied({"memory": target.state(), "rollout": state.state()}))
    saved = Saved(json.loads(json.dumps(plain)), tensors)
    if "offload" in kit.values_of(kind):
        made = replace(made, options=replace(made.options, offload=data.draw(st.booleans())))
    target = kit.denoiser(kit.empty(made))
    target.load(saved.part("memory"))
    state = RolloutState.load(saved.part("rollout"), (1, kit.CONFIG.in_channels, *kit.SIZE), "cpu")
    rest = kit.rollout(made, target, noise, resume=state)
    assert torch.equal(torch.cat([first, rest], dim=2), kit.video(made))


@by_kind
def test_every_policy_is_drawn_with_every_store(kind):
    """Otherwise quantised and offloaded stores would pass as tested above."""
    assert {"store", "offload", "dense"} <= {*kit.values_of(kind)}


@by_kind
@examples(5)
@given(data=st.data())
def test_a_run_leaves_nothing_behind(kind, data):
    """The same run again gives the same video, also in a memory that another video was made in."""
    made = data.draw(kit.combinations(kind))
    used = kit.empty(made)
    kit.video(replace(made, switches=()), samples=(1,), into=used)
    used.forget()
    assert torch.equal(kit.video(made, into=used), kit.video(made))


@by_kind
@examples(25)
@given(data=st.data())
def test_settings_that_cannot_work_are_refused_before_anything_runs(kind, data):
    """With a sentence of ours, when the options are made or the memory is built; what was accepted runs."""
    chosen, frames = data.draw(kit.odd_settings(kind)), data.draw(st.sampled_from([1, 2, 5, 9, 14]))
    try:
        made = kit.Combination(kind(**chosen), frames)
        memory = kit.empty(made)
    except ForcingError as error:
        assert len(str(error)) > 40
        return
    assert torch.isfinite(kit.video(made, into=memory)).all()


def test_settings_that_nobody_draws_are_reported():
    """A new policy must not pass as tested while its own settings keep their defaults."""
    @dataclass(frozen=True)
    class Strange(WindowOptions):
        wobble: int = 0

    with pytest.raises(AssertionError, match="wobble.*VALUES"):
        kit.values_of(Strange)
