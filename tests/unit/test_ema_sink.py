"""The EMA sink: what a layer gets to attend to, against the formula applied to a plain list of frames."""
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.policies import EmaSinkOptions, WindowOptions, build
from forcing_testkit.forcing_corekit import gap, rotated
from forcing_testkit.passkit import GRID, LAYERS, TOKENS, memory, play, script

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = EmaSinkOptions(alpha=0.9)
SHAPES = {
    "published": PUBLISHED, "compact": replace(PUBLISHED, compact=True), "float32": replace(PUBLISHED, sink_dtype="float32"),
    "block over sink": EmaSinkOptions(9, 2, 4, 0.6), "block under sink": EmaSinkOptions(6, 3, 1, 0.5),
    "sink of one": EmaSinkOptions(5, 1, 2, 0.9), "window no multiple": EmaSinkOptions(7, 2, 3, 0.8),
    "no sink": EmaSinkOptions(6, 0, 3, 0.5), "alpha 0": EmaSinkOptions(9, 3, 3, 0.0)}
by_shape = pytest.mark.parametrize("shape", SHAPES)


def direct(options, seen):
    """(keys, values) that each pass of one layer must get: unrotated frames in a list, the sink in front."""
    frames, k, v = [], {}, {}
    for now in seen:
        span = list(now.call.span)
        while now.opens and len(frames) + len(span) > options.window:
            old = frames.pop(options.sink)
            for kept in (k, v):
                gone = kept.pop(old)
                if options.sink:
                    into = frames[(old - frames[0]) % options.sink]
                    kept[into] = options.alpha * kept[into] + (1 - options.alpha) * gone
        frames += [f for f in span if f not in frames]
        for kept, new in ((k, now.k), (v, now.v)):
            kept.update(zip(span, new.unflatten(1, (-1, TOKENS)).unbind(1)))
        keys = torch.cat([k[f] for f in frames], dim=1)
        yield rotated(keys, range(len(frames)), GRID), torch.cat([v[f] for f in frames], dim=1)


@by_shape
@pytest.mark.parametrize("given", [0, 4])
def test_every_pass_gets_what_the_formula_says(shape, given):
    """Evict, blend, write, read. A blend at every step, of rotated keys, of the newest frames, after the read or into
    another sink frame, and a sink whose rotated keys stay as before the blend, all give other numbers."""
    options, checked = SHAPES[shape], 0
    seen = play(options, 20, given=given)
    for layer in range(LAYERS):
        mine = [one for one in seen if one.layer == layer]
        for one, (keys, values) in zip(mine, direct(options, mine), strict=True):
            assert gap(one.keys, keys) <= 1e-5 and gap(one.values, values) <= 1e-5
            assert gap(one.turned, rotated(one.q, one.plan.query, GRID)) <= 1e-5
            checked += bool(one.plan.evict)
    assert checked >= 6


def test_positions_are_counted_in_the_window():
    """Traced from the published code: 3, 6, then 9 keys at 0.., queries last."""
    plans = [one.plan for one in play(PUBLISHED, 18) if one.opens and not one.layer]
    assert [plan.positions for plan in plans] == [tuple(range(n)) for n in (3, 6, 9, 9, 9, 9)]
    assert [plan.query for plan in plans] == [(0, 1, 2), (3, 4, 5)] + 4 * [(6, 7, 8)]
    assert [plan.evict for plan in plans] == 3 * [()] + [(3, 4, 5), (6, 7, 8), (9, 10, 11)]


def test_alpha_1_is_a_window_and_less_is_not():
    """With nothing blended the numbers are those of the relative window, bit for bit. 0.9 changes the sink alone."""
    window, still, moving = (play(o, 18) for o in (WindowOptions(9, 3, 3, "relative"), replace(PUBLISHED, alpha=1.0),
                                                   PUBLISHED))
    edge = PUBLISHED.sink * TOKENS
    for one, same, other in zip(window, still, moving, strict=True):
        assert torch.equal(one.keys, same.keys) and torch.equal(one.values, same.values)
        assert torch.equal(one.keys[:, edge:], other.keys[:, edge:])
    assert gap(window[-1].keys[:, :edge], moving[-1].keys[:, :edge]) > 0.1


def sink_values(options, frames, dtype):
    return play(options, frames, dtype=dtype)[-1].values[:, :options.sink * TOKENS].float()


def test_bfloat16_rounds_the_blends_away_unless_the_sink_is_float32():
    """The published code in bfloat16 has an almost static sink (nine tenths of the drift are lost); the paper's
    formula needs the copy in float32."""
    options, frames = EmaSinkOptions(), 9 + 3 * 30
    exact = sink_values(options, frames, torch.float32)
    start = sink_values(replace(options, alpha=1.0), frames, torch.float32)
    drift = float((exact - start).norm())
    static = sink_values(replace(options, alpha=1.0), frames, torch.bfloat16)
    model = sink_values(options, frames, torch.bfloat16)
    precise = sink_values(replace(options, sink_dtype="float32"), frames, torch.bfloat16)
    assert float((model - static - (exact - start)).norm()) > 0.8 * drift
    assert float((precise - exact).norm()) < 0.4 * drift


def test_a_block_begun_again_is_not_blended_twice():
    """After an interrupt the same block starts anew on the same store."""
    plain = script(PUBLISHED, 15)
    again = plain[:10] + plain[9:]
    assert plain[9] == (9, 3, "noisy") and len(again) == len(plain) + 1
    now = memory(PUBLISHED, 15)
    seen = play(PUBLISHED, 15, passes=again, into=now)
    mine = [one for one in seen if one.layer == 0]
    assert [bool(one.plan.evict) for one in mine[9:12]] == [True, False, False]
    for one, (keys, _) in zip(mine, direct(PUBLISHED, mine), strict=True):
        assert gap(one.keys, keys) <= 1e-5


def test_a_rewritten_sink_takes_its_copy_along():
    """A renewed sink (recache after `forget`) must not go on with the float32 copy of the old one."""
    options = replace(PUBLISHED, sink_dtype="float32")
    now = memory(options, 30)
    play(options, 30, passes=script(options, 15), into=now, dtype=torch.bfloat16)
    now.forget()
    rest = [(6, 9, "recache"), (15, 3, "noisy"), (15, 3, "clean"), (18, 3, "noisy")]
    used, fresh = (play(options, 30, passes=rest, into=into, seed=7, dtype=torch.bfloat16)
                   for into in (now, memory(options, 30)))
    for one, other in zip(used, fresh, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    assert used[-1].plan.evict == (12, 13, 14)


def test_int8_stores_blend_too():
    """Within what int8 loses: an eighth of a percent of the largest number a read."""
    plain, coded = (play(o, 18)[-1] for o in (PUBLISHED, replace(PUBLISHED, store="int8", sink_dtype="float32")))
    assert 0 < gap(plain.values, coded.values) < 0.05 and gap(plain.keys, coded.keys) < 0.08


@pytest.mark.parametrize("options, message", [
    ({"alpha": 1.5}, "from 0 to 1"), ({"sink_dtype": "bf16"}, "model, float32"), ({"window": None}, "needs a window"),
    ({"window": 5, "sink": 3}, "at least 6 frames")])
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ForcingError, match=message):
        EmaSinkOptions(**options)


def test_a_video_that_fits_pays_nothing_extra():
    """No raw keys and no copies where nothing can ever be evicted."""
    sizes = {"layers": 2, "frame_tokens": 2, "dim": 256, "batch": 1, "element_size": 2}
    plain = build(WindowOptions(9, 3, 3), 9)
    fits = build(replace(PUBLISHED, sink_dtype="float32"), 9)
    assert fits.keys is plain.keys and fits.store_bytes(**sizes) == 2 * 9 * 2 * 256 * 2 * 2
    longer = build(replace(PUBLISHED, sink_dtype="float32"), 10)
    assert longer.store_bytes(**sizes) == 2 * 9 * 2 * 256 * 2 * 3 + 2 * 3 * 2 * 256 * 4 * 2
