"""Cycle consistency against a direct computation, its training stages, and the drift measure there and back."""
import argparse
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.cli import train as command
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.live import ActionTrack, LiveConfig, LiveModel, live_rollout
from forcing_pack.forcing_core.live.attention import Context
from forcing_pack.forcing_core.live.random import fill
from forcing_pack.forcing_core.live.there_and_back import there_and_back
from forcing_pack.forcing_core.micro import live as micro
from forcing_pack.forcing_core.micro import steer
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.schedule import table
from forcing_pack.forcing_core.training import cycle, live, network, recipe
from forcing_pack.forcing_core.training.loop import train

CONFIG = LiveConfig(dim=32, heads=1, layers=2, latent=(4, 4), window=6, rope=(4, 14, 14), condition="action", condition_dim=25)
B, F, GIVEN = 2, 6, 2
OPTIONS = cycle.CycleOptions(given=(2,), steps=3)

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def net():
    return fill(LiveModel(CONFIG), 1).requires_grad_(True)


@pytest.fixture(scope="module")
def clip():
    return torch.randn(B, 16, F, 4, 4, generator=seeded(1))


def conditions(seed):
    return steer.rows(steer.keys(seed, B, F))


# -- the objective

def test_a_context_can_be_extended(net, clip):
    """Frame by frame or all at once: the keys and values are the same."""
    timesteps, actions = torch.full((B, F), 150.0), conditions(1)
    whole, parts = net.remember(clip, timesteps, actions), Context()
    for frame in range(F):
        own = slice(frame, frame + 1)
        parts = net.remember(clip[:, :, own], timesteps[:, own], actions[:, own], context=parts)
    assert parts.frames == whole.frames == F
    for one, other in zip(parts.keys + parts.values, whole.keys + whole.values):
        assert torch.allclose(one, other, atol=2e-3)


def levels_again(generator):
    """Rows of the table as the objective draws them, written out."""
    sigmas = table(3.0)[1]
    rows = (1000 * torch.rand(B, F, generator=generator, dtype=torch.float64)).long()
    first = next(row for row in range(1000) if sigmas[row] <= 0.25)
    light = (torch.rand(B, F, generator=generator) < 0.2).tolist()
    for clip in light:
        for frame in range(1, F):
            clip[frame] = clip[frame] or not clip[frame - 1]
    return torch.tensor([[first + int(r) * (1000 - first) // 1000 if weak else int(r) for r, weak in zip(*pair)]
                         for pair in zip(rows, light)])


def test_levels_are_uniform_or_light(clip):
    rows = cycle.draw_levels(clip, OPTIONS, seeded())
    assert torch.equal(rows, levels_again(seeded()))
    many = cycle.draw_levels(torch.zeros(200, 1, 50, 1, 1), OPTIONS, seeded())
    sigmas = table(3.0)[1][many]
    usual = float((table(3.0)[1] <= 0.25).float().mean())
    noisy = 0.8 / 1.8  # of a chain in which a noisy frame is never followed by another
    assert float((sigmas <= 0.25).float().mean()) == pytest.approx(1 - noisy * (1 - usual), abs=0.01)
    assert not ((sigmas[:, 1:] > 0.25) & (sigmas[:, :-1] > 0.25)).any()


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_that_of_recovering_the_given_frames(net, clip, weighted):
    """By hand: the rollout is turned, noised frame by frame, and only the true frames, now last, count."""
    forward, backward = conditions(2), conditions(3)
    cells = 1 + 3 * torch.rand(B, 1, F, 4, 4, generator=seeded(4)) if weighted else None
    made = cycle.loss(net, clip, forward, backward, GIVEN, OPTIONS, seeded(), cells=cells)
    generator = seeded()
    walked = cycle.roll_out(net, clip[:, :, :GIVEN], forward, OPTIONS, generator)
    assert torch.equal(walked[:, :, :GIVEN], clip[:, :, :GIVEN])
    turned, rows = walked.flip(2), levels_again(generator)
    sigma = table(3.0)[1][rows][:, None, :, None, None]
    noise = torch.randn(turned.shape, generator=generator)
    velocity = net((1 - sigma) * turned + sigma * noise, table(3.0)[0][rows].floor(), backward)
    error = (velocity - noise + turned).square()[:, :, -GIVEN:].mean(1, keepdim=True)
    weight = torch.ones_like(error) if cells is None else cells.flip(2)[:, :, -GIVEN:]
    assert made.item() == pytest.approx((error * weight).mean().item() / weight.mean().item(), rel=1e-5)


def test_a_rollout_is_that_of_inference_without_noise_in_the_context(net, clip):
    """The window holds all frames, so the frames are those that the denoiser of the rollout makes."""
    options, play = replace(OPTIONS, context=0.0), steer.keys(7, 1, F)

    class Same:
        """The generator's draws in its order, for the rollout that asks by block."""

        def __init__(self):
            generator, zero = seeded(), torch.zeros(1, 16, 1, 4, 4)
            torch.randn(zero.shape, generator=generator)  # of the start frame's context
            self.drawn = {}
            for frame in range(1, F):
                self.drawn[frame] = torch.randn(zero.shape, generator=generator)
                torch.randn(zero.shape, generator=generator)

        def initial(self, block):
            return self.drawn[block.first]

        def renoise(self, block, step):
            return torch.zeros(1, 16, block.frames, 4, 4)

    level = cycle.Level(0.0, 0.0)
    wanted = live_rollout(net, ActionTrack(steer.rows(play)[0]), clip[:1, :, :1], F - 1, Same(), steps=3, context_level=level)
    made = cycle.roll_out(net, clip[:1, :, :1], steer.rows(play), options, seeded())
    assert torch.allclose(made[:, :, 1:], torch.cat([x0 for _, x0 in wanted], 2), atol=5e-2)


def test_gradients_come_from_recovering_alone(net, clip):
    """With the rollout put in as data the gradients are the same."""
    forward, backward = conditions(2), conditions(3)
    cycle.loss(net, clip, forward, backward, GIVEN, OPTIONS, seeded()).backward()
    first = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    generator = seeded()
    walked = cycle.roll_out(net, clip[:, :, :GIVEN], forward, OPTIONS, generator)
    assert not walked.requires_grad
    cycle.forcing_loss(net, walked.flip(2), backward, OPTIONS, generator, last=GIVEN).backward()
    assert all(torch.equal(one, p.grad) for one, p in zip(first, net.parameters()))
    assert sum(float(grad.abs().sum()) for grad in first) > 0


def test_curriculum():
    options = cycle.CycleOptions(given=(32, 8, 2))
    assert [cycle.given_at(options, done) for done in (0, 0.33, 0.34, 0.66, 0.67, 1.0)] == [32, 32, 8, 8, 2, 2]


@pytest.mark.parametrize(("make", "fix"), [
    (lambda net, clip: cycle.loss(net, clip, conditions(2), conditions(3), F, OPTIONS, seeded()), "fewer given frames"),
    (lambda net, clip: cycle.CycleOptions(given=()), "at least one number"),
    (lambda net, clip: cycle.CycleOptions(context=1.0), "between 0 and 1")])
def test_what_cannot_be_trained_is_refused(net, clip, make, fix):
    with pytest.raises(ForcingError, match=fix):
        make(net, clip)


# -- the stages

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The file of the first stage, some steps old."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("live")
    trainer = live.LiveTrainer(replace(live.QUICK, steps=8))
    assert train(trainer, out / "live_base.checkpoint.pt")
    network.finish(trainer, out, {})
    return out / "micro_live_base.safetensors"


def steps(trainer, count):
    losses = []
    for _ in range(count):
        losses.append({name: float(value) for name, value in trainer.step().items()})
        trainer.advance(1.0)
    return losses


def begun(base, kind=live.CycleTrainer, **changes):
    return live.begin(kind, replace(live.LATER_QUICK, **changes), base, base)


def test_cycle_loss_falls_on_a_fixed_batch(base):
    trainer = begun(base, steps=1, given=(2,), muon_lr=0.02, adamw_lr=5e-3)
    clips = trainer.clips()

    def value():
        return cycle.loss(trainer.net, clips.latents, clips.forward, clips.backward, 2, trainer.options, seeded())

    first = value().item()
    for _ in range(25):
        (live.GRADIENT_SCALE * value()).backward()
        trainer.optimisers["optimiser"].step(1.0)
    assert value().item() < 0.8 * first


def test_every_second_step_is_a_cycle(base):
    trainer = begun(base)
    assert [list(losses) for losses in steps(trainer, 4)] == [["loss"], ["cycle"], ["loss"], ["cycle"]]
    plain = begun(base, live.PlainTrainer)
    assert [list(losses) for losses in steps(plain, 2)] == [["loss"], ["loss"]]


def test_a_resumed_run_is_the_same_run(base, tmp_path):
    whole, first = begun(base), begun(base)
    wanted = steps(whole, 4)
    steps(first, 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = live.CycleTrainer.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert steps(again, 2) == wanted[2:]
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), again.net.parameters()))


def test_backward_actions_of_a_batch_lead_back(base):
    """The conditions there and back of a training batch drive the world itself there and back."""
    trainer = begun(base, batch=8)
    clips, key = trainer.clips(), torch.arange(len(steer.KEYS))
    table_of = {tuple(row.tolist()): int(k) for row, k in zip(steer.rows(key), key)}
    back = torch.tensor([[table_of[tuple(row.tolist())] for row in clip] for clip in clips.backward])
    play = torch.tensor([[table_of[tuple(row.tolist())] for row in clip] for clip in clips.forward])
    places = steer.walk(steer.draw(network.mix(0, trainer.stream, 0), 8).start, play)
    assert torch.equal(steer.walk(places[:, -1], back), places.flip(1))


def test_the_command_trains_compares_and_writes(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "out"
    assert command.run(parser.parse_args(["live", "--quick", "--out", str(out)])) == 0
    table_lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in table_lines[2:]] == ["| live_plain", "| live_cycle"]
    assert {"live_report.json", "live.png", *(f"micro_{name}.safetensors" for name in recipe.LIVE)} <= {
        path.name for path in out.iterdir()}
    assert micro.read(micro.path("live_cycle", out)).config == micro.live_config(32, 1)


def test_a_network_that_was_not_trained(tmp_path):
    with pytest.raises(ForcingError, match="train live --out"):
        micro.path("live_cycle", tmp_path)
    with pytest.raises(ForcingError, match="Choose one of live_plain, live_cycle"):
        micro.path("live", tmp_path)


def test_a_start_that_is_not_there(tmp_path):
    with pytest.raises(ForcingError, match="Train the stage live_base first"):
        live.begin(live.PlainTrainer, live.LATER_QUICK, tmp_path / "none", tmp_path / "none")


# -- there and back

class Still(LiveModel):
    """A world in which nothing moves: every frame is the one before it."""

    def forward(self, x, timesteps, condition, context=None, attend=None):
        sigma = self.level(timesteps)
        return (x - self.seen[:, :, -1:]) / sigma

    def level(self, timesteps):
        return {int(level.timestep): level.sigma for level in self.levels}[int(timesteps.flatten()[0])]


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_there_and_back_measures_what_has_changed(drift, monkeypatch):
    """A frame is the one before plus a drift, so the error is counted by hand."""
    net = fill(Still(CONFIG), 1)
    net.levels = cycle.live_levels(3)
    track = ActionTrack(steer.rows(torch.zeros(11, dtype=torch.long)))
    start = torch.zeros(1, 16, 1, 4, 4)

    def remember(self, x, timesteps, condition, attend=None, context=None):
        self.seen = x + drift  # the context's newest frame, of which the next one is made
        return Context(x.shape[2])

    monkeypatch.setattr(Still, "remember", remember)
    quiet = type("Quiet", (), {"initial": lambda self, block: torch.zeros(1, 16, 1, 4, 4),
                               "renoise": lambda self, block, step: torch.zeros(1, 16, block.frames, 4, 4)})()
    made = there_and_back(net, track, track, start, quiet, steps=3, context_level=cycle.Level(0.0, 0.0))
    assert made.there.shape == made.back.shape == (1, 16, 11, 4, 4)
    # 10 frames there; the way back begins with the 5 newest, the oldest of which has drifted 6 times, and makes 6 more
    assert made.error == pytest.approx((drift * (6 + 6),), abs=1e-4)


@pytest.mark.parametrize(("there", "back", "fix"), [(11, 10, "Turn the same track around"), (5, 5, "at least 6 frames")])
def test_ways_that_measure_nothing_are_refused(net, clip, there, back, fix):
    tracks = [ActionTrack(steer.rows(torch.zeros(n, dtype=torch.long))) for n in (there, back)]
    with pytest.raises(ForcingError, match=fix):
        there_and_back(net, *tracks, clip[:1, :, :1], BlockNoise(1, (1, 16), (4, 4)))
