"""A clean pass and the noisy pass behind it in one forward: the numbers of two, with a forward less a block."""
import pytest
import torch
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import DeepSinkOptions, EmaSinkOptions, WindowOptions
from forcing_pack.forcing_core.rollout import RolloutState, Switch, block_rollout
from forcing_pack.forcing_core.rollout.joining import Joining
from forcing_pack.forcing_core.schedule import levels
from forcing_testkit.forcing_corekit import CHANNELS, CONFIG, HEAD_DIM, gap, latents, network, prompts

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE, TWO, LAYERS = (4, 4), levels([1000, 500], 5.0), CONFIG.layers


def over(net, options, frames, texts, dtype=torch.float32):
    """A denoiser whose memories are made as everywhere. texts: prompts of the one condition, or a list of them for each."""
    sides = texts if isinstance(texts[0], list) else [texts]
    sizes = {"layers": LAYERS, "grid": (2, 2), "head_dim": HEAD_DIM, "heads": CONFIG.heads, "device": "cpu"}
    return NetworkDenoiser(net, [Condition(side, make_memory(options, frames, **sizes)) for side in sides], 1.5, dtype=dtype)


def made(options, frames=18, block=3, joined=True, batch=1, dtype=torch.float32, texts=None, net=None, **settings):
    """(video, forwards) of a rollout over tiny latents."""
    inner = over(net or network(dtype=dtype), options, frames, texts or [prompts(batch, dtype=dtype)], dtype)
    denoiser = Joining(inner) if joined else inner
    noise = BlockNoise(3, (batch, CHANNELS), SIZE)
    given = 0 if settings.get("context") is None else settings["context"].shape[2]
    blocks = layout(frames - given, block, given=given)
    parts = [x for _, x in block_rollout(denoiser, blocks, TWO, noise, block=block, **settings)]
    return torch.cat(parts, dim=2), inner.forwards


MEMORIES = {
    "everything": WindowOptions(),
    "window": WindowOptions(9, 0),
    "absolute positions, a sink": WindowOptions(9, 3),
    "relative positions": WindowOptions(9, 3, positions="relative"),
    "raw keys": WindowOptions(9, 3, positions="relative", compact=True),
    "int8 with dense frames": WindowOptions(9, 3, positions="relative", store="int8", dense=4),
    "offloaded": WindowOptions(9, 3, positions="relative", offload=True),
    "deep sink": DeepSinkOptions(9, 3),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_the_numbers_of_two_forwards(name):
    """Under every arrangement of keys: the second plan evicts and moves frames that the first half still reads."""
    (alone, forwards), (joined, fewer) = (made(MEMORIES[name], joined=joined) for joined in (False, True))
    assert (forwards, fewer) == (6 * 2 + 5, 6 * 2)
    assert gap(alone, joined) <= (1e-5 if not MEMORIES[name].dense else 2e-2)  # codes may fall on the other side


@pytest.mark.parametrize("block, batch, frames, guided", [(1, 1, 5, False), (2, 2, 8, False), (3, 2, 12, True)])
def test_over_shapes(block, batch, frames, guided):
    options, texts = WindowOptions(6, 1, block, positions="relative"), [prompts(batch)]
    texts = [texts, [prompts(batch, 5)]] if guided else texts
    same = {"frames": frames, "block": block, "batch": batch, "texts": texts}
    (alone, _), (joined, _) = (made(options, joined=joined, **same) for joined in (False, True))
    assert gap(alone, joined) <= 1e-5


def test_given_frames_and_context_timesteps():
    same = {"context": latents(5, SIZE), "context_timestep": 20.0}
    (alone, forwards), (joined, fewer) = (made(WindowOptions(9, 3), 11, joined=joined, **same) for joined in (False, True))
    assert gap(alone, joined) <= 1e-5 and forwards - fewer == 2  # the second given chunk, the first block


def test_half_precision_is_as_near_to_the_truth():
    options, net = WindowOptions(9, 3, positions="relative"), network()
    truth, _ = made(options, joined=False, net=net)
    half = net.to_compute(torch.bfloat16)
    alone, joined = (gap(made(options, joined=j, dtype=torch.bfloat16, net=half)[0], truth) for j in (False, True))
    assert 0 < joined <= 1.5 * alone


@pytest.mark.parametrize("transition", ["keep", "recache", "flush", "cut"])
def test_what_happens_between_two_blocks_finds_the_clean_pass_made(transition):
    """A clean pass under the next prompt, or behind a flush, would be another one."""
    same = {"texts": [prompts(), prompts(seed=9)], "switches": [Switch(9, 1, transition=transition)], "window": 9}
    (alone, forwards), (joined, fewer) = (made(WindowOptions(9, 3, positions="relative"), joined=joined, **same)
                                          for joined in (False, True))
    assert gap(alone, joined) <= 1e-5 and forwards - fewer == 4


def test_a_state_between_blocks_holds_no_pass_back():
    net, options = network(), WindowOptions(9, 3)
    kept = []
    for joined in (False, True):
        denoiser = over(net, options, 18, [prompts()])
        run = block_rollout(Joining(denoiser) if joined else denoiser, layout(18, 3), TWO, BlockNoise(3, (1, CHANNELS), SIZE),
                            resume=RolloutState())
        for _ in range(3):
            next(run)
        kept.append(denoiser.state()["0"]["store"])
    assert kept[0]["slots"] == kept[1]["slots"] and kept[0]["positions"] == kept[1]["positions"]
    assert all(gap(kept[0][f"layer {i}"][part], kept[1][f"layer {i}"][part]) <= 1e-5 for i in range(LAYERS) for part in "01")


def test_memories_with_passes_of_their_own_stay_apart():
    (alone, forwards), (joined, same) = (made(EmaSinkOptions(9, 3), joined=joined) for joined in (False, True))
    assert torch.equal(alone, joined) and forwards == same


def test_the_last_layer_works_on_the_noisy_half_alone():
    """Of the clean half its keys and values are all that is wanted there: no queries, no output, no feed-forward."""
    net, seen = network(), []
    net.blocks[-1].ffn.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    net.blocks[0].ffn.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    made(WindowOptions(), 6, net=net)
    assert seen == [12, 12] * 2 + [24, 12] + [12, 12]
