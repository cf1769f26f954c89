"""Slices of per-frame conditioning: what a forward gets, from tensors and from streams, beyond the end, with given frames."""
import pytest
import torch
from forcing_pack.forcing_core.conditioning import Held, Slices, Streamed, with_given
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.plan import REFERENCE


def numbered(frames, dim=2):
    """A tensor whose values are the numbers of its frames."""
    shape = [1] * 5
    shape[dim] = frames
    return torch.arange(float(frames)).view(shape).expand(*[2 if i != dim else -1 for i in range(5)])


def numbers(part, dim=2):
    return part.movedim(dim, 0).flatten(1)[:, 0].tolist()


def streamed(frames, dim=2):
    asked = []

    def make(first, count):
        asked.append((first, count))
        return numbered(frames, dim).narrow(dim, first, count)
    return Streamed(make, frames), asked


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_forward_gets_its_own_frames(dim, stream):
    source = streamed(9, dim)[0] if stream else Held(numbered(9, dim), dim)
    slices = Slices(source, dim)
    for first, count in ((0, 3), (0, 3), (3, 3), (2, 5), (6, 3), (0, 2)):
        part = slices.of(first, count)
        assert numbers(part, dim) == list(range(first, first + count))
        assert part.shape == numbered(9, dim).narrow(dim, first, count).shape


def test_with_a_knot_a_stream_is_read_once_and_in_order():
    """Slices of c + k frames for denoising steps, of c for the clean pass, and the next ones begin k frames earlier than
    they end: every frame is asked for once, and no more than a slice is kept."""
    source, asked = streamed(10)
    slices = Slices(source, 2)
    for first in (0, 3, 6):
        for count in (4, 4, 3):
            assert numbers(slices.of(first, count)) == list(range(first, first + count))
        assert slices._kept.shape[2] <= 4
    assert asked == [(0, 4), (4, 3), (7, 3)]


def test_a_recache_goes_back():
    source, asked = streamed(12)
    slices = Slices(source, 2)
    assert numbers(slices.of(6, 3)) == [6, 7, 8] and numbers(slices.of(3, 6)) == [3, 4, 5, 6, 7, 8]
    assert numbers(slices.of(9, 3)) == [9, 10, 11]
    assert asked == [(6, 3), (3, 6), (9, 3)]


@pytest.mark.parametrize(("first", "count", "expected"), [
    (6, 4, [6, 7, 7, 7]), (7, 2, [7, 7]), (8, 3, [7, 7, 7]), (500, 1, [7]), (REFERENCE, 2, [0, 0])])
@pytest.mark.parametrize("stream", [False, True])
def test_beyond_the_end_the_last_frame_goes_on_and_a_reference_gets_the_first(first, count, expected, stream):
    slices = Slices(streamed(8)[0] if stream else Held(numbered(8), 2), 2)
    for _ in range(2):
        assert numbers(slices.of(first, count)) == expected


def test_sources_that_do_not_keep_their_word_are_refused():
    with pytest.raises(ForcingError, match="3 latent frames of conditioning were asked for at frame 6, and 2 came"):
        Slices(Streamed(lambda first, count: numbered(2), 9), 2).of(6, 3)
    with pytest.raises(ForcingError, match="has no frames"):
        Slices(Held(numbered(0), 2), 2)


@pytest.mark.parametrize(("at", "inside"), [(0, slice(0, 2)), (2, slice(2, 4)), (3, slice(3, 4)), (-1, slice(0, 1))])
def test_given_frames_are_written_into_their_channels(at, inside):
    """Mask 1 and the latents there, everything else untouched, whatever part of them lies in the slice."""
    draw = torch.Generator().manual_seed(0)
    concat, given = torch.randn(2, 7, 4, 2, 2, generator=draw), torch.randn(1, 3, 2, 2, 2, generator=draw)
    made = with_given(concat, given, at, 3)
    outside = [f for f in range(4) if f not in range(4)[inside]]
    assert torch.equal(made[:, :, outside], concat[:, :, outside])
    assert (made[:, :4, inside] == 1).all()
    assert torch.equal(made[:, 4:, inside], given[:, :, inside.start - at:inside.stop - at].expand(2, -1, -1, -1, -1))
    assert not torch.equal(made, concat)
