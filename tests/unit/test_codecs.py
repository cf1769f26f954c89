"""Codecs: what a number becomes in the store, how far off it comes back, and how many bytes it takes."""
import pytest
import torch
from forcing_pack.forcing_core.codecs import CODECS, picked, sample, tensors
from forcing_pack.forcing_core.errors import ForcingError

SHAPE = 2, 5, 6, 3, 128  # B, slots, tokens, heads, head_dim
ROUNDED = {"int8": 0.012, "fp8": 0.03}  # largest relative L2 error of normal numbers

pytestmark = pytest.mark.usefixtures("one_thread")


def empty(shape, dtype):
    return torch.empty(shape, dtype=dtype)


def normal(frames=5, seed=0, dtype=torch.float32):
    shape = (SHAPE[0], frames, *SHAPE[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def through(codec, x):
    """x written into a buffer and read again, as [B, n, tokens, H, D]."""
    buffer = codec.make(tuple(x.shape), x.dtype, empty)
    codec.write(buffer, slice(0, x.shape[1]), x)
    return codec.read(buffer, [slice(0, x.shape[1])]).unflatten(1, (-1, x.shape[2]))


def relative(a, b, axes=None):
    a, b = a.double(), b.double()
    return ((a - b).pow(2).sum(axes) / b.pow(2).sum(axes)).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_codec_computes_nothing(dtype):
    """A copy at every read would cost more than the attention of a small window."""
    codec, x = CODECS["model"], normal(dtype=dtype)
    buffer = codec.make(SHAPE, dtype, empty)
    codec.write(buffer, slice(0, 5), x)
    read = codec.read(buffer, [slice(1, 4)])
    assert codec.exact and torch.equal(read, x[:, 1:4].flatten(1, 2))
    assert read[0].data_ptr() == buffer[0, 1:].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_numbers_come_back_nearly(name, dtype):
    x = normal(dtype=dtype)
    back = through(CODECS[name], x)
    assert not CODECS[name].exact and back.dtype == dtype
    assert 1e-3 < float(relative(back, x)) <= ROUNDED[name]


def test_int8_is_off_by_half_a_step_at_most():
    x = normal()
    step = x.abs().amax(-1, keepdim=True) / 127
    off = ((through(CODECS["int8"], x) - x).abs() / step).max()
    assert 0.45 < float(off) <= 0.5 + 1e-4
    assert torch.allclose(through(CODECS["int8"], x).abs().amax(-1), x.abs().amax(-1), rtol=1e-6)


def test_fp8_is_off_by_a_sixteenth_of_the_number_at_most():
    """Numbers above 1/2^14 of the largest have full precision."""
    x = normal()
    full = x.abs() > x.abs().max() / 2 ** 14
    off = ((through(CODECS["fp8"], x) - x).abs() / x.abs())[full]
    assert 0.05 < float(off.max()) <= 1 / 16 + 1e-5


@pytest.mark.parametrize("name, axis", [("int8", 3), ("fp8", 3), ("int8", 1), ("fp8", 1), ("int8", 2)])
def test_a_loud_head_frame_or_token_costs_the_quiet_ones_nothing(name, axis):
    """With one scale for all, a head 10000 times as loud as another would leave zeros of that one."""
    loudness = torch.logspace(-2, 2, SHAPE[axis]).reshape([-1 if i == axis else 1 for i in range(5)])
    x = normal() * loudness
    others = [i for i in range(5) if i != axis]
    assert float(relative(through(CODECS[name], x), x, others).max()) <= ROUNDED[name]


@pytest.mark.parametrize("name", CODECS)
def test_frames_lie_where_they_were_put(name):
    """Slots are written alone and read in any order; a scale left behind in another slot ruins the frame."""
    codec, wanted = CODECS[name], {}
    buffer = codec.make(SHAPE, torch.float32, empty)
    for slot, loud in ((4, 1.0), (0, 100.0), (1, 0.01), (2, 1.0), (0, 3.0)):
        x = loud * normal(1, seed=slot)
        codec.write(buffer, slice(slot, slot + 1), x)
        wanted[slot] = through(codec, x).flatten(1, 2)
    read = codec.read(buffer, [slice(4, 5), slice(0, 2), slice(2, 3)])
    assert torch.equal(read, torch.cat([wanted[slot] for slot in (4, 0, 1, 2)], dim=1))


@pytest.mark.parametrize("name", CODECS)
def test_single_tokens_move_without_being_rounded_again(name):
    """With scales of their own: what a token is does not depend on those that it was stored with."""
    codec, x = CODECS[name], normal(6)[:, :, :1] * torch.logspace(-2, 2, 6).reshape(1, 6, 1, 1, 1)
    buffer = codec.make(tuple(x.shape), x.dtype, empty)
    codec.write(buffer, slice(0, 6), x)
    order = torch.tensor([[5, 0, 3], [1, 1, 4]])
    index = order[..., None, None, None]
    chosen = picked(buffer, lambda t: t.gather(1, index.expand(-1, -1, *t.shape[2:])))
    wanted = x.gather(1, index.expand(-1, -1, *x.shape[2:]))
    assert torch.equal(codec.unpack(chosen), codec.unpack(codec.pack(wanted)))
    assert all(a.dtype == b.dtype for a, b in zip(tensors(chosen), tensors(buffer)))
    assert float(relative(codec.unpack(chosen), wanted, [3, 4]).max()) <= 1.2 * ROUNDED.get(name, 0.0)


@pytest.mark.parametrize("name", CODECS)
def test_a_sample_is_a_view(name):
    codec, x = CODECS[name], normal()
    buffer = codec.make(SHAPE, x.dtype, empty)
    codec.write(buffer, slice(0, 5), x)
    before = codec.read(buffer, [slice(0, 5)]).clone()
    codec.write(sample(buffer, 1), slice(2, 3), 7 * x[1:, :1])
    after = codec.read(buffer, [slice(0, 5)])
    changed = (after != before).unflatten(1, (5, -1)).flatten(2).any(-1)
    assert changed.tolist() == [[False] * 5, [False, False, True, False, False]]


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_zeros_and_nan_stays_visible(name):
    """The sampler stops at NaN; a codec that makes a number of it would hide a broken run."""
    x = normal()
    x[:, 0], x[1, 2, 3, 1, 7] = 0, torch.nan
    back = through(CODECS[name], x)
    assert torch.equal(back[:, 0], torch.zeros_like(back[:, 0]))
    assert bool(back[1, 2, 3, 1].isnan().any()) and bool(back[0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CODECS)
def test_bytes_are_those_of_the_buffer(name, dtype):
    buffer = CODECS[name].make(SHAPE, dtype, empty)
    assert CODECS[name].bytes(SHAPE, dtype.itemsize) == sum(t.nbytes for t in tensors(buffer)) > 0
    assert all(t.shape[:2] == SHAPE[:2] for t in tensors(buffer))


def test_one_byte_a_number_and_little_more():
    shape = 1, 12, 1560, 12, 128  # Wan 1.3B at 832x480
    model, int8, fp8 = (CODECS[name].bytes(shape, 2) for name in ("model", "int8", "fp8"))
    assert 0.5 < int8 / model < 0.51 and 0.5 < fp8 / model < 0.5001


def test_a_device_that_cannot_is_refused_before_the_run():
    for codec in CODECS.values():
        codec.check("cpu")
    CODECS["model"].check("meta")
    with pytest.raises(ForcingError, match="cannot keep keys and values as fp8. Use store 'model'"):
        CODECS["fp8"].check("meta")
