"""The Triton kernels in Triton's interpreter, against plain torch; and that they keep their hands off unusual modules."""
import importlib

import pytest
import torch
import torch.nn.functional as F
from forcing_pack.forcing_core import kernels
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.kernels import plain, table
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.rope import Rope, rotate
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.wan import Ops, WanConfig
from forcing_testkit.forcing_corekit import CHANNELS, TEXT_DIM, gap, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 1e-6
TINY = WanConfig(dim=24, ffn_dim=24, heads=2, layers=2, freq_dim=8, in_channels=CHANNELS, out_channels=CHANNELS,
                 text_dim=TEXT_DIM)
EVERYWHERE = {"here": lambda x: True}


@pytest.fixture(scope="module")
def triton(require):
    """The modules with kernels, as Triton's interpreter runs them (asked for in conftest.py)."""
    require(kernels.has_triton(), "Triton is not installed: no fused kernel was tested", "pip install triton (on Linux)")
    whole = type(importlib.import_module("triton.language").sum).__name__ == "InterpretedFunction"
    require(whole, "Triton was imported before TRITON_INTERPRET was set: no fused kernel was tested",
            "export TRITON_INTERPRET=1")
    return {name: importlib.import_module(f"{kernels.__name__}.{name}") for name in ("modulate", "gate", "rotate")}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(batch, frames, cells, width, dtype=torch.float32):
    """x, y [B, n, D] and per-frame shift, scale, gate [B, F, 1, D], views of one tensor as a layer has them."""
    m = draw(batch, frames, 6, width, seed=2, dtype=dtype)
    return (draw(batch, frames * cells, width, dtype=dtype), draw(batch, frames * cells, width, seed=1, dtype=dtype),
            *(part.unsqueeze(2) for part in m.unbind(2)[:3]))


def norm(width):
    return nn.LayerNorm(width, EPS, elementwise_affine=False)


def spread(a, exact):
    """Root of the mean square distance from the numbers in float64."""
    return float((a.double() - exact).square().mean().sqrt())


shapes = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.sampled_from([6, 10, 16]))
few = settings(max_examples=4, deadline=None, derandomize=True)  # a program of the interpreter takes milliseconds


@given(shapes)
@few
def _modulation(found, shape):
    batch, frames, cells, heads, head_dim = shape
    x, _, shift, scale, _ = tokens(batch, frames, cells, heads * head_dim)
    assert gap(found.modulate(x, shift, scale, EPS), plain.modulate(norm(heads * head_dim), x, shift, scale)) <= 1e-5


def test_frames_that_are_alike(triton):
    """One row of modulation for all of them, [B, 1, D], and a batch of two."""
    x, y, *_ = tokens(2, 2, 2, 12)
    shift, scale, by = draw(2, 6, 12, seed=2)[:, :, None].unbind(1)[:3]
    each = [t[:, None].expand(-1, 2, -1, -1) for t in (shift, scale, by)]
    for of in (plain.modulate(norm(12), x, shift, scale), triton["modulate"].modulate(x, shift, scale, EPS)):
        assert gap(of, plain.modulate(norm(12), x, *each[:2])) <= 1e-5
    for of in (plain.gate(x, y, by), triton["gate"].gate(x, y, by)):
        assert gap(of, plain.gate(x, y, each[2])) <= 1e-5


@given(shapes)
@few
def _gates(found, shape):
    batch, frames, cells, heads, head_dim = shape
    x, y, _, _, by = tokens(batch, frames, cells, heads * head_dim)
    assert gap(found.gate(x, y, by), plain.gate(x, y, by)) <= 1e-5


@given(shapes, st.integers(0, 3), st.sampled_from(["both", "raw", "roped"]), st.randoms(use_true_random=False))
@few
def _keys(found, shape, spare, kept, random):
    """Into any slots, in any order, of buffers with room for more frames; what lies in the others stays."""
    batch, frames, cells, heads, head_dim = shape
    x, weight = draw(batch, frames * cells, heads * head_dim), draw(heads * head_dim, seed=5)
    turn = Rope((1, cells), head_dim).table([7 * i + 3 for i in range(frames)])
    slots = random.sample(range(frames + spare), frames)
    raw, roped = (torch.full((batch, frames + spare, cells, heads, head_dim), 9.0) if kept in ("both", name) else None
                  for name in ("raw", "roped"))
    found.norm_rotate(x, weight, EPS, turn, torch.tensor(slots), raw, roped)
    expected = F.rms_norm(x, x.shape[-1:], weight, EPS).unflatten(2, (heads, -1))
    others = [slot for slot in range(frames + spare) if slot not in slots]
    for buffer, wanted in ((raw, expected), (roped, rotate(expected, turn))):
        if buffer is not None:
            assert gap(buffer[:, slots].flatten(1, 2), wanted) <= 1e-5
            assert bool((buffer[:, others] == 9).all())


@pytest.mark.parametrize("name, check", [("modulate", _modulation), ("gate", _gates), ("rotate", _keys)])
def test_equal_to_plain_torch_in_float32(triton, name, check):
    check(triton[name])


def test_as_near_to_the_truth_as_plain_torch_in_bfloat16(triton):
    """Every kernel rounds once where plain torch rounds after each of its steps. Rounded here: the interpreter cuts off."""
    x, y, shift, scale, by = tokens(1, 2, 4, 256, torch.bfloat16)
    wide = [t.double() for t in (x, y, shift, scale, by)]
    turn, weight = Rope((2, 2), 64).table([40, 41]), draw(256, seed=5, dtype=torch.bfloat16)
    rms = F.rms_norm(wide[0], (256,), weight.double(), EPS).unflatten(2, (4, -1))
    turned = torch.view_as_real(torch.view_as_complex(rms.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    out, roped = torch.empty(1, 8, 256), torch.empty(1, 2, 4, 4, 64)
    triton["rotate"].norm_rotate(x, weight, EPS, turn, torch.arange(2), None, roped)
    own = rotate(F.rms_norm(x, (256,), weight, EPS).unflatten(2, (4, -1)), turn)
    cases = [(triton["modulate"].modulate(x, shift, scale, EPS, out).bfloat16(), plain.modulate(norm(256), x, shift, scale),
              plain.modulate(norm(256), wide[0], wide[2], wide[3])),
             (triton["gate"].gate(x, y, by, out).bfloat16(), plain.gate(x, y, by), plain.gate(wide[0], wide[1], wide[4])),
             (roped.flatten(1, 2).bfloat16(), own, turned)]
    for fused, usual, exact in cases:
        assert 0 < spread(fused, exact) <= 1.001 * spread(usual, exact)


MEMORIES = {"rotated keys": WindowOptions(2, 0, 1), "both": WindowOptions(3, 1, 1, positions="relative"),
            "raw keys": WindowOptions(3, 1, 1, positions="relative", compact=True),
            "int8, which takes its keys as always": WindowOptions(3, 1, 1, positions="relative", store="int8")}


def video(net, options, kernels_used, batch=1):
    """Four frames, one after the other: the window moves, and a frame takes the slot of another."""
    memory = make_memory(options, 4, layers=TINY.layers, grid=(2, 1), head_dim=12, heads=2, device="cpu")
    denoiser = NetworkDenoiser(net, [Condition([draw(batch, 6, TEXT_DIM, seed=9)], memory)], ops=Ops(kernels=kernels_used))
    noise = BlockNoise(1, (batch, CHANNELS), (4, 2))
    parts = block_rollout(denoiser, layout(4, 1), levels([1000], 5.0), noise, block=1)
    return torch.cat([x for _, x in parts], dim=2)


@pytest.mark.parametrize("name", MEMORIES)
def test_a_video_with_them(triton, monkeypatch, name):
    """Through the whole forward, in every arrangement of keys; the third kernel has to have been there."""
    rotate_, seen = triton["rotate"], []
    plainly = rotate_.norm_rotate
    monkeypatch.setattr(rotate_, "norm_rotate", lambda *args: (seen.append(args), plainly(*args)))
    net = network(config=TINY)
    assert gap(video(net, MEMORIES[name], kernels.PLAIN), video(net, MEMORIES[name], kernels.fused(**EVERYWHERE))) <= 1e-5
    assert (len(seen) == 0) == name.startswith("int8")


def test_a_batch_with_them(triton):
    net, options = network(config=TINY), MEMORIES["both"]
    assert gap(video(net, options, kernels.PLAIN, 2), video(net, options, kernels.fused(**EVERYWHERE), 2)) <= 1e-5


class Wrapped(nn.LayerNorm):
    """Somebody's own norm."""

    def forward(self, x):
        return super().forward(x) * 3


def patched(module):
    module.forward = lambda x: type(module).forward(module, x) * 3
    return module


def hooked(module):
    module.register_forward_hook(lambda module, args, out: out * 3)
    return module


UNUSUAL = {"a class of its own": lambda: Wrapped(12, EPS, elementwise_affine=False),
           "a patched forward": lambda: patched(norm(12)), "a hook": lambda: hooked(norm(12))}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_norms_are_called(triton, name):
    """A norm that gives three times as much says whether it was asked."""
    x, _, shift, scale, _ = tokens(1, 2, 3, 12)
    fused, zero = kernels.fused(**EVERYWHERE), torch.zeros_like(shift)
    assert gap(fused.modulate(UNUSUAL[name](), x, zero, scale), 3 * fused.modulate(norm(12), x, zero, scale)) <= 1e-5


def test_norms_of_keys_that_are_patched_or_elsewhere_are_called(triton, monkeypatch):
    """The keys of one layer go through a hook, those of another have weights of another type."""
    calls = []
    net = network(config=TINY)
    net.blocks[0].self_attn.norm_k.register_forward_hook(lambda *_: calls.append("hooked"))
    net.blocks[1].self_attn.norm_q.double().register_forward_pre_hook(lambda module, args: (args[0].double(),))
    net.blocks[1].self_attn.norm_q.register_forward_hook(lambda module, args, out: (calls.append("double"), out.float())[1])
    monkeypatch.setattr(triton["rotate"], "norm_rotate", lambda *args: pytest.fail("took the norm apart"))
    options = MEMORIES["both"]
    expected = video(net, options, kernels.PLAIN)
    plainly, calls[:] = len(calls), []
    assert gap(expected, video(net, options, kernels.fused(**EVERYWHERE))) <= 1e-5
    assert len(calls) == plainly > 0 and {*calls} == {"hooked", "double"}


def test_the_hosts_rule_decides(triton):
    """Where it says no, its norm is called."""
    x, _, shift, scale, _ = tokens(1, 2, 3, 12)
    kept = hooked(norm(12))
    never = kernels.fused(norms=lambda module, like: False, **EVERYWHERE)
    always = kernels.fused(norms=lambda module, like: True, **EVERYWHERE)
    zero = torch.zeros_like(shift)
    assert gap(never.modulate(kept, x, zero, scale), 3 * always.modulate(kept, x, zero, scale)) <= 1e-5


def test_a_watched_pass_meets_memory_as_always():
    from forcing_pack.forcing_core.kernels.keys import can_meet

    memory = make_memory(MEMORIES["both"], 6, layers=2, grid=(2, 1), head_dim=12, device="cpu")
    now, matrices = memory.begin(0, 2, "noisy"), Rope((2, 1), 12, matrices=True)
    assert can_meet(now)
    assert not can_meet(now.over(now.store, matrices, matrices.table([0, 1])))
    now.exchange = now.exchange
    assert not can_meet(now)


def test_where_they_run(monkeypatch):
    """On cards with Triton, not where it is missing, and not without being asked for."""
    assert Ops().kernels is kernels.PLAIN and kernels.kernels_for("mps") is kernels.PLAIN
    monkeypatch.setitem(table.THERE, "cuda", ("triton", lambda: False))
    assert kernels.kernels_for("cuda") is kernels.PLAIN
    monkeypatch.setitem(table.THERE, "cuda", ("triton", lambda: True))
    monkeypatch.setitem(table.KERNELS, "triton", lambda modules: modules)
    assert kernels.kernels_for("cuda:1", "a rule") == "a rule"


def test_plain_torch_is_left_alone_on_other_devices(triton):
    """As `fused` is used: a tensor that is on no card takes the plain way, to the bit."""
    x, y, shift, scale, by = tokens(1, 2, 3, 12)
    fused = kernels.fused()
    assert torch.equal(fused.modulate(norm(12), x, shift, scale), plain.modulate(norm(12), x, shift, scale))
    assert torch.equal(fused.gate(x, y, by), plain.gate(x, y, by))
