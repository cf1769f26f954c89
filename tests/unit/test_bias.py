"""Key biases through kernels without biases, against a softmax that adds them."""
from dataclasses import dataclass

import pytest
import torch
from forcing_pack.forcing_core.attention import backend
from forcing_pack.forcing_core.bias import biased_attention, frame_bias
from forcing_pack.forcing_core.passes import Pass
from forcing_pack.forcing_core.plan import Call
from forcing_pack.forcing_core.policies import Window, WindowOptions
from forcing_pack.forcing_core.rope import Rope
from forcing_pack.forcing_core.store import Store
from forcing_testkit.forcing_corekit import gap, rotated
from forcing_testkit.policykit import attended, softmax_attention

pytestmark = pytest.mark.usefixtures("one_thread")
KERNEL = backend("sdpa")


def tensors(batch=2, queries=5, keys=9, heads=3, width=128, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, heads, width, generator=draw) for n in (queries, keys, keys)]


def biases(kind):
    draw = torch.Generator().manual_seed(7)
    return {"moderate": torch.randn(2, 9, 1, generator=draw),
            "counts": torch.randint(1, 400, (2, 9, 1), generator=draw).float().log(),
            "very negative": -90 * torch.rand(2, 9, 1, generator=draw),
            "all far down": -500 + torch.randn(2, 9, 1, generator=draw),
            "far up": 300 + torch.randn(2, 9, 1, generator=draw),
            "a head": torch.randn(2, 9, 3, generator=draw),
            "removed": torch.where(torch.rand(2, 9, 1, generator=draw) < 0.5, -torch.inf, 0.3)}[kind]


@pytest.mark.parametrize("kind", ["moderate", "counts", "very negative", "all far down", "far up", "a head", "removed"])
@pytest.mark.parametrize("width", [128, 64, 12])
def test_equals_the_biased_softmax(kind, width):
    """A weight on the values only, a denominator without weights, the scale of the wider head, or a weight that
    overflows or is lost, each give other numbers."""
    q, k, v = tensors(width=width)
    bias = biases(kind)
    out = biased_attention(KERNEL, q, k, v, bias)
    assert gap(out, softmax_attention(q, k, v, bias)) <= 1e-6
    assert gap(out, KERNEL(q, k, v)) > 0.01


def test_shapes_of_the_bias():
    q, k, v = tensors()
    bias = torch.linspace(-2, 2, 9)
    expected = softmax_attention(q, k, v, bias[None, :, None])
    for shape in (bias, bias.expand(2, -1), bias[None, :, None].expand(2, -1, 3)):
        assert gap(biased_attention(KERNEL, q, k, v, shape), expected) <= 1e-6


def test_no_bias_changes_nothing():
    q, k, v = tensors()
    assert gap(biased_attention(KERNEL, q, k, v, torch.zeros(9)), KERNEL(q, k, v)) <= 1e-6


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.006)])
def test_half_precision(dtype, tolerance):
    """Counts of hundreds times values would leave float16; out comes the type of the values."""
    q, k, v = (t.to(dtype) for t in tensors())
    v = v * 200
    bias = torch.tensor([1.0, 2, 3, 1, 1, 900, 700, 1, 5]).log()
    out = biased_attention(KERNEL, q, k, v, bias)
    assert out.dtype is dtype and out.isfinite().all()
    assert gap(out.float() / 200, softmax_attention(q, k, v, bias[None, :, None]) / 200) <= tolerance


def test_the_kernel_gets_one_plain_call_of_a_legal_width():
    """Kernels take heads in steps of 8 and neither mask nor bias."""
    widths = []

    def kernel(q, k, v):
        widths.append([t.shape[-1] for t in (q, k, v)])
        return KERNEL(q, k, v)

    biased_attention(kernel, *tensors(), torch.zeros(9))
    assert widths == [[136] * 3]


@dataclass
class Faded(Pass):
    """How a policy of its own would use it: every past frame fades by its age."""

    def attend(self, layer, q, keys, values, attention):
        fade = {frame: -0.3 * (self.call.first - frame) for frame in self.plan.read if frame not in self.call.span}
        return biased_attention(attention, q, keys, values, frame_bias(self, fade, 2))


def test_a_bias_a_frame_follows_the_frames_through_their_slots():
    """After evictions slots are not in temporal order; biases laid out in that order would hit other frames."""
    policy = Window(WindowOptions(5, 1, 2), 12)
    store, rope = Store(1, policy.capacity, 2, policy.keys), Rope((1, 2), 128)
    draw, past = torch.Generator().manual_seed(3), {}
    for first in range(0, 12, 2):
        q, k, v = torch.randn(3, 1, 4, 2, 128, generator=draw)
        now = Faded(policy.plan(Call(first, 2, "noisy", store.frames)), Call(first, 2, "noisy", store.frames), store, rope)
        out = attended(now, 0, q, k, v)
        past.update(zip(range(first, first + 2), zip(k.split(2, 1), v.split(2, 1))))
        frames = now.plan.read
        keys, values = (torch.cat([past[f][i] for f in frames], dim=1) for i in range(2))
        fade = torch.tensor([0.0 if f >= first else -0.3 * (first - f) for f in frames]).repeat_interleave(2)
        expected = softmax_attention(rotated(q, [first, first + 1], (1, 2)), rotated(keys, frames, (1, 2)), values,
                                     fade[None, :, None])
        assert gap(out, expected) <= 1e-5
    assert now.order != now.plan.read
