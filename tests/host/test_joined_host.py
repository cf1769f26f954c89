"""Clean passes in one call of ComfyUI's guider with the noisy ones behind them: the same video in fewer calls."""
import pytest
from forcing_pack.forcing_core.accelerate import WAYS
from forcing_pack.forcing_core.policies import EmaSinkOptions, WindowOptions
from forcing_pack.nodes.sampling import ACCELERATE, ForcingSampler
from forcing_testkit import hostkit

CACHE = WindowOptions(6, 1, positions="relative")


def made(joined, model=None, cfg=1.0, cache=CACHE, frames=12):
    """(clip, frames of each call of the network)."""
    model = model or hostkit.plain()
    guider = hostkit.guider(model, negative=hostkit.text(5) if cfg != 1.0 else None, cfg=cfg)
    with hostkit.forwards(model) as shapes:
        clip = hostkit.run(guider, hostkit.sampler(block=3, cache=cache, joined=joined), frames)
    return clip, [shape[2] for shape in shapes]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_same_video_in_fewer_calls(cfg):
    """The guider sees both halves at once; a scaled or shifted clean half would change everything behind it."""
    (apart, calls), (joined, fewer) = (made(how, cfg=cfg) for how in (False, True))
    conditions = 1 if cfg == 1.0 else 2
    assert hostkit.relative(apart.latents, joined.latents) <= 1e-6
    assert len(calls) - len(fewer) == 3 * conditions and set(calls) == {3} and fewer.count(6) == 3 * conditions


def test_progress_counts_passes_as_ever():
    (apart, _), (joined, _) = (made(how) for how in (False, True))
    assert [tick[:2] for tick in apart.ticks] == [tick[:2] for tick in joined.ticks]
    assert joined.ticks[-1][2][2] == 12


def test_patches_and_other_memories_stay_apart():
    """A patch sees queries and keys of one pass; a memory that changes keys needs its passes one after the other."""
    patched = hostkit.plain().clone()
    patched.set_model_patch(lambda args: args["x"], "attn1_patch")
    assert set(made(True, patched)[1]) == {3}
    assert set(made(True, cache=EmaSinkOptions(6, 3))[1]) == {3}


def test_the_node_offers_joined_passes_and_every_way_to_accelerate():
    made = {name: ForcingSampler.execute(block=3, accelerate=name)[0].rollout for name in ACCELERATE}
    assert [name for name, options in made.items() if options.joined] == ["joined passes"]
    assert {options.accelerate for options in made.values()} == set(WAYS)
    guider = hostkit.guider(hostkit.plain())
    clips = [hostkit.run(guider, ForcingSampler.execute(block=3, accelerate=name)[0], 12) for name in ("off", "joined passes")]
    assert 0 < hostkit.relative(clips[0].latents, clips[1].latents) <= 1e-6
