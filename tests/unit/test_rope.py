"""Rotary angles far out in time, and the rotation itself."""
import math
from fractions import Fraction

import pytest
import torch
from forcing_pack.forcing_core.rope import Rope, angles, axis_dims, rotate
from forcing_testkit.forcing_corekit import gap, rotated


def test_axis_split():
    """Heads of 128 turn 44 dimensions in time and 42 in either direction of the picture."""
    assert axis_dims(128) == (44, 42, 42)
    assert axis_dims(96) == (32, 32, 32)


@pytest.mark.parametrize("position", [0, 1, 255, 257, 999, 1000, 1023, 100000])
@pytest.mark.parametrize("dim", [44, 42])
def test_angles_far_out(position, dim):
    """Angles computed in float32 are off by 1e-4 near frame 1000 and by 1e-2 near frame 100000."""
    ours = angles([position], dim)
    assert ours.dtype == torch.float64 and ours.shape == (1, dim // 2)
    exact = [position * math.pow(10000.0, -2.0 * i / dim) for i in range(dim // 2)]
    assert max(abs(a - b) for a, b in zip(ours[0].tolist(), exact)) <= 1e-9


def test_exponents_are_per_axis():
    """One exponent series over all 64 pairs (instead of one an axis) is a known misreading."""
    assert float(angles([1.0], 42)[0, 1]) == pytest.approx(10000 ** (-2 / 42), abs=1e-12)
    assert float(angles([1.0], 44)[0, 1]) == pytest.approx(10000 ** (-2 / 44), abs=1e-12)


@pytest.mark.parametrize("position", [1000, 100000])
def test_table_entries_far_out(position):
    """The matrices are rounded to float32 only after cosine and sine: no more than a float32 rounding off."""
    table = Rope((2, 3), 128).table([position])
    assert table.shape == (1, 6, 1, 64, 2, 2) and table.dtype == torch.float32
    for i in range(22):
        turns = Fraction(position * math.pow(10000.0, -2.0 * i / 44))
        cos, sin = math.cos(turns), math.sin(turns)
        expected = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        assert gap(table[0, 4, 0, i].double(), expected) <= 6e-8


def test_rotate_is_complex_multiplication():
    """Pairs must be adjacent dimensions and tokens frame-major: half-split pairs or swapped axes differ at once."""
    x = torch.randn(2, 3 * 2 * 3, 2, 128, generator=torch.Generator().manual_seed(1))
    ours = rotate(x, Rope((2, 3), 128).table([0, 7, 1023]))
    assert gap(ours, rotated(x, [0, 7, 1023], (2, 3))) <= 2e-6
    assert gap(ours[:, 6:], x[:, 6:]) > 0.1
    assert gap(ours.norm(dim=-1), x.norm(dim=-1)) <= 1e-5


def test_rotate_leaves_its_input():
    """The store hands out views of raw keys; a rotation in place would turn them again at every read."""
    x = torch.randn(1, 6, 2, 128)
    before = x.clone()
    rotate(x, Rope((2, 3), 128).table([5]))
    assert torch.equal(x, before)


def test_scores_depend_on_differences_only():
    """What makes moving a key exact: the same shift of query and key leaves their product unchanged."""
    rope, draw = Rope((1, 1), 128), torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 1, 1, 1, 128, generator=draw)

    def score(a, b):
        return float((rotate(q, rope.table([a])) * rotate(k, rope.table([b]))).sum())

    assert score(905, 900) == pytest.approx(score(5, 0), abs=1e-4)
    assert abs(score(905, 900) - score(906, 900)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_their_positions(dtype):
    """Regression: ComfyUI's own sampler makes positions in the compute dtype; in bfloat16 frames 300, 301 and 302
    become 300, 300 and 302. Here the position never has a dtype of its own."""
    x = torch.ones(1, 1, 1, 128, dtype=dtype)
    rope = Rope((1, 1), 128)
    turned = [rotate(x, rope.table([p])) for p in (300, 301, 302)]
    assert all(t.dtype == dtype for t in turned)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert gap(turned[a].float(), turned[b].float()) > 0.1
    for t, position in zip(turned, (300, 301, 302)):
        assert gap(t.float(), rotated(x.float(), [position], (1, 1))) <= 2 ** -7
