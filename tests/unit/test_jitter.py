"""Positions that differ from head to head (LoL), against each head turned alone."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory, memory_bytes
from forcing_pack.forcing_core.options import cache_of
from forcing_pack.forcing_core.policies import WindowOptions, build
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.rope import Rope, angles, axis_dims, rotate
from forcing_testkit.forcing_corekit import gap
from forcing_testkit.policykit import TOKENS, SampleNoise, empty, network, video

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = (2, 3)
OPTIONS = {"relative": WindowOptions(9, 2, 3, "relative", jitter=0.8),
           "rebased": WindowOptions(9, 2, 3, "rebased", 12, jitter=0.8),
           "compact": WindowOptions(9, 2, 3, "relative", compact=True, jitter=0.8)}
FRAMES = 18


def test_bases_are_spread_around_the_trained_one_and_never_change():
    policy = build(OPTIONS["relative"], 9)
    bases = policy.bases(12)
    assert bases == build(OPTIONS["rebased"], 60).bases(12) and len({*bases}) == 12
    assert all(2000 <= base <= 18000 for base in bases) and max(bases) - min(bases) > 8000
    assert build(WindowOptions(9, 2, 3), 9).bases(12) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_head_turns_in_time_by_its_own_base(dtype):
    """Space as ever, time by position * base^(-2i / dim): a base of another head, or in space too, gives other numbers."""
    bases, places = (3000.0, 10000.0, 15000.0), (0, 5, 700)
    x = torch.randn(2, 3 * 6, 3, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, plain = rotate(x, Rope(GRID, 128, bases=bases).table(places)), rotate(x, Rope(GRID, 128).table(places))
    dim = axis_dims(128)[0]
    assert out.dtype is dtype and out.shape == x.shape
    assert gap(out[:, :, 1], plain[:, :, 1]) <= 1e-6 and gap(out[..., dim:], plain[..., dim:]) <= 1e-6
    pairs = torch.view_as_complex(x[..., :dim].double().unflatten(-1, (-1, 2)).contiguous())
    for head, base in enumerate(bases):
        turn = torch.polar(torch.ones(3, dim // 2, dtype=torch.float64), angles(places, dim, base)).repeat_interleave(6, 0)
        wanted = torch.view_as_real(pairs[:, :, head] * turn).flatten(-2)
        assert gap(out[:, :, head, :dim], wanted) <= (1e-5 if dtype is torch.float32 else 0.04)


def test_equal_bases_are_no_jitter():
    x = torch.randn(1, 4 * 6, 2, 128, generator=torch.Generator().manual_seed(2))
    same = Rope(GRID, 128, bases=(10000.0,) * 2).table((3, 4, 8, 9))
    assert gap(rotate(x, same), rotate(x, Rope(GRID, 128).table((3, 4, 8, 9)))) <= 1e-6


@pytest.mark.parametrize("name", OPTIONS)
def test_videos(name):
    """Another video than without, whose samples, beginning and bytes are as they should be. Raw keys that are turned at
    every read and a kept view that is turned where it moves are the same."""
    options = OPTIONS[name]
    plain = WindowOptions(options.window, options.sink, options.block, options.positions, options.limit, options.compact)
    both, alone = video(options, FRAMES, samples=(0, 1)), [video(options, FRAMES, samples=(s,)) for s in (0, 1)]
    assert gap(both, torch.cat(alone)) <= 1e-4 and gap(alone[0], video(plain, FRAMES)) > 1e-3
    other, held = SampleNoise((0,), FRAMES), empty(options, FRAMES)
    other.draws[:, 12:] += 1.0
    changed = video(options, FRAMES, noise=other, into=held)
    assert torch.equal(changed[:, :, :12], alone[0][:, :, :12]) and gap(changed[:, :, 12:], alone[0][:, :, 12:]) > 0.1
    held.forget()
    assert torch.equal(video(options, FRAMES, into=held), alone[0])
    config = network().config
    assert held.store.nbytes == memory_bytes(held.policy, layers=config.layers, frame_tokens=TOKENS, dim=config.dim,
                                             batch=1, element_size=4)
    if name == "compact":
        assert gap(alone[0], video(OPTIONS["relative"], FRAMES)) <= 1e-4


def test_the_preset_and_what_makes_no_sense():
    assert cache_of(get("lol")) == WindowOptions(12, 3, 3, "rebased", jitter=0.8) and get("lol").lora == get("longlive").lora
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ForcingError, match="jitter.*0.8 as published"):
            WindowOptions(jitter=wrong)
    with pytest.raises(ForcingError, match="Pass heads to make_memory"):
        make_memory(OPTIONS["relative"], 9, layers=1, grid=GRID, head_dim=128, device="cpu")
