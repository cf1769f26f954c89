"""What every memory with a store of its own has to keep to, on a tiny network."""
import gc
import weakref

import pytest
import torch
from forcing_pack.forcing_core.memory import memory_bytes
from forcing_pack.forcing_core.policies import BoundedOptions, MergingOptions, RollingSinkOptions, RoutingOptions
from forcing_testkit.forcing_corekit import gap
from forcing_testkit.policykit import TOKENS, SampleNoise, empty, network, video

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 27
SMALL = {"sink": 1, "recent": 2}
POLICIES = {
    "bounded": BoundedOptions(), "bounded, released": BoundedOptions(released=True, tau=0.999),
    "bounded, uniform": BoundedOptions(mode="uniform", compact=True),
    "routing, head": RoutingOptions(top_k=2, **SMALL), "routing, block": RoutingOptions(top_k=2, group="block", window=12),
    "routing, token": RoutingOptions(top_k=2, group="token", **SMALL),
    "merging": MergingOptions(tau=0.6, **SMALL), "merging, full": MergingOptions(tau=0.6, budget=2, compact=True, **SMALL),
    "rolling sink": RollingSinkOptions(window=9)}
by_policy = pytest.mark.parametrize("options", POLICIES.values(), ids=list(POLICIES))


@by_policy
@pytest.mark.parametrize("batch", [1, 2])
def test_bytes_are_what_was_announced(options, batch):
    """Never more than announced, and all of it once the memory is in full use."""
    held, config = empty(options, FRAMES), network().config
    announced = memory_bytes(held.policy, layers=config.layers, frame_tokens=TOKENS, dim=config.dim, batch=batch,
                             element_size=4)
    seen = []
    video(options, FRAMES, samples=tuple(range(batch)), into=held, seen=lambda memory: seen.append(memory.store.nbytes))
    assert max(seen) == seen[-1] == announced and seen == sorted(seen)
    held.free()
    assert held.store.nbytes == 0 and held.store.frames == ()


@by_policy
def test_a_batch_is_its_samples(options):
    """Choices shared by a batch, and filled-up places that count, make a sample depend on its neighbour."""
    both, alone = video(options, FRAMES, samples=(0, 1)), [video(options, FRAMES, samples=(s,)) for s in (0, 1)]
    assert gap(both, torch.cat(alone)) <= 1e-4
    assert gap(both[0], both[1]) > 0.1


@by_policy
def test_a_longer_video_begins_like_a_shorter_one(options):
    assert gap(video(options, FRAMES)[:, :, :21], video(options, 21)) <= 1e-4


@by_policy
def test_nothing_is_taken_from_later_frames(options):
    """Other noise from frame 21 on changes nothing before it, and something after it."""
    other = SampleNoise((0,), FRAMES)
    other.draws[:, 21:] += 1.0
    one, two = video(options, FRAMES), video(options, FRAMES, noise=other)
    assert torch.equal(one[:, :, :21], two[:, :, :21]) and gap(one[:, :, 21:], two[:, :, 21:]) > 0.1


@by_policy
def test_a_run_leaves_nothing_behind(options):
    """A memory that is used again after `forget` gives a fresh one's video, and nothing outlives it."""
    used = empty(options, FRAMES)
    first = video(options, FRAMES, samples=(3,), into=used)
    used.forget()
    assert gap(video(options, FRAMES, into=used), video(options, FRAMES)) <= 1e-6
    assert gap(video(options, FRAMES), first) > 0.1
    store = weakref.ref(used.store)
    del used
    gc.collect()
    assert store() is None
