"""The block rollout: which passes run, in which order, on what, and how layouts and solvers behave."""
import gc
import math
import weakref

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import Block, context_chunks, layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import Switch, block_rollout
from forcing_pack.forcing_core.schedule import Level, levels, unipc_levels
from forcing_pack.forcing_core.solvers import consistency, unipc
from forcing_pack.forcing_core.store import store_bytes
from forcing_testkit.forcing_corekit import (
    CHANNELS,
    CONFIG,
    FakeDenoiser,
    Recorder,
    cached,
    gap,
    latents,
    network,
    prompts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

FOUR, TWO, ONE = (levels(steps, 5.0) for steps in ([1000, 750, 500, 250], [1000, 500], [1000]))
SIZE = (4, 6)


def noise(seed=3, batch=1):
    return BlockNoise(seed, (batch, CHANNELS), SIZE)


def events(blocks, steps=ONE, **settings_):
    """(events, calls, outputs) of a rollout without a network."""
    denoiser = Recorder(FakeDenoiser())
    made = [x for _, x in block_rollout(denoiser, blocks, steps, noise(), **settings_)]
    return denoiser.events, denoiser.calls, made


@pytest.mark.parametrize("name, expected, build", [
    ("four steps, 21 frames by 3", 34, lambda: events(layout(21, 3), FOUR)),
    ("four steps, framewise", 39, lambda: events(layout(8, 1), FOUR)),
    ("two steps after a first block of four", 19, lambda: events(layout(6, 1), TWO, first_levels=FOUR)),
    ("the same after a given image", 17,
     lambda: events(layout(5, 1, given=1), TWO, first_levels=FOUR, context=latents(1), block=1)),
    ("three given blocks", 3 + 4 + 1 + 4, lambda: events(layout(6, 3, given=9), FOUR, context=latents(9))),
    ("one switch", 34 + 1, lambda: events(layout(21, 3), FOUR, switches=[Switch(9, 1)], window=12)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_number_of_passes(name, expected, build):
    """The published counts (35, 40, 20, 18) less the last clean pass, which nothing ever reads."""
    assert len(build()[1]) == expected


def test_order_of_passes():
    """Steps of a block, then its clean pass, only then the next block; none after the last block."""
    phases = [(phase, first) for phase, first, _ in events(layout(7, 3), TWO)[0]]
    assert phases == [("noisy", 0), ("noisy", 0), ("clean", 0), ("noisy", 3), ("noisy", 3), ("clean", 3),
                      ("noisy", 6), ("noisy", 6)]


def test_nothing_runs_ahead_of_the_consumer():
    """A consumer that stops after a block must not pay for its clean pass nor for the next block."""
    denoiser = Recorder(FakeDenoiser())
    rollout = block_rollout(denoiser, layout(9, 3), FOUR, noise())
    block, _ = next(rollout)
    assert block == Block(0, 0, 3) and len(denoiser.calls) == 4
    rollout.close()
    assert len(denoiser.calls) == 4


def test_clean_passes_see_what_was_yielded():
    """The clean pass runs on the final x0 at the context timestep, given frames at timestep 0 always."""
    given_frames = latents(4)
    _, calls, made = events(layout(6, 3, given=4), TWO, context=given_frames, context_timestep=100.0)
    clean = [c for c in calls if c.phase == "clean"]
    assert [(c.first, c.frames, set(c.timesteps)) for c in clean] == [(0, 3, {0.0}), (3, 1, {0.0}), (4, 3, {100.0})]
    assert torch.equal(clean[0].x, given_frames[:, :, :3]) and torch.equal(clean[1].x, given_frames[:, :, 3:])
    assert torch.equal(clean[2].x, made[0])


def test_steps_mix_in_fresh_noise():
    """Next input = (1 - sigma)*x0 + sigma*noise of (block, step); the last step adds nothing."""
    _, calls, made = events(layout(6, 3), TWO)
    second = [c for c in calls if c.first == 3 and c.phase == "noisy"]
    block, sigma = Block(1, 3, 3), TWO[1].sigma
    assert torch.equal(second[0].x, noise().initial(block))
    assert gap(second[1].x, (1 - sigma) * second[0].out + sigma * noise().renoise(block, 0)) <= 1e-6
    assert torch.equal(made[1], second[1].out)


def test_first_levels_only_on_the_first_generated_block():
    """Causal Forcing++: the long list is for the first block that is generated, also when frames were given."""
    for start in (0, 2):
        context = latents(start) if start else None
        _, calls, _ = events(layout(3, 1, given=start), TWO, first_levels=FOUR, context=context, block=1)
        steps = {f: [c.timesteps[0] for c in calls if c.phase == "noisy" and c.first == f]
                 for f in range(start, start + 3)}
        assert steps[start] == [level.timestep for level in FOUR]
        assert steps[start + 1] == steps[start + 2] == [level.timestep for level in TWO]


# Switches ------------------------------------------------------------------------------------------------------


def test_switch_before_the_first_frame_rewrites_nothing():
    seen = events(layout(6, 3), switches=[Switch(0, 1)], window=6)[0]
    assert seen == [("text", 1), ("noisy", 0, 3), ("clean", 0, 3), ("noisy", 3, 3)]


@pytest.mark.parametrize("at", [4, 5, 6])
def test_switch_is_rounded_up_to_a_block(at):
    """Rounding down would change the prompt of frames that were asked for under the old one."""
    seen = events(layout(9, 3), switches=[Switch(at, 1)], window=6)[0]
    assert seen[3:] == [("clean", 3, 3), ("text", 1), ("recache", 0, 6), ("noisy", 6, 3)]


def test_recache_replays_the_last_window_of_clean_latents():
    """The replay is one forward over the latents that were yielded, at the context timestep, new prompt first."""
    seen, calls, made = events(layout(15, 3), switches=[Switch(12, 1)], window=7, context_timestep=50.0)
    replay = calls[[c.phase for c in calls].index("recache")]
    assert (replay.first, replay.frames, set(replay.timesteps)) == (5, 7, {50.0})
    assert torch.equal(replay.x, torch.cat(made[:4], dim=2)[:, :, 5:])
    assert seen.index(("text", 1)) + 1 == seen.index(("recache", 5, 7))


def test_recache_without_a_window_replays_everything():
    seen = events(layout(9, 3), switches=[Switch(6, 1)])[0]
    assert ("recache", 0, 6) in seen


def test_recache_includes_given_frames():
    context = latents(4)
    _, calls, made = events(layout(6, 3, given=4), switches=[Switch(7, 1)], window=9, context=context)
    replay = next(c for c in calls if c.phase == "recache")
    assert replay.first == 0 and torch.equal(replay.x, torch.cat([context, made[0]], dim=2))


def test_switch_right_after_given_frames():
    context = latents(4)
    seen, calls, _ = events(layout(3, 3, given=4), switches=[Switch(2, 1)], window=3, context=context)
    assert seen == [("clean", 0, 3), ("clean", 3, 1), ("text", 1), ("recache", 1, 3), ("noisy", 4, 3)]
    assert torch.equal(calls[2].x, context[:, :, 1:])


def test_of_two_switches_inside_one_block_the_last_wins():
    """Two recaches for one boundary would waste a window-long pass, and a forgotten one must not come later."""
    seen = events(layout(12, 3), switches=[Switch(5, 2), Switch(4, 1)], window=6)[0]
    assert [e for e in seen if e[0] in ("text", "recache")] == [("text", 2), ("recache", 0, 6)]


def test_renewed_sink_forgets_first():
    seen = events(layout(9, 3), switches=[Switch(6, 1, renew_sink=True)], window=6)[0]
    assert seen[4:7] == [("forget",), ("text", 1), ("recache", 0, 6)]


def test_switches_past_the_end_never_happen():
    assert events(layout(6, 3), switches=[Switch(6, 1)], window=6)[0] == events(layout(6, 3))[0]


def test_a_switch_changes_what_follows_and_nothing_before():
    net, texts = network(), [prompts(), prompts(seed=1)]

    def video(switches):
        denoiser = cached(net, WindowOptions(6, 0, 3), 12, texts=texts)
        return [x for _, x in block_rollout(denoiser, layout(12, 3), TWO, noise(), window=6, switches=switches)]

    plain, switched = video([]), video([Switch(6, 1)])
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], switched[:2]))
    assert all(gap(a, b) > 1e-2 for a, b in zip(plain[2:], switched[2:]))


# With the tiny network -----------------------------------------------------------------------------------------


def test_a_clean_pass_ends_at_the_last_keys():
    """Everything behind the last layer's keys and values is waste in a pass whose output nobody wants."""
    net, counts = network(), {}
    last = net.blocks[-1]
    watched = {"q": last.self_attn.q, "k": last.self_attn.k, "v": last.self_attn.v, "o": last.self_attn.o,
               "cross": last.cross_attn.q, "ffn": last.ffn, "head": net.head, "earlier ffn": net.blocks[-2].ffn}
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
    denoiser = cached(net, WindowOptions(), 3)
    assert denoiser(latents(3), [Level(0.0, 0.0)] * 3, 0, "clean") is None
    assert counts == {"k": 1, "v": 1, "earlier ffn": 1}
    denoiser(latents(3), [Level(500.0, 0.5)] * 3, 0, "noisy")
    assert counts == {"k": 2, "v": 2, "earlier ffn": 2, "q": 1, "o": 1, "cross": 1, "ffn": 1, "head": 1}


@pytest.mark.parametrize("options, independent", [
    (WindowOptions(), False), (WindowOptions(6, 1, 3), False), (WindowOptions(6, 2, 3, "relative"), False),
    (WindowOptions(7, 2, 3, "rebased", 8), True), (WindowOptions(5, 3, 1, "relative", compact=True), False),
], ids=["dense", "window", "relative", "rebased", "compact"])
def test_longer_video_has_the_shorter_as_prefix(options, independent):
    """Bitwise: no part of a block may depend on how long the video will be (noise, capacity, key arrangement)."""
    net = network()

    def video(frames):
        denoiser = cached(net, options, frames)
        blocks = layout(frames, options.block, independent_first=independent)
        return [x for _, x in block_rollout(denoiser, blocks, TWO, noise(), independent_first=independent)]

    short, long = video(7 if independent else 9), video(16 if independent else 15)
    assert all(torch.equal(a, b) for a, b in zip(short, long))
    assert gap(long[0], long[1][:, :, :long[0].shape[2]]) > 0.1


def test_two_runs_are_equal():
    """State left on the network or the module by a first run would show in a second one."""
    net = network()
    videos = []
    for _ in range(2):
        denoiser = cached(net, WindowOptions(6, 1, 3), 9)
        videos.append(torch.cat([x for _, x in block_rollout(denoiser, layout(9, 3), TWO, noise())], dim=2))
    assert torch.equal(*videos)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_low_precision_networks(dtype, positions):
    """The store holds the compute dtype (a float32 store would take twice the announced bytes), latents stay
    float32, and the video is the float32 one up to rounding."""
    options = WindowOptions(6, 1, 3, positions)
    videos = []
    for kind in (torch.float32, dtype):
        texts = [prompts().to(kind)]
        denoiser = cached(network(dtype=kind), options, 9, texts=texts, dtype=kind)
        videos.append(torch.cat([x for _, x in block_rollout(denoiser, layout(9, 3), TWO, noise())], dim=2))
        store = denoiser.conditions[0].memory.store
        assert store.nbytes == store_bytes(layers=CONFIG.layers, capacity=6, frame_tokens=6, dim=CONFIG.dim, batch=1,
                                           element_size=kind.itemsize, keys=store.keys)
    assert videos[1].dtype == torch.float32 and bool(videos[1].isfinite().all())
    # rounding, not garbage: two networks with different weights are about 1.4 apart by this measure
    assert float((videos[1] - videos[0]).norm() / videos[0].norm()) < 0.2


def test_the_store_does_not_grow():
    """Bounded policies take constant memory in the length of the video."""
    denoiser = cached(network(), WindowOptions(4, 1, 1, "relative"), 16)
    store = denoiser.conditions[0].memory.store
    sizes = {store.nbytes for _ in block_rollout(denoiser, layout(16, 1), ONE, noise())}
    assert len(sizes) == 1 and sizes != {0}


def test_the_store_goes_with_the_run():
    """Nothing global keeps gigabytes of keys alive after a run; `free` gives them back at once."""
    net = network()
    denoiser = cached(net, WindowOptions(), 6)
    for _ in block_rollout(denoiser, layout(6, 3), ONE, noise()):
        pass
    memory = denoiser.conditions[0].memory
    assert memory.store.nbytes > 0
    memory.free()
    assert memory.store.nbytes == 0
    alive = weakref.ref(memory.store)
    del memory, denoiser
    gc.collect()
    assert alive() is None


# Layouts -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 20), st.booleans())
def test_layout_covers_every_frame_once(frames, block, start, independent):
    blocks = layout(frames, block, given=start, independent_first=independent)
    covered = [f for b in blocks for f in range(b.first, b.end)]
    assert covered == list(range(start, start + frames))
    assert [b.index for b in blocks] == list(range(len(blocks)))
    inner = [b.frames for b in blocks]
    if independent and start == 0:
        assert inner.pop(0) == 1
    assert all(n == block for n in inner[:-1]) and all(1 <= n <= block for n in inner)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(1, 8), st.booleans())
def test_context_chunks_cover_the_given_frames(given_frames, block, independent):
    chunks = context_chunks(given_frames, block, independent)
    assert [f for first, n in chunks for f in range(first, first + n)] == list(range(given_frames))
    sizes = [n for _, n in chunks]
    if independent and given_frames:
        assert sizes.pop(0) == 1
    assert all(n == block for n in sizes[:-1]) and all(1 <= n <= block for n in sizes)


def test_layout_by_hand():
    assert [b.frames for b in layout(10, 3, independent_first=True)] == [1, 3, 3, 3]
    assert [b.frames for b in layout(9, 3, given=1, independent_first=True)] == [3, 3, 3]
    assert [b.frames for b in layout(8, 3)] == [3, 3, 2]
    assert layout(1, 3) == (Block(0, 0, 1),)
    assert context_chunks(7, 3, True) == ((0, 1), (1, 3), (4, 3))


@pytest.mark.parametrize("frames, options, message", [
    (0, {}, "Ask for at least 1"),
    (-3, {}, "Ask for at least 1"),
    (8, {"allow_tail": False}, "Use 6 or 9 instead"),
    (2, {"allow_tail": False}, "Use 3 instead"),
    (9, {"allow_tail": False, "independent_first": True}, "Use 7 or 10 instead"),
])
def test_impossible_layouts_name_the_next_possible(frames, options, message):
    with pytest.raises(ForcingError, match=message):
        layout(frames, 3, **options)


def test_refused_tails_do_not_refuse_whole_blocks():
    assert len(layout(9, 3, allow_tail=False)) == 3
    assert len(layout(10, 3, allow_tail=False, independent_first=True)) == 4


# Solvers -------------------------------------------------------------------------------------------------------


def reference_unipc(x, sigmas, predict):
    """UniPC of order 2 (bh2, x0 prediction) by the textbook: the linear system solved as one."""
    def lam(s):
        return math.inf if s == 0 else math.log((1 - s) / s)

    def step(base, now, to, order, older, m, new=None):
        """older: (sigma, prediction) before `now`; new: prediction at `to` for the corrector."""
        h = lam(to) - lam(now)
        hh, big = -h, math.expm1(-h)
        ratios, differences = [], []
        if order == 2:
            ratios.append((lam(older[0]) - lam(now)) / h)
            differences.append((older[1] - m) / ratios[0])
        correction = 0 * m
        if new is None and order == 2:
            correction = 0.5 * differences[0]
        elif new is not None and order == 1:
            correction = 0.5 * (new - m)
        elif new is not None:
            g1 = big / hh - 1
            g2 = g1 / hh - 1 / 2
            matrix = torch.tensor([[1.0, 1.0], [ratios[0], 1.0]], dtype=torch.float64)
            right = torch.tensor([1 * g1 / big, 2 * g2 / big], dtype=torch.float64)
            weights = torch.linalg.solve(matrix, right)
            correction = weights[0] * differences[0] + weights[1] * (new - m)
        return to / now * base - (1 - to) * big * (m + correction)

    count, past, corrected, order = len(sigmas) - 1, [], x, 0
    for i in range(count):
        m = predict(x, sigmas[i])
        if i:
            older = past[-2] if order == 2 else None
            x = step(corrected, sigmas[i - 1], sigmas[i], order, older, past[-1][1], m)
        past.append((sigmas[i], m))
        corrected, order = x, min(2, count - i, i + 1)
        x = step(corrected, sigmas[i], sigmas[i + 1], order, past[-2] if order == 2 else None, m)
    return x


def test_solver_state_at_order_two_equals_the_textbook():
    """A corrector with the wrong order, the uncorrected sample as base, or a recomputed prediction all differ."""
    x = torch.randn(1, 2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for count in (1, 2, 3, 4, 8):
        grid = unipc_levels(count, 5.0)
        ours = unipc(x, grid, lambda y, level: torch.tanh(y + level.sigma), None)
        expected = reference_unipc(x, [level.sigma for level in grid] + [0.0], lambda y, s: torch.tanh(y + s))
        assert gap(ours, expected) <= 1e-12


def test_unipc_converges_to_the_exact_flow():
    """Data N(0, 1/4): the probability flow is known. Order 2: halving the steps' size quarters the error at least."""
    def variance(s):
        return 0.25 * (1 - s) ** 2 + s ** 2

    def error(count):
        grid = unipc_levels(count, 5.0)
        x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
        end = unipc(x, grid, lambda y, level: 0.25 * (1 - level.sigma) / variance(level.sigma) * y, None)
        return abs(float(end) - math.sqrt(variance(0.0) / variance(grid[0].sigma)))

    assert error(64) < 2e-3
    assert error(64) < error(16) / 4


def test_solvers_return_the_answer_of_a_perfect_network():
    """A network that always says the same x0 must get exactly that, whatever the steps."""
    answer, x = torch.full((1, 1, 1, 1, 1), 0.7), torch.ones(1, 1, 1, 1, 1)
    assert float(unipc(x, unipc_levels(8, 5.0), lambda *_: answer, None)) == pytest.approx(0.7, abs=1e-5)
    assert torch.equal(consistency(x, FOUR, lambda *_: answer, lambda step: x), answer)


def test_unipc_state_is_new_for_every_block():
    """History carried into the next block would correct it with predictions of another video part."""
    rollouts = [torch.cat(events(layout(n, 3), unipc_levels(4, 5.0), solver=unipc)[2], dim=2) for n in (3, 6)]
    alone = unipc(noise().initial(Block(1, 3, 3)), unipc_levels(4, 5.0), lambda x, level: 0.5 * x, None)
    assert torch.equal(rollouts[0], rollouts[1][:, :, :3]) and torch.equal(rollouts[1][:, :, 3:], alone)
