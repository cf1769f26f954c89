"""Parallel training objectives against direct computations of their losses and gradients.

Every loss is written out again below: draws in the order of the generator, schedules from their formulas, networks
through the dense oracle of the test kit (own masks, own rotations). `SHAPE` clips are two blocks of two and a tail.
"""
import math

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.schedule import levels, table
from forcing_pack.forcing_core.training import (
    causal_consistency,
    causal_ode,
    diffusion_forcing,
    flow,
    teacher_forcing,
)
from forcing_pack.forcing_core.wan import Ops, TextState, WanConfig, forward
from forcing_testkit.forcing_corekit import DensePass, gap, network, prompts

CONFIG = WanConfig(dim=128, ffn_dim=128, heads=1, layers=2, in_channels=4, out_channels=4, text_dim=32, text_len=8)
SHAPE = B, C, F, H, W = 2, 4, 5, 4, 4
SIZES, ENDS = (2, 2, 1), (2, 2, 4, 4, 5)
TOLERANCE = 1e-5


pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed=11):
    return torch.Generator().manual_seed(seed)


def trainable(seed):
    return network(seed, CONFIG).requires_grad_(True)


def clip(seed=1):
    return torch.randn(SHAPE, generator=seeded(seed))


def some_cells():
    return 1 + 4 * (torch.rand(B, 1, F, H, W, generator=seeded(8)) > 0.7)


@pytest.fixture
def student():
    return trainable(1)


@pytest.fixture(scope="module")
def teacher():
    return network(2, CONFIG)


@pytest.fixture(scope="module")
def average():
    return network(3, CONFIG)


TEXT, NEGATIVE = prompts(B, seed=1), prompts(1, seed=2)


# --- the same things written out plainly

def by_frame(values):
    """[B, blocks] to [B, F] for blocks of 2, 2 and 1 frames."""
    return torch.stack([torch.cat([v.expand(n) for v, n in zip(row, SIZES)]) for row in values])


def published_sigma(row, shift=5.0):
    u = 1 - row.double() / 1000
    return shift * u / (1 + (shift - 1) * u)


def published_weight(row, shift=5.0):
    """Spec core.md 1.2, in float64."""
    y = torch.exp(-2 * ((1000 * published_sigma(torch.arange(1000), shift) - 500) / 1000) ** 2)
    return ((y - y.min()) * 1000 / (y - y.min()).sum())[row]


def mixed(clean, noise, sigma):
    s = sigma.float().view(B, 1, F, 1, 1)
    return clean - s * clean + s * noise


def oracle(net, x, timesteps, text, clean=None, told=0.0, ends=ENDS, window=None, sink=0):
    """Velocity of x [B, C, F, H, W] through the test kit's dense attention; teacher-forced where `clean` is given."""
    rows = [("clean" if clean is None else "noisy", f, ends[f]) for f in range(F)]
    timesteps = timesteps.float()
    if clean is not None:
        rows = [("clean", f, ends[f]) for f in range(F)] + rows
        x = torch.cat([clean, x], 2)
        timesteps = torch.cat([torch.zeros(B, F) + told, timesteps], 1)
    dense = DensePass(rows, (H // 2, W // 2), window, sink)
    state = TextState(text.expand(B, -1, -1))
    return forward(net, x, timesteps, state, dense, Ops(attention=dense.masked))[:, :, -F:]


def gradients(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()))


def assert_same(net, ours, direct):
    """Loss and all gradients agree."""
    assert float(ours.detach()) == pytest.approx(float(direct.detach()), rel=1e-5)
    for (name, _), a, b in zip(net.named_parameters(), gradients(net, ours), gradients(net, direct)):
        assert gap(a, b) <= 1e-4 * max(1e-2, float(b.abs().max())), name


# --- flow.py

def test_training_weight_is_the_published_one():
    for shift in (5.0, 8.0):
        ours = flow.training_weights(shift)
        assert gap(ours.double(), published_weight(torch.arange(1000), shift)) < 1e-4
        assert float(ours.mean()) == pytest.approx(1, abs=1e-5)
    assert float(flow.training_weights(5.0)[0]) == 0


def test_rows_are_one_for_a_block():
    rows = flow.draw_rows(clip(), 1000, seeded(), block=2)
    u = torch.rand(B, 3, generator=seeded(), dtype=torch.float64)
    assert torch.equal(rows, by_frame((1000 * u).long()))
    assert len(set(rows.flatten().tolist())) == 6
    frames = flow.draw_rows(clip(), 1000, seeded(), block=1)
    assert len(set(frames.flatten().tolist())) == B * F
    clips = flow.draw_rows(clip(), 1000, seeded(), block=F)
    assert [len(set(row)) for row in clips.tolist()] == [1, 1]
    first = flow.draw_rows(clip(), 1000, seeded(), block=2, independent_first=True)[0].tolist()
    assert first[0] != first[1] == first[2] != first[3] == first[4]


def test_rows_are_uniform_or_biased_to_noise():
    """With bias 2 half of the rows lie in the noisiest quarter: 0.25^(1/2)."""
    big = torch.empty(200, 1, 100, 1, 1)
    rows = flow.draw_rows(big, 1000, seeded(), block=1)
    assert rows.min() == 0 and rows.max() == 999
    assert float((rows < 250).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float((flow.draw_rows(big, 1000, seeded(), block=1, bias=2) < 250).float().mean()) == pytest.approx(
        0.5, abs=0.01)
    with pytest.raises(ForcingError, match="Use 1 for uniform"):
        flow.draw_rows(big, 1000, seeded(), block=1, bias=0)


def test_noised_clip_has_the_level_of_every_frame():
    rows = torch.tensor([[0, 250, 500, 750, 999], [999, 0, 1, 2, 3]])
    made = flow.noised(clip(), rows, 5.0, seeded())
    assert made.timesteps[0, :4].tolist() == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert gap(made.sigmas.double(), published_sigma(rows)) < 1e-6
    noise = torch.randn(SHAPE, generator=seeded())
    assert torch.equal(made.noise, noise) and gap(made.x, mixed(clip(), noise, published_sigma(rows))) < 1e-5
    assert torch.equal(made.x[0, :, 0], noise[0, :, 0])


def test_x0_inverts_the_noise_and_is_exact_without_any():
    sigmas = torch.tensor([[1.0, 0.5, 0.1, 0.0, 0.9]]).expand(B, F)
    clean, noise = clip(1), clip(2)
    x = flow.add_noise(clean, noise, sigmas)
    made = flow.x0_of(x, noise - clean, sigmas)
    assert gap(made, clean) < 1e-6 and torch.equal(flow.x0_of(x, 1e6 * noise, sigmas)[:, :, 3], x[:, :, 3])


def test_weighted_mse_sums_over_cells_and_frames():
    made, target, cells = clip(1), clip(2), some_cells().float()
    frames = torch.rand(B, F, generator=seeded(3))
    total, mass = 0.0, 0.0
    for b in range(B):
        for f in range(F):
            for y in range(H):
                for x in range(W):
                    squared = sum(float(made[b, c, f, y, x] - target[b, c, f, y, x]) ** 2 for c in range(C)) / C
                    total += squared * float(cells[b, 0, f, y, x]) * float(frames[b, f])
                    mass += float(cells[b, 0, f, y, x])
    assert float(flow.weighted_mse(made, target, frames=frames, cells=cells)) == pytest.approx(total / mass, rel=1e-5)
    plain = float((made - target).square().mean())
    assert float(flow.weighted_mse(made, target)) == pytest.approx(plain, rel=1e-6)
    assert float(flow.weighted_mse(made, target, cells=torch.full((B, 1, F, H, W), 3.0))) == pytest.approx(plain, rel=1e-6)
    assert float(flow.weighted_mse(made, target, cells=torch.zeros(B, 1, F, 1, 1))) == 0


def test_guidance_needs_a_negative_prompt():
    values = {1.0: torch.tensor(2.0), 2.0: torch.tensor(5.0)}
    def predict(state):
        return values[float(state.context)]
    positive, negative = (TextState(torch.tensor(v)) for v in (1.0, 2.0))
    assert float(flow.guided(predict, positive, negative, 3.0)) == 5 + 3 * (2 - 5)
    assert float(flow.guided(predict, positive, None, 1.0)) == 2
    with pytest.raises(ForcingError, match="negative prompt"):
        flow.guided(predict, positive, None, 3.0)


def test_euler_schedule_holds_the_few_step_list():
    """Steps 0, 12, 24 and 36 of 48 at shift 5 are the student's 1000, 750, 500, 250."""
    sigmas = flow.euler_sigmas(48, 5.0)
    student = [level.sigma for level in levels([1000, 750, 500, 250], 5.0)]
    assert sigmas[[0, 12, 24, 36]].tolist() == pytest.approx(student, abs=1e-7)
    assert sigmas[-1] == 0 and len(sigmas) == 49 and float(sigmas[47]) == pytest.approx((5 / 48) / (1 + 4 / 48))
    with pytest.raises(ForcingError, match="at least 1"):
        flow.euler_sigmas(0, 5.0)


@pytest.mark.parametrize("wrong, fix", [
    ({"window": 4, "sink": 3}, "at least 6"), ({"block": 0}, "block need at least 1"), ({"shift": 0.0}, "positive")])
def test_options_refuse_what_inference_refuses(wrong, fix):
    with pytest.raises(ForcingError, match=fix):
        flow.CausalOptions(**wrong)


# --- teacher_forcing.py and diffusion_forcing.py

def plain_draw(rand, bias=1.0):
    """(rows, noise) in the order in which the objectives draw."""
    rows = by_frame((1000 * torch.rand(B, 3, generator=rand, dtype=torch.float64) ** bias).long())
    return rows, torch.randn(SHAPE, generator=rand)


def plain_flow_loss(velocity, clean, noise, weight, cells):
    error = (velocity - (noise - clean)).square().mean(1)  # [B, F, H, W]
    return (error * weight.float()[:, :, None, None] * cells[:, 0]).sum() / cells.sum()


@pytest.mark.parametrize("given", [{}, {"window": 3, "sink": 1}, {"bias": 2.5, "weighted": False}],
                         ids=["published", "window_sink", "biased_unweighted"])
@pytest.mark.parametrize("forced", [True, False], ids=["teacher_forcing", "diffusion_forcing"])
def test_flow_losses_against_a_direct_computation(student, forced, given):
    clean, cells = clip(), some_cells()
    module, kind = ((teacher_forcing, teacher_forcing.TeacherForcingOptions) if forced else
                    (diffusion_forcing, diffusion_forcing.DiffusionForcingOptions))
    ours = module.loss(student, clean, TextState(TEXT), kind(block=2, **given), seeded(), cells=cells)
    rows, noise = plain_draw(seeded(), given.get("bias", 1.0))
    sigma = published_sigma(rows)
    weight = published_weight(rows) if given.get("weighted", True) else torch.ones(B, F)
    view = {k: v for k, v in given.items() if k in ("window", "sink")}
    velocity = oracle(student, mixed(clean, noise, sigma), 1000 * sigma, TEXT, clean if forced else None, **view)
    assert_same(student, ours, plain_flow_loss(velocity, clean, noise, weight, cells))
    other = plain_flow_loss(velocity, clean, noise, 2 - weight, cells)  # a negative control of the comparison
    assert abs(float((other - ours).detach())) > 1e-3 or not given.get("weighted", True)


@pytest.mark.parametrize("forced", [True, False], ids=["teacher_forcing", "diffusion_forcing"])
def test_independent_first_frame_is_a_block(student, forced):
    """Ends 1, 3, 5: another mask and other levels than blocks from frame 0."""
    module, kind = ((teacher_forcing, teacher_forcing.TeacherForcingOptions) if forced else
                    (diffusion_forcing, diffusion_forcing.DiffusionForcingOptions))
    ours = module.loss(student, clip(), TextState(TEXT), kind(block=2, independent_first=True), seeded())
    rand = seeded()
    u = torch.rand(B, 3, generator=rand, dtype=torch.float64)
    rows = (1000 * u).long()[:, [0, 1, 1, 2, 2]]
    noise, sigma = torch.randn(SHAPE, generator=rand), published_sigma(rows)
    velocity = oracle(student, mixed(clip(), noise, sigma), 1000 * sigma, TEXT, clip() if forced else None,
                      ends=(1, 3, 3, 5, 5))
    assert_same(student, ours, plain_flow_loss(velocity, clip(), noise, published_weight(rows), torch.ones(B, 1, F, H, W)))


def test_context_timestep_is_told_and_adds_no_noise(student):
    options = teacher_forcing.TeacherForcingOptions(block=2, context_timestep=80.0)
    ours = teacher_forcing.loss(student, clip(), TextState(TEXT), options, seeded())
    rows, noise = plain_draw(seeded())
    sigma = published_sigma(rows)
    velocity = oracle(student, mixed(clip(), noise, sigma), 1000 * sigma, TEXT, clip(), told=80.0)
    assert_same(student, ours, plain_flow_loss(velocity, clip(), noise, published_weight(rows), torch.ones(B, 1, F, H, W)))


def test_weights_that_depend_on_the_noise(student):
    """Weights of the foreground that do not fade with the noise teach a network to draw too much of it."""
    options, seen = teacher_forcing.TeacherForcingOptions(block=2), []

    def cells(sigmas):
        seen.append(sigmas)
        return some_cells()

    fixed = teacher_forcing.loss(student, clip(), TextState(TEXT), options, seeded(), cells=some_cells())
    assert torch.equal(teacher_forcing.loss(student, clip(), TextState(TEXT), options, seeded(), cells=cells), fixed)
    assert seen[0].shape == (B, F) and torch.equal(seen[0][:, 0], seen[0][:, 1])
    faded = teacher_forcing.loss(student, clip(), TextState(TEXT), options, seeded(),
                                 cells=lambda sigmas: 1 + 4 * (1 - sigmas)[:, None, :, None, None] * (some_cells() - 1))
    assert not torch.isclose(faded, fixed)


def test_context_noise_is_light_and_told(student):
    """Rows at or below timestep 100 of the table are the last 21, 979 to 999."""
    options = teacher_forcing.TeacherForcingOptions(block=2, context_noise=100.0)
    ours = teacher_forcing.loss(student, clip(), TextState(TEXT), options, seeded())
    rand = seeded()
    rows, noise = plain_draw(rand)
    assert [float(t) > 100 for t in table(5.0)[0][977:980]] == [True, True, False]
    light_rows = by_frame(979 + (21 * torch.rand(B, 3, generator=rand, dtype=torch.float64)).long())
    light = published_sigma(light_rows)
    before = mixed(clip(), torch.randn(SHAPE, generator=rand), light)
    sigma = published_sigma(rows)
    velocity = oracle(student, mixed(clip(), noise, sigma), 1000 * sigma, TEXT, before, told=1000 * light.float())
    assert_same(student, ours, plain_flow_loss(velocity, clip(), noise, published_weight(rows), torch.ones(B, 1, F, H, W)))


@pytest.mark.parametrize("wrong, fix", [
    ({"context_noise": 2.0}, "from 4.98"), ({"context_noise": 1000.0}, "below 1000"),
    ({"context_noise": 50.0, "context_timestep": 50.0}, "context_timestep to 0")])
def test_context_options_that_make_no_sense(wrong, fix):
    with pytest.raises(ForcingError, match=fix):
        teacher_forcing.TeacherForcingOptions(**wrong)


# --- causal_ode.py

def plain_solution(teacher, noise, options, clean):
    """Every input of the Euler solution and its end, guidance written out."""
    u = [1 - i / options.steps for i in range(options.steps + 1)]
    sigmas = [options.shift * v / (1 + (options.shift - 1) * v) for v in u]
    ends = ENDS if clean is not None else (F,) * F
    states = [noise]
    for now, to in zip(sigmas, sigmas[1:]):
        t = torch.full((B, F), 1000 * now)
        positive, negative = (oracle(teacher, states[-1], t, text, clean, ends=ends) for text in (TEXT, NEGATIVE))
        states.append(states[-1] + (to - now) * (negative + options.guidance * (positive - negative)))
    return states, sigmas


FORCED = causal_ode.CausalOdeOptions(block=2, steps=6, keep=(0, 2, 5), guidance=2.0)
FREE = causal_ode.CausalOdeOptions(block=2, steps=6, keep=(0, 2, 5), guidance=2.0, shift=8.0, teacher_forced=False,
                                   per_block=True, clean_blocks=True)
BOTH = pytest.mark.parametrize("options", [FORCED, FREE], ids=["teacher_forced", "bidirectional"])


@BOTH
def test_trajectory_is_the_guided_euler_solution(teacher, options):
    clean = clip(4) if options.teacher_forced else None
    ours = causal_ode.trajectory(trainable(2), clip(5), TextState(TEXT), TextState(NEGATIVE), options, clean=clean)
    assert not ours.requires_grad
    states, _ = plain_solution(teacher, clip(5), options, clean)
    assert ours.shape == (B, 4, C, F, H, W)
    for point, step in enumerate((0, 2, 5, 6)):
        assert gap(ours[:, point], states[step]) <= TOLERANCE * float(states[step].abs().max()), step
    assert gap(states[5], states[6]) > 1e-2  # neighbours differ, so a wrong step is seen


def test_trajectory_without_guidance_needs_no_negative(teacher):
    options = causal_ode.CausalOdeOptions(block=2, steps=2, keep=(0,), guidance=1.0, teacher_forced=False)
    ours = causal_ode.trajectory(teacher, clip(5), TextState(TEXT), None, options)
    half = clip(5) + (5 / 6 - 1) * oracle(teacher, clip(5), torch.full((B, F), 1000.0), TEXT, ends=(F,) * F)
    end = half - 5 / 6 * oracle(teacher, half, torch.full((B, F), 2500 / 3), TEXT, ends=(F,) * F)
    assert gap(ours[:, 1], end) <= TOLERANCE * float(end.abs().max())


@pytest.fixture(scope="module")
def states():
    """Any four points will do for the regression."""
    return torch.randn(B, 4, *SHAPE[1:], generator=seeded(21))


@BOTH
@pytest.mark.parametrize("seed", range(4))
def test_ode_loss_against_a_direct_computation(student, states, options, seed):
    clean, cells = clip(4), some_cells()
    ours = causal_ode.loss(student, states, TextState(TEXT), options, seeded(seed),
                           clean=clean if options.teacher_forced else None, cells=cells)
    u = [1.0, 1 - 2 / 6, 1 - 5 / 6, 0.0]
    levels_of = torch.tensor([options.shift * v / (1 + (options.shift - 1) * v) for v in u])
    if options.teacher_forced:  # three points, one for a clip
        index = (3 * torch.rand(B, 1, generator=seeded(seed), dtype=torch.float64)).long().expand(B, F)
    else:  # four, the end among them, one for a block
        index = by_frame((4 * torch.rand(B, 3, generator=seeded(seed), dtype=torch.float64)).long())
    x = torch.stack([torch.stack([states[b, index[b, f], :, f] for f in range(F)], 1) for b in range(B)])
    sigma = levels_of[index]
    velocity = oracle(student, x, 1000 * sigma, TEXT, clean if options.teacher_forced else None)
    error = (x - sigma.view(B, 1, F, 1, 1) * velocity - states[:, 3]).square().mean(1, keepdim=True)
    counted = cells * (index < 3).view(B, 1, F, 1, 1)
    assert_same(student, ours, (error * counted).sum() / counted.sum())


def test_clean_blocks_are_drawn_and_do_not_count(student, states):
    """Of four points the end is drawn in a quarter of the blocks; a clip of nothing else has loss 0, not NaN."""
    many = states[:1].expand(400, -1, -1, -1, -1, -1)
    _, sigmas = causal_ode.pick(many, FREE, seeded())
    assert float((sigmas == 0).float().mean()) == pytest.approx(0.25, abs=0.04)
    seed = next(s for s in range(1000) if float(causal_ode.pick(states[:1], FREE, seeded(s))[1].max()) == 0)
    value = causal_ode.loss(student, states[:1], TextState(TEXT[:1]), FREE, seeded(seed))
    assert float(value.detach()) == 0
    assert max(float(g.abs().max()) for g in gradients(student, value)) == 0


def test_points_of_blocks_follow_an_independent_first_frame(states):
    options = causal_ode.CausalOdeOptions(block=2, steps=6, keep=(0, 2, 5), per_block=True, independent_first=True)
    _, sigmas = causal_ode.pick(states[:1].expand(50, -1, -1, -1, -1, -1), options, seeded())
    now, _ = causal_consistency.draw_step(torch.empty(50, 1, F, 1, 1), causal_consistency.ConsistencyOptions(
        block=2, per_block=True, independent_first=True), seeded())
    for drawn in (sigmas, now):
        alike = [bool((drawn[:, f] == drawn[:, f + 1]).all()) for f in range(F - 1)]
        assert alike == [False, True, False, True]


def test_published_trajectories():
    """Kept timesteps: 1000, 757, 522 of CausVid; 1000, 960, 889, 727 of Self Forcing; the few-step list of Causal
    Forcing."""
    def kept(options):
        return (1000 * options.sigmas()).tolist()
    assert [round(t) for t in kept(causal_ode.CAUSVID)] == [1000, 757, 522, 0]
    assert [round(t) for t in kept(causal_ode.SELF_FORCING)] == [1000, 960, 889, 727, 0]
    assert kept(causal_ode.CAUSAL_FORCING) == pytest.approx([1000, 937.5, 833.3333, 625, 0], abs=1e-3)


@pytest.mark.parametrize("keep", [(), (0, 0), (3, 1), (-1, 2), (0, 48)])
def test_kept_steps_that_make_no_sense(keep):
    with pytest.raises(ForcingError, match="from 0 to 47"):
        causal_ode.CausalOdeOptions(keep=keep)


def test_ode_input_errors(student, states):
    with pytest.raises(ForcingError, match="needs the clean clip"):
        causal_ode.loss(student, states, TextState(TEXT), FORCED, seeded())
    with pytest.raises(ForcingError, match="same `keep`"):
        causal_ode.loss(student, states[:, 1:], TextState(TEXT), FORCED, seeded(), clean=clip())


# --- causal_consistency.py

@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_consistency_loss_against_a_direct_computation(student, teacher, average, per_block, seed):
    options = causal_consistency.ConsistencyOptions(block=2, steps=4, guidance=2.0, per_block=per_block)
    clean, cells = clip(), some_cells()
    ours = causal_consistency.loss(student, average, teacher, clean, TextState(TEXT), TextState(NEGATIVE), options,
                                   seeded(seed), cells=cells)
    rand = seeded(seed)
    u = torch.rand(B, 3 if per_block else 1, generator=rand, dtype=torch.float64)
    index = by_frame((4 * u).long()) if per_block else (4 * u).long().expand(B, F)
    sigmas = torch.tensor([5 * v / (1 + 4 * v) for v in (1.0, 0.75, 0.5, 0.25, 0.0)])
    now, to = sigmas[index], sigmas[index + 1]
    x = mixed(clean, torch.randn(SHAPE, generator=rand), now)
    positive, negative = (oracle(teacher, x, 1000 * now, text, clean) for text in (TEXT, NEGATIVE))
    after = x + (to - now).view(B, 1, F, 1, 1) * (negative + 2.0 * (positive - negative))
    aim = after - to.view(B, 1, F, 1, 1) * oracle(average, after, 1000 * to, TEXT, clean)
    made = x - now.view(B, 1, F, 1, 1) * oracle(student, x, 1000 * now, TEXT, clean)
    error = (made - aim.detach()).square().mean(1, keepdim=True)
    assert_same(student, ours, (error * cells).sum() / cells.sum())


def test_boundary_target_is_the_step_itself(teacher, average):
    """At the last step the averaged student has no say: x0 of sigma 0 is x. And a student that is the unguided
    teacher has nothing to learn there, while it does have elsewhere."""
    options = causal_consistency.ConsistencyOptions(block=2, steps=4, guidance=1.0)
    x, clean, zero = clip(2), clip(), torch.zeros(B, F)
    now = torch.full((B, F), 0.625)
    aim = causal_consistency.target(teacher, average, clean, x, now, zero, TextState(TEXT), None, options)
    assert gap(aim, x - 0.625 * oracle(teacher, x, 1000 * now, TEXT, clean)) <= TOLERANCE
    same = causal_consistency.target(teacher, network(9, CONFIG), clean, x, now, zero, TextState(TEXT), None, options)
    assert torch.equal(aim, same)
    copy = trainable(2)
    values = {}
    for seed in range(40):
        index = int(4 * torch.rand(1, 1, generator=seeded(seed), dtype=torch.float64))
        value = causal_consistency.loss(copy, copy, teacher, clean[:1], TextState(TEXT[:1]), None, options, seeded(seed))
        values[index] = float(value.detach())
    assert sorted(values) == [0, 1, 2, 3]
    assert values[3] < 1e-12 and min(values[i] for i in (0, 1, 2)) > 1e-4


def test_boundary_can_be_left_out_as_published():
    big = torch.empty(500, 1, 2, 1, 1)
    now, to = causal_consistency.draw_step(big, causal_consistency.ConsistencyOptions(), seeded())
    sigmas = flow.euler_sigmas(48, 5.0)
    assert float(to.min()) == 0 and float(now.min()) == float(sigmas[47])
    now, to = causal_consistency.draw_step(big, causal_consistency.ConsistencyOptions(boundary=False), seeded())
    assert float(to.min()) == float(sigmas[47]) and float(now.max()) == 1
    assert torch.equal(now[:, 0], now[:, 1])
    with pytest.raises(ForcingError, match="at least 2"):
        causal_consistency.ConsistencyOptions(steps=1, boundary=False)


def test_only_the_student_learns(student):
    others = trainable(2), trainable(3)
    options = causal_consistency.ConsistencyOptions(block=2, steps=4)
    causal_consistency.loss(student, *others, clip(), TextState(TEXT), TextState(NEGATIVE), options, seeded()).backward()
    assert all(p.grad is None for net in others for p in net.parameters())
    assert all(p.grad is not None for p in student.parameters())


# --- all objectives

def run_teacher_forcing(student, text, rand, teacher, average):
    options = teacher_forcing.TeacherForcingOptions(block=2)
    return teacher_forcing.loss(student, clip(), text, options, rand)


def run_diffusion_forcing(student, text, rand, teacher, average):
    options = diffusion_forcing.DiffusionForcingOptions(block=2)
    return diffusion_forcing.loss(student, clip(), text, options, rand)


def run_ode(student, text, rand, teacher, average):
    states = torch.randn(B, 4, *SHAPE[1:], generator=seeded(21))
    return causal_ode.loss(student, states, text, FORCED, rand, clean=clip())


def run_ode_free(student, text, rand, teacher, average):
    states = torch.randn(B, 4, *SHAPE[1:], generator=seeded(21))
    return causal_ode.loss(student, states, text, FREE, rand)


def run_consistency(student, text, rand, teacher, average):
    options = causal_consistency.ConsistencyOptions(block=2, steps=8)
    return causal_consistency.loss(student, average, teacher, clip(), text, TextState(NEGATIVE), options, rand)


ALL = pytest.mark.parametrize("run", [run_teacher_forcing, run_diffusion_forcing, run_ode, run_ode_free,
                                      run_consistency])


@ALL
def test_loss_falls_on_a_fixed_batch(run, student, teacher, average):
    """Same clip, levels and noise at every step; the prompts' state is shared by all of them."""
    optimiser, text, values = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0), TextState(TEXT), []
    for _ in range(40):
        optimiser.zero_grad()
        value = run(student, text, seeded(), teacher, average)
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert math.isfinite(values[0]) and values[-1] < 0.3 * values[0]


@ALL
def test_prompts_used_by_another_network_do_not_leak(run, student, teacher, average):
    """A TextState caches projections of the network that filled it."""
    used = TextState(TEXT)
    run(trainable(7), used, seeded(), teacher, average)
    for layer, block in enumerate(teacher.blocks):
        used.keys_values(layer, block.cross_attn, teacher.text_embedding)
    ours, fresh = (run(student, text, seeded(), teacher, average) for text in (used, TextState(TEXT)))
    assert torch.equal(ours, fresh)
    assert not torch.equal(ours, run(student, TextState(TEXT.flip(0)), seeded(), teacher, average))


@ALL
def test_randomness_comes_from_the_generator_only(run, student, teacher, average):
    torch.manual_seed(0)
    first = run(student, TextState(TEXT), seeded(), teacher, average)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(first, run(student, TextState(TEXT), seeded(), teacher, average))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, run(student, TextState(TEXT), seeded(12), teacher, average))


@ALL
def test_one_prompt_serves_the_batch(run, student, teacher, average):
    one = run(student, TextState(TEXT[:1]), seeded(), teacher, average)
    many = run(student, TextState(TEXT[:1].repeat(B, 1, 1)), seeded(), teacher, average)
    assert gap(one.detach(), many.detach()) <= TOLERANCE
    with pytest.raises(ForcingError, match="one for each clip"):
        run(student, TextState(prompts(3)), seeded(), teacher, average)
