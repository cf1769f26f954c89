"""Recorded forwards: which are recorded, replayed and dropped, and that a video with them is the video without.

The recorder here is a tape of tensor operations. Like a CUDA graph it knows addresses and no Python: what a replay needs and is
not in a tensor of the recording is missing or stale, and shows in the numbers.
"""
import pytest
import torch
from forcing_pack.forcing_core import graphs
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.graphs import Graphs, can_record, graphs_for
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import EmaSinkOptions, WindowOptions
from forcing_pack.forcing_core.rollout import Switch, block_rollout
from forcing_pack.forcing_core.rollout.joining import Joining
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.wan import WanConfig
from forcing_testkit.forcing_corekit import CHANNELS, TEXT_DIM, gap, network, prompts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = WanConfig(dim=24, ffn_dim=24, heads=2, layers=2, in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_DIM)
SIZE, TWO = (4, 4), levels([1000, 500], 5.0)
# what a capture refuses: numbers that come from the host, numbers that the host asks for
REFUSED = ("aten.lift_fresh", "aten._local_scalar_dense")


def same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Every operation of a piece of work, with the tensors it was done on."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if str(op).startswith(REFUSED):
            raise RuntimeError(f"{op} cannot be recorded")
        out = op(*args, **(kwargs or {}))
        self.steps.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        for op, args, kwargs, out in self.steps:
            again = op(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0]):
                if isinstance(old, torch.Tensor) and old.numel() and not same_memory(old, new):
                    old.copy_(new)


class Tapes:
    """A recorder of tapes. spoiled: what the work left behind is made useless, as if it had only been captured."""

    def __init__(self):
        self.made = []

    def record(self, work):
        with Tape() as tape:
            out = work()
        if out is not None:
            out.fill_(torch.nan)
        self.made.append(tape)
        return tape.replay, out


class Unable:
    def record(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")


def denoiser(options, frames, recorder=None, texts=None, net=None, guided=False):
    def condition(seed):
        memory = make_memory(options, frames, layers=TINY.layers, grid=(2, 2), head_dim=12, heads=2, device="cpu")
        return Condition(texts or [prompts(seed=seed)], memory)

    sides = [condition(seed) for seed in range(1 + guided)]
    return NetworkDenoiser(net or network(config=TINY), sides, 1.5, graphs=recorder and Graphs(recorder))


def video(over, frames=24, block=2, rollout=block_rollout, **more):
    noise = BlockNoise(3, (1, CHANNELS), SIZE)
    return torch.cat([x for _, x in rollout(over, layout(frames, block), TWO, noise, block=block, **more)], dim=2)


MEMORIES = {
    "absolute positions": WindowOptions(6, 2, 2),
    "relative positions": WindowOptions(6, 2, 2, positions="relative"),
    "raw keys": WindowOptions(6, 2, 2, positions="relative", compact=True),
    "int8": WindowOptions(6, 2, 2, positions="relative", store="int8"),
    "no sink": WindowOptions(4, 0, 2),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_the_same_video(name):
    """To the bit, in every arrangement of keys, and with most forwards replayed once the window went round twice."""
    over = denoiser(MEMORIES[name], 24, Tapes())
    assert torch.equal(video(over), video(denoiser(MEMORIES[name], 24)))
    assert not over.graphs.off and over.graphs.recorded > 0
    assert over.graphs.replayed >= 12


def test_guidance_and_a_window_of_three_blocks():
    """Two conditions have recordings of their own. By hand: window 6, sink 2, so the slots go round every two blocks."""
    options = MEMORIES["relative positions"]
    over = denoiser(options, 24, Tapes(), guided=True)
    assert torch.equal(video(over), video(denoiser(options, 24, guided=True)))
    assert over.graphs.recorded == 2 * 2 * 3  # conditions, layouts of a block, first noisy, second noisy, clean


def test_a_window_that_still_fills_is_not_recorded():
    over = denoiser(WindowOptions(), 12, Tapes())
    video(over, 12)
    assert over.graphs.recorded == over.graphs.replayed == 0 and not over.graphs.off


def test_another_prompt_drops_what_was_recorded():
    options, texts = MEMORIES["absolute positions"], [prompts(seed=0), prompts(seed=1)]
    switch = {"switches": [Switch(14, 1, transition="keep")]}
    over = denoiser(options, 24, Tapes(), texts)
    plain = video(denoiser(options, 24, texts=texts), **switch)
    assert torch.equal(video(over, **switch), plain)
    assert gap(plain[:, :, 14:], video(denoiser(options, 24))[:, :, 14:]) > 1e-3
    assert over.graphs.replayed > 0


def half(net, out):
    """What a LoRA of another strength does: other weights, in the same place or in another one."""
    weight = net.blocks[0].ffn[0].weight
    if out:
        net.blocks[0].ffn[0].weight = torch.nn.Parameter(weight * 0.5, requires_grad=False)
    else:
        weight.mul_(0.5)


@pytest.mark.parametrize("out", [False, True], ids=["in place", "in another place"])
def test_other_weights_in_the_middle(out):
    def run(recorder):
        net = network(config=TINY)
        over = denoiser(MEMORIES["absolute positions"], 24, recorder, net=net)

        def rollout(*args, **kwargs):
            for block, x in block_rollout(*args, **kwargs):
                if block.index == 8:
                    half(net, out)
                yield block, x
        return video(over, rollout=rollout), over.graphs

    (fast, used), (plain, _) = run(Tapes()), run(None)
    assert torch.equal(fast, plain) and used.replayed > 0
    assert gap(plain, video(denoiser(MEMORIES["absolute positions"], 24))) > 1e-3


def test_whatever_else_a_recording_depends_on():
    """`under` is the host's word for it."""
    over = denoiser(MEMORIES["absolute positions"], 24)
    used, plain = Graphs(Tapes()), video(over)
    state = {"under": 0}
    over = denoiser(MEMORIES["absolute positions"], 24)
    over.graphs = lambda *args: used(*args, under=state["under"])

    def changing(*args, **kwargs):
        for block, x in block_rollout(*args, **kwargs):
            state["under"] = block.index // 8
            yield block, x

    assert torch.equal(video(over, rollout=changing), plain)
    steady = Graphs(Tapes())
    over = denoiser(MEMORIES["absolute positions"], 24)
    over.graphs = lambda *args: steady(*args, under=0)
    assert torch.equal(video(over), plain)
    assert 0 < used.replayed < steady.replayed


def test_what_cannot_be_recorded_runs_as_always():
    """The recorder's reason is kept, and it is asked once."""
    over = denoiser(MEMORIES["absolute positions"], 24, Unable())
    assert torch.equal(video(over), video(denoiser(MEMORIES["absolute positions"], 24)))
    assert "not permitted" in over.graphs.off and over.graphs.recorded == 0


OTHERS = {"dense frames": WindowOptions(6, 2, 2, store="int8", dense=2, positions="relative"),
          "ema sink": EmaSinkOptions(6, 2, block=2), "offloaded": WindowOptions(6, 2, 2, offload=True)}


@pytest.mark.parametrize("name", OTHERS)
def test_other_memories_run_as_always(name):
    options = OTHERS[name]
    over = denoiser(options, 16, Tapes())
    assert torch.equal(video(over, 16), video(denoiser(options, 16), 16))
    assert over.graphs.recorded == 0 and not over.graphs.off


def test_joined_passes_run_as_always():
    over, options = denoiser(MEMORIES["relative positions"], 16, Tapes()), MEMORIES["relative positions"]
    assert torch.equal(video(Joining(over), 16), video(Joining(denoiser(options, 16)), 16))


def test_a_watched_pass_is_not_recorded():
    memory = denoiser(MEMORIES["absolute positions"], 12).conditions[0].memory
    now = memory.begin(0, 2, "noisy")
    assert can_record(now)
    now.exchange = now.exchange
    assert not can_record(now)


def test_recordings_are_limited(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    over = denoiser(MEMORIES["absolute positions"], 24, Tapes())
    assert torch.equal(video(over), video(denoiser(MEMORIES["absolute positions"], 24)))
    assert over.graphs.recorded > 4
    over.graphs.free()
    assert not over.graphs._owners


def test_where_there_are_graphs():
    assert graphs_for("cpu") is None and graphs_for("mps") is None
    assert isinstance(graphs_for("cuda:0"), Graphs) == (torch.version.hip is None)
