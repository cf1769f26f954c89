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
    table = Rope((2, 3), 128, matrices=True).table([position])
    assert table.shape == (1, 6, 1, 64, 2, 2) and table.dtype == torch.float32
    turns = Rope((2, 3), 128).table([position])
    assert torch.equal(torch.view_as_real(turns), table[..., 0])
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


@pytest.mark.parametrize("bases", [(), (9000.0, 12000.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_matrices_turn_alike(dtype, bases):
    """One complex product where the device has those, two columns of a matrix elsewhere: to the last bit or two, also for
    single tokens and for heads that differ."""
    x = torch.randn(2, 12, 2, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    fast, plain = (Rope((2, 3), 128, "cpu", bases, matrices) for matrices in (False, True))
    within = 1e-6 if dtype is torch.float32 else 0.04
    assert gap(rotate(x, fast.table([3, 500])), rotate(x, plain.table([3, 500]))) <= within
    if not bases:
        place = torch.tensor([[3] * 12, [900] * 12]), torch.arange(12).expand(2, -1) % 6
        assert gap(rotate(x, fast.tokens(*place, 0, 1000)), rotate(x, plain.tokens(*place, 0, 1000))) <= within


def test_a_device_without_complex_numbers_gets_matrices():
    assert not Rope((1, 1), 128, "meta").table([1]).is_complex() and Rope((1, 1), 128).table([1]).is_complex()


@pytest.mark.parametrize("low, high", [(3, 6), (0, 5000)], ids=["a narrow range", "a wide one"])
def test_single_tokens_turn_as_whole_frames_do(low, high):
    """A table of a wide range would cost more the longer a video gets."""
    rope = Rope((2, 3), 128)
    positions, cells = torch.tensor([[5, 3, 4], [4, 5, 5]]), torch.tensor([[0, 4, 2], [1, 1, 5]])
    made = rope.tokens(positions, cells, low, high)
    assert sum(len(table) for table in rope._recent.values()) <= 3
    for sample, token in [(b, n) for b in range(2) for n in range(3)]:
        whole = rope.table([int(positions[sample, token])])[0, int(cells[sample, token])]
        assert torch.allclose(made[sample, token], whole, atol=1e-7, rtol=0)
