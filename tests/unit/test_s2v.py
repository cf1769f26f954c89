"""What an S2V network has beside its blocks, without a network: where pictures stand, what is heard, what is attended to.

Against ComfyUI's own forward: tests/host/test_s2v_host.py.
"""
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.conditioning import Held
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.plan import REFERENCE, Call
from forcing_pack.forcing_core.policies import PerStepOptions, RecencyOptions, WindowOptions
from forcing_pack.forcing_core.rope import Rope, rotate
from forcing_pack.forcing_core.wan import Stand, Voice, picture_tokens, seeing
from forcing_pack.forcing_core.wan.s2v import START, Pictures, _Places

GRID, HEADS, HEAD_DIM = (4, 4), 2, 128
TOKENS = GRID[0] * GRID[1]


def pictures(tokens=5, layers=1):
    draw = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, layers, 1, tokens, HEADS, HEAD_DIM, generator=draw)
    places = torch.cat([torch.full((tokens, 1), 30.0), torch.rand(tokens, 2, generator=draw)], dim=1).double()
    return Pictures(places, [*k], [*v])


# -- where the reference stands --------------------------------------------------------------------------------

def test_the_reference_stands_where_the_stock_model_has_it():
    """max(30, F + 9) for a video that ends with the block."""
    for first in range(0, 60, 3):
        assert START + Stand().moved(Call(first, 3, "noisy")) == max(30, first + 3 + 9)


def test_live_avatar_draws_4_to_30_frames_behind_the_first_one():
    stand, late = Stand(1, 27), [Call(first, 3, "noisy", sigma=s) for first in range(60, 1260, 3) for s in (1.0, 0.5)]
    ahead = [START + stand.moved(call) - call.first for call in late]
    assert {*ahead} == {*range(4, 31)}
    assert ahead == [START + stand.moved(replace(call, held=(1, 2))) - call.first for call in late]  # as in a resumed run
    early = {START + stand.moved(Call(0, 3, "noisy", sigma=s / 100)) for s in range(100)}
    assert early == {30}
    with pytest.raises(ForcingError, match="makes no sense"):
        Stand(5, 4)


def test_places_are_those_of_the_rotary_embedding():
    """Of a reference, and of tokens of a coarser grid, which lie between those of the fine one."""
    places = _Places().rope_encode(1, 2 * GRID[0], 2 * GRID[1], t_start=30)[0]
    turn = Pictures(places).turn(7, HEAD_DIM, torch.zeros(1))
    assert torch.allclose(turn, Rope(GRID, HEAD_DIM).table([37]), atol=1e-6)
    coarse = _Places().rope_encode(1, 8, 8, t_start=-3, steps_h=2, steps_w=2)[0]
    assert coarse.tolist() == [[-3, 0, 0], [-3, 0, 3], [-3, 3, 0], [-3, 3, 3]]
    assert picture_tokens(1, True, 8, 8) == 16 + (16 + 4 + 4) and picture_tokens(0, False, 8, 8) == 0


# -- what is heard ---------------------------------------------------------------------------------------------

def heard(frames=6):
    """Features of which every one is its own number."""
    return torch.arange(1.0, 4 * frames + 1).view(1, 1, 1, frames, 4)


@pytest.mark.parametrize(("first", "count", "begins", "ends"), [(0, 3, 1, 12), (1, 3, 1, 16), (2, 3, 1, 20), (3, 3, 5, 24)])
def test_a_forward_hears_two_latent_frames_before_its_own(first, count, begins, ends):
    part = Voice(Held(heard(), 3)).of(first, count)
    assert part.flatten().tolist() == list(range(begins, ends + 1))


def test_behind_the_end_there_is_silence():
    voice = Voice(Held(heard(), 3))
    assert voice.of(5, 3)[0, 0, 0, :, 0].tolist() == [13, 17, 21, 0, 0]
    assert voice.of(8, 3).eq(0).all() and voice.of(3, 3).flatten().tolist() == list(range(5, 25))
    assert voice.of(REFERENCE, 1).flatten().tolist() == [1, 2, 3, 4]


# -- what is attended to ---------------------------------------------------------------------------------------

def passes(options, blocks, frames=36):
    """(first, pass) of every noisy forward of a video, each of which has met its layer."""
    memory = make_memory(options, frames, layers=1, grid=GRID, head_dim=HEAD_DIM, device="cpu")
    for first in range(0, 3 * blocks, 3):
        now = memory.begin(first, 3, "noisy", 0.5)
        yield first, now


def test_a_pass_attends_to_pictures_behind_its_own_keys():
    k = torch.randn(1, 3 * TOKENS, HEADS, HEAD_DIM)
    mine = pictures()
    for options in (WindowOptions(6, 0, 3), WindowOptions(6, 0, 3, "relative"), PerStepOptions(6, 0, 3)):
        for first, now in passes(options, 12):
            q, keys, values = seeing(now, mine, Stand()).exchange(0, k, k, k)
            plain = min(first + 3, 6) * TOKENS
            assert keys.shape[1] == values.shape[1] == plain + 5 and torch.equal(values[:, plain:], mine.values[0])
            assert q.shape[1] == 3 * TOKENS
            # in the window's own count, as far from the query as in the video
            moved = max(30, first + 12) - 30 + now.plan.query[0] - first
            assert torch.equal(keys[:, plain:], rotate(mine.keys[0], mine.turn(moved, HEAD_DIM, k)))


def test_passes_that_see_nothing_of_them_stay_as_they_are():
    (_, now), = passes(WindowOptions(6, 0, 3), 1)
    assert seeing(now, None, Stand()) is now
    silent = seeing(make_memory(WindowOptions(6, 0, 3), 9, layers=1, grid=GRID, head_dim=HEAD_DIM, device="cpu")
                    .begin(0, 3, "clean"), pictures(), Stand())
    k = torch.randn(1, 3 * TOKENS, HEADS, HEAD_DIM)
    assert silent.silent and silent.exchange(0, None, k, k)[0] is None


def test_a_memory_that_weighs_its_frames_is_refused():
    (_, now), = passes(RecencyOptions(window=9, sink=0, recent=3), 1)
    with pytest.raises(ForcingError, match="choose the policy window"):
        seeing(now, pictures(), Stand())
