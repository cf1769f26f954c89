"""Where random numbers come from: keyed by block and step, prefix-stable, and never the global generator."""
import pytest
import torch
from forcing_pack.forcing_core.noise import BlockNoise, CoreNoise, ReferenceNoise, mix
from forcing_pack.forcing_core.plan import Block, layout

BLOCK = Block(2, 6, 3)


def keyed(seed=5, batch=1, size=(4, 6)):
    return BlockNoise(seed, (batch, 4), size)


def test_same_key_same_numbers():
    """Drawing in another order, twice, or from a new object must change nothing."""
    one, other = keyed(), keyed()
    other.renoise(BLOCK, 2), other.initial(Block(9, 27, 3))
    assert torch.equal(one.initial(BLOCK), other.initial(BLOCK))
    assert torch.equal(one.renoise(BLOCK, 1), other.renoise(BLOCK, 1))
    assert torch.equal(one.renoise(BLOCK, 1), one.renoise(BLOCK, 1))


def test_the_first_frame_of_a_block_is_no_part_of_the_key():
    """Given frames shift every block in time; the noise of a generated block stays."""
    assert torch.equal(keyed().initial(Block(2, 6, 3)), keyed().initial(Block(2, 7, 3)))


def test_every_part_of_the_key_counts():
    """Seed + block + step as a plain sum would give block 1 step 0 and block 0 step 1 the same numbers."""
    draws = [keyed(seed).initial(Block(b, b, 1)) for seed in (0, 1, 2) for b in (0, 1, 2)]
    draws += [keyed(seed).renoise(Block(b, b, 1), step) for seed in (0, 1, 2) for b in (0, 1, 2) for step in (0, 1, 2)]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(draws)


def test_mix_keeps_order_and_sign():
    words = [(1, 2, 3), (3, 2, 1), (2, 1, 3), (1, 2), (1, 2, 3, 0), (0, 0, 0), (-1, 2, 3), (2**64 - 2, 2, 3)]
    assert len({mix(*w) for w in words}) == len(words)
    assert all(0 <= mix(*w) < 2**63 for w in words)


def test_longer_video_has_the_shorter_as_prefix():
    """One draw for the whole clip (as in the references) would change block 0 with the length."""
    short, long = layout(6, 3), layout(60, 3)
    for a, b in zip(short, long):
        assert torch.equal(keyed().initial(a), keyed().initial(b))
        assert torch.equal(keyed().renoise(a, 0), keyed().renoise(b, 0))


@pytest.mark.parametrize("make", [
    lambda: keyed(),
    lambda: ReferenceNoise(5, (1, 4), (4, 6), 9),
    lambda: CoreNoise(5, torch.zeros(1, 4, 9, 4, 6)),
], ids=["keyed", "reference", "core"])
def test_the_global_generator_is_left_alone(make):
    """ComfyUI's own sampler calls torch.manual_seed inside the loop, which reseeds everything else in the process."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    noise = make()
    noise.initial(BLOCK), noise.renoise(BLOCK, 0)
    assert torch.equal(torch.get_rng_state(), before)
    first = make().renoise(BLOCK, 0)
    torch.manual_seed(12)
    assert torch.equal(make().renoise(BLOCK, 0), first)


def test_shape_and_scale():
    draw = keyed(batch=2, size=(16, 16)).initial(BLOCK)
    assert draw.shape == (2, 4, 3, 16, 16) and draw.dtype == torch.float32
    assert abs(float(draw.mean())) < 0.05 and abs(float(draw.std()) - 1) < 0.05
    assert not torch.equal(draw[0], draw[1])


def test_core_noise_is_manual_seed_per_block_and_step():
    """Old seeds of ComfyUI's AR sampler must give the old video: seed + 1000*block + step."""
    clip = torch.randn(1, 4, 9, 4, 6, generator=torch.Generator().manual_seed(1))
    noise = CoreNoise(123, clip)
    assert torch.equal(noise.initial(BLOCK), clip[:, :, 6:9])
    with torch.random.fork_rng():
        for step in (0, 2):
            torch.manual_seed(123 + 2 * 1000 + step)
            expected = torch.randn_like(clip[:, :, 6:9])
            assert torch.equal(noise.renoise(BLOCK, step), expected)


def test_reference_noise_order():
    """[B, F, C, H, W] for the clip first, then [B*n, C, H, W] a step, all from one generator."""
    generator = torch.Generator().manual_seed(77)
    clip = torch.randn(2, 6, 4, 2, 3, generator=generator)
    steps = [torch.randn(2 * 3, 4, 2, 3, generator=generator) for _ in range(3)]
    noise, blocks = ReferenceNoise(77, (2, 4), (2, 3), 6), layout(6, 3)
    assert torch.equal(noise.initial(blocks[0]), clip[:, :3].transpose(1, 2))
    for step in (0, 1):
        expected = steps[step].view(2, 3, 4, 2, 3).transpose(1, 2)
        assert torch.equal(noise.renoise(blocks[0], step), expected)
    assert torch.equal(noise.initial(blocks[1]), clip[:, 3:].transpose(1, 2))
    assert torch.equal(noise.renoise(blocks[1], 0), steps[2].view(2, 3, 4, 2, 3).transpose(1, 2))


def test_reference_noise_has_no_slots_for_given_frames():
    """The clip's noise starts at the first generated frame, wherever that stands in the video."""
    first, second = layout(6, 3, given=4)
    noise, plain = ReferenceNoise(7, (1, 4), (2, 3), 6), ReferenceNoise(7, (1, 4), (2, 3), 6)
    assert torch.equal(noise.initial(first), plain.initial(Block(0, 0, 3)))
    assert torch.equal(noise.initial(second), plain.initial(Block(1, 3, 3)))
