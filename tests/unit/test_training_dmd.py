"""Distribution matching against its formula written out, and CausVid's distillation built on it."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.schedule import table
from forcing_pack.forcing_core.training import asymmetric, dmd
from forcing_pack.forcing_core.training.dmd import DmdOptions, critic_loss, generator_loss
from forcing_pack.forcing_core.training.parallel import block_causal, parallel_velocity
from forcing_pack.forcing_core.wan import TextState, WanConfig
from forcing_pack.forcing_core.wan.random import random_network, random_prompt
from forcing_testkit.forcing_corekit import DensePass, gap

# one head of 128, as the dense oracle of the test kit wants it
CONFIG = WanConfig(dim=128, ffn_dim=128, heads=1, layers=2, in_channels=4, out_channels=4, text_dim=32, text_len=8)
SIZE, GRID = (4, 4), (2, 2)
PLAIN = DmdOptions(guidance=0.0)


pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def clip(batch=2, frames=3, seed=1):
    return torch.randn(batch, 4, frames, *SIZE, generator=draw(seed))


def text(seed=0, batch=2):
    return TextState(random_prompt(CONFIG, seed).expand(batch, -1, -1))


def network(seed):
    return random_network(CONFIG, seed)


class Spy:
    """A velocity function that notes what it was asked and what it answered."""

    def __init__(self, velocity):
        self.velocity, self.asked = velocity, []

    def __call__(self, x, timesteps, prompt):
        out = self.velocity(x, timesteps, prompt)
        self.asked.append((x, timesteps, prompt, out))
        return out


def gaussian(mean, spread=0.5):
    """Velocity of the exact denoiser of clips drawn from N(mean, spread^2)."""
    def velocity(x, timesteps, _):
        sigma = (timesteps / 1000)[:, None, :, None, None]
        centre = (1 - sigma) * mean
        gain = (1 - sigma) * spread ** 2 / ((1 - sigma) ** 2 * spread ** 2 + sigma ** 2)
        return (x - mean - gain * (x - centre)) / sigma
    return velocity


def test_generator_gradient_equals_the_formula():
    """d loss / d x of every sample, from what teacher and critic answered, written out sample by sample."""
    x = clip().requires_grad_()
    teacher, critic = Spy(dmd.score(network(1))), Spy(dmd.score(network(2)))
    prompt, negative = text(3), text(4)
    loss = generator_loss(x, prompt, negative, teacher, critic, DmdOptions(guidance=3.0), draw())
    found, = torch.autograd.grad(loss, x)
    (noisy, timesteps, asked, v_cond), (_, _, asked_negative, v_uncond) = teacher.asked
    assert asked is prompt and asked_negative is negative
    (critic_noisy, critic_timesteps, _, v_fake), = critic.asked
    assert torch.equal(noisy, critic_noisy) and torch.equal(timesteps, critic_timesteps)
    value = 0.0
    for sample in range(2):
        sigma = float(timesteps[sample, 0]) / 1000
        cond, uncond, fake = ((noisy[sample] - sigma * v[sample]).double() for v in (v_cond, v_uncond, v_fake))
        real = cond + 3.0 * (cond - uncond)
        move = (fake - real) / (x[sample].detach().double() - real).abs().mean()
        assert gap(found[sample], (move / x.numel()).float()) < 1e-6 * float(found[sample].abs().max()) + 1e-10
        value += float(0.5 * move.square().sum()) / x.numel()
    assert loss.dtype == torch.float64 and float(loss.detach()) == pytest.approx(value, rel=1e-5)


def test_clips_are_noised_at_their_level():
    teacher = Spy(gaussian(0.0))
    x = clip(4, 21)
    generator_loss(x, text(), None, teacher, gaussian(1.0), PLAIN, draw())
    (noisy, timesteps, _, _), = teacher.asked
    sigma = (timesteps / 1000)[:, None, :, None, None]
    noise = (noisy - (1 - sigma) * x) / sigma
    for sample in noise:
        assert abs(float(sample.mean())) < 0.1 and abs(float(sample.std()) - 1) < 0.06
    assert abs(float((noise * x).mean())) < 0.05


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_timesteps(shift):
    """Rows of the shifted table, each as likely as any other, clamped to 20..980, one level a sample."""
    drawn = dmd.draw_timesteps(torch.zeros(20000, 1, 3, 1, 1), DmdOptions(shift=shift), draw())
    assert drawn.shape == (20000, 3) and bool((drawn == drawn[:, :1]).all())
    drawn, rows = drawn[:, 0], torch.cat([table(shift)[0], torch.zeros(1)])
    inside = drawn[(drawn > 20) & (drawn < 980)]
    assert float((inside[:, None] - rows).abs().amin(1).max()) < 1e-3
    assert (float(drawn.min()), float(drawn.max())) == (20.0, 980.0)
    for limit in (20.5, 300.0, 600.0, 900.0, 979.5):
        assert float((drawn < limit).float().mean()) == pytest.approx(float((rows < limit).float().mean()), abs=0.012)


def test_guidance_is_one_more_than_its_number():
    """cond + g (cond - uncond) is the usual uncond + w (cond - uncond) with w = g + 1."""
    x, noise, timesteps, prompt, negative = clip(), clip(seed=2), torch.full((2, 3), 500.0), text(3), text(4)
    teacher = dmd.score(network(1))

    def usual(scale):
        def velocity(x, timesteps, _):
            cond, uncond = (teacher(x, timesteps, t) for t in (prompt, negative))
            return uncond + scale * (cond - uncond)
        return velocity

    def move(teacher, guidance):
        return dmd.direction(x, noise, timesteps, prompt, negative, teacher, gaussian(0.0), guidance)

    assert gap(move(teacher, 3.0), move(usual(4.0), 0.0)) < 1e-4
    assert gap(move(teacher, 3.0), move(usual(3.0), 0.0)) > 1e-2


def test_a_student_that_is_its_teacher_stands_still():
    """0 / 0 of the normalised difference is no movement, not NaN; and one such sample does not still the others."""
    x = torch.stack([torch.zeros(4, 3, *SIZE), torch.ones(4, 3, *SIZE)])

    def at(value):
        return lambda noisy, timesteps, _: (noisy - torch.tensor([0.0, value]).view(2, 1, 1, 1, 1)) / 0.5

    move = dmd.direction(x, -x, torch.full((2, 3), 500.0), text(), None, at(3.0), at(4.0), 0.0)
    assert float(move[0].abs().max()) == 0.0 and gap(move[1], torch.full_like(move[1], 0.5)) < 1e-6


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_only_masked_frames_move(shape):
    """A mask is a mean over its frames, with the direction of the whole clip."""
    frames = torch.tensor([True, False, True]).expand(shape)
    x = clip().requires_grad_()
    arguments = text(), None, gaussian(1.0), gaussian(0.0), PLAIN
    whole, = torch.autograd.grad(generator_loss(x, *arguments, draw()), x)
    some, = torch.autograd.grad(generator_loss(x, *arguments, draw(), frames=frames), x)
    assert gap(some[:, :, [0, 2]], whole[:, :, [0, 2]] * 1.5) < 1e-8 and float(some[:, :, 1].abs().max()) == 0.0
    with pytest.raises(ForcingError, match="at least one frame"):
        generator_loss(x, *arguments, draw(), frames=torch.zeros(3, dtype=torch.bool))


def test_weighted_mean():
    error = torch.arange(8.0).reshape(1, 2, 2, 1, 2)  # channels, frames, columns
    weights = torch.tensor([1.0, 0.0, 3.0, 1.0]).reshape(1, 1, 2, 1, 2)
    assert float(dmd.weighted_mean(error, weights)) == pytest.approx((0 + 3 * 2 + 3 + 4 + 3 * 6 + 7) / 10)
    assert float(dmd.weighted_mean(error, weights, torch.tensor([True, False]))) == (0 + 4) / 2
    assert float(dmd.weighted_mean(error)) == 3.5


def test_critic_loss_is_flow_matching():
    x, net = clip().requires_grad_(), network(2).requires_grad_(True)
    critic = Spy(dmd.score(net))
    loss = critic_loss(x, text(3), critic, PLAIN, draw())
    (noisy, timesteps, _, velocity), = critic.asked
    sigma = (timesteps / 1000)[:, None, :, None, None].double()
    noise = (noisy.double() - (1 - sigma) * x.detach().double()) / sigma
    assert abs(float(noise.mean())) < 0.2 and abs(float(noise.std()) - 1) < 0.2
    expected = (velocity.detach().double() - (noise - x.detach().double())).square().mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    assert x.grad is None and all(p.grad is not None for p in net.parameters())


def test_critic_learns_the_clips():
    """Fixed clips, levels and noise: the loss of a network falls."""
    net, x = network(2).requires_grad_(True), clip()
    optimiser, losses = torch.optim.AdamW(net.parameters(), 2e-3), []
    for _ in range(30):
        loss = critic_loss(x, text(), dmd.score(net), PLAIN, draw())
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.4 * losses[0]


def test_one_prompt_serves_many_networks():
    """A TextState caches keys of the network that used it first: teacher and critic must not share them."""
    x, timesteps, shared = clip(), torch.full((2, 3), 500.0), text()
    for seed in (1, 2):
        full = torch.ones(3, 3, dtype=torch.bool)
        expected = parallel_velocity(network(seed), x, timesteps, text(), full)
        assert torch.equal(dmd.score(network(seed))(x, timesteps, shared), expected)


def test_networks_in_half_precision():
    """Latents stay float32, the network runs in the dtype of its prompt; close to the float32 answer."""
    x, timesteps = clip(), torch.full((2, 3), 500.0)
    half = random_network(CONFIG, 1, dtype=torch.bfloat16)
    prompt = TextState(text().context.bfloat16())
    exact, rough = dmd.score(network(1))(x, timesteps, text()), dmd.score(half)(x, timesteps, prompt)
    assert rough.dtype == torch.bfloat16 and 1e-6 < gap(exact, rough) < 0.2
    made = asymmetric.forced_clip(half, clip(2, 6), prompt, CAUSVID, draw())
    assert made.dtype == torch.float32
    assert gap(made, asymmetric.forced_clip(network(1), clip(2, 6), text(), CAUSVID, draw())) < 0.2
    loss = generator_loss(made, prompt, None, dmd.score(half), gaussian(0.0), PLAIN, draw())
    assert loss.dtype == torch.float64 and bool(loss.isfinite())


def test_causal_scores():
    """With a mask, a later frame cannot change the velocity of an earlier one; without, it does."""
    x, timesteps = clip(), torch.full((2, 3), 500.0)
    changed = torch.cat([x[:, :, :2], x[:, :, 2:] + 1], 2)
    causal, full = dmd.score(network(1), block_causal(3, 1)), dmd.score(network(1))
    moved = [gap(f(x, timesteps, text())[:, :, :2], f(changed, timesteps, text())[:, :, :2]) for f in (causal, full)]
    assert moved[0] < 1e-6 and moved[1] > 1e-3


def test_wrong_options_are_refused():
    for low, high in ((0.0, 980.0), (500.0, 400.0), (20.0, 1001.0)):
        with pytest.raises(ForcingError, match="0 < low <= high"):
            DmdOptions(low=low, high=high)
    with pytest.raises(ForcingError, match="negative prompt"):
        generator_loss(clip(), text(), None, gaussian(1.0), gaussian(0.0), DmdOptions(), draw())


@pytest.mark.parametrize("target", [1.0, -0.5])
def test_a_student_moves_to_the_target_distribution(target):
    """A student with a mean and a spread, and a critic with both, meet the teacher's Gaussian in both."""
    student = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    where = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    students, critics = torch.optim.Adam([student], 0.02), torch.optim.Adam([where], 0.04)
    numbers = draw()

    def made():
        return student[0] + student[1] * torch.randn(32, 4, 3, *SIZE, generator=numbers)

    def critic(x, timesteps, prompt):
        return gaussian(where[0], where[1])(x, timesteps, prompt)

    for _ in range(150):
        for _ in range(5):
            critics.zero_grad()
            critic_loss(made(), text(), critic, PLAIN, numbers).backward()
            critics.step()
        students.zero_grad()
        generator_loss(made(), text(), None, gaussian(target, 0.4), critic, PLAIN, numbers).backward()
        students.step()
    assert abs(float(student[0].detach()) - target) < 0.1 and abs(abs(float(student[1].detach())) - 0.4) < 0.1


# CausVid


CAUSVID = asymmetric.AsymmetricOptions()


def test_causvid_levels():
    """The published list is fed unwarped, with the sigma of the nearest of the steps of shift 8, and ends clean."""
    assert [level.timestep for level in CAUSVID.entries] == [1000.0, 757.0, 522.0, 0.0]
    assert [round(level.sigma, 5) for level in CAUSVID.entries] == [1.0, 0.75676, 0.52174, 0.0]
    assert len(asymmetric.AsymmetricOptions(clean_entry=False).entries) == 3


def test_every_block_draws_its_entry():
    drawn = asymmetric.draw_entries(clip(400, 7), asymmetric.AsymmetricOptions(independent_first=True), draw())
    assert drawn.shape == (400, 7)
    assert bool((drawn[:, 1:4] == drawn[:, 1:2]).all()) and bool((drawn[:, 4:] == drawn[:, 4:5]).all())
    for frame in (0, 1, 4):
        assert all(70 < int((drawn[:, frame] == entry).sum()) < 130 for entry in range(4))
    assert 70 < int((drawn[:, 1] == drawn[:, 4]).sum()) < 130 and 70 < int((drawn[:, 0] == drawn[:, 1]).sum()) < 130


def test_forced_clip_equals_the_dense_oracle():
    """Each block at its own level under the block-causal mask, by the oracle that knows nothing of parallel.py."""
    student, data = network(0), clip(1, 9)
    seed = next(s for s in range(99) if len(asymmetric.draw_entries(data, CAUSVID, draw(s)).unique()) == 3)
    made = asymmetric.forced_clip(student, data, text(batch=1), CAUSVID, draw(seed))
    numbers = draw(seed)
    entries = asymmetric.draw_entries(data, CAUSVID, numbers)[0].tolist()
    noise = torch.randn(data.shape, generator=numbers)
    levels = [CAUSVID.entries[entry] for entry in entries]
    sigma = torch.tensor([level.sigma for level in levels])[:, None, None]
    noisy = (1 - sigma) * data + sigma * noise
    rows = [("clean", frame, 3 * (frame // 3) + 3) for frame in range(9)]
    velocity = DensePass(rows, GRID).run(student, noisy, [level.timestep for level in levels], text(batch=1).context)
    assert gap(made, noisy - sigma * velocity) < 1e-5


def test_loss_is_that_of_the_forced_clip():
    student, data = network(0).requires_grad_(True), clip(2, 6)
    teacher, critic, numbers = dmd.score(network(1)), dmd.score(network(2)), draw(1)
    found = asymmetric.loss(student, data, text(3), text(4), teacher, critic, CAUSVID, draw(1))
    made = asymmetric.forced_clip(student, data, text(3), CAUSVID, numbers)
    expected = generator_loss(made, text(3), text(4), teacher, critic, DmdOptions(3.5, 8.0), numbers)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    found.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in student.parameters())


def test_rollout_loss_needs_no_data():
    student = network(0).requires_grad_(True)
    loss = asymmetric.rollout_loss(student, layout(6, 3), BlockNoise(1, (2, 4), SIZE), text(3), text(4),
                                   dmd.score(network(1)), dmd.score(network(2)), CAUSVID, draw(1),
                                   cache=WindowOptions(window=6))
    loss.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in student.parameters())


def test_asymmetric_training():
    """On fixed data, levels and noise the student moves to the mean of the teacher; the critic knows where it is."""
    student, data = network(0).requires_grad_(True), clip(2, 6)
    options = asymmetric.AsymmetricOptions(clean_entry=False, dmd=PLAIN)
    optimiser, means, losses = torch.optim.AdamW(student.parameters(), 3e-4), [], []
    for _ in range(25):
        with torch.no_grad():
            mean = asymmetric.forced_clip(student, data, text(), options, draw()).mean()
        loss = asymmetric.loss(student, data, text(), None, gaussian(2.0), gaussian(mean), options, draw())
        means.append(float(mean))
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert abs(means[0]) < 0.5 and abs(means[-1] - 2) < 0.3 and losses[-1] < 0.2 * losses[0]
