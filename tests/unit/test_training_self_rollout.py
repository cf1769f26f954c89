"""Self-rollout with gradients: against one dense no-cache pass, its memory, and the windows of long rollouts."""
from dataclasses import dataclass, replace

import pytest
import torch
from forcing_pack.forcing_core.denoiser import Condition
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import Pass, make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import Call, layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.rope import Rope
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.standalone import make_denoiser
from forcing_pack.forcing_core.training import extended
from forcing_pack.forcing_core.training.dmd import DmdOptions, critic_loss
from forcing_pack.forcing_core.training.parallel import WholeClip, masked, per_token, teacher_forcing
from forcing_pack.forcing_core.training.self_rollout import (
    LiveDenoiser,
    LivePass,
    first_gradient_frame,
    live_rollout,
    random_exit,
    self_rollout,
)
from forcing_pack.forcing_core.wan import Ops, TextState, WanConfig, forward
from forcing_pack.forcing_core.wan.random import random_network, random_prompt
from forcing_testkit.forcing_corekit import Recorder, gap

CONFIG = WanConfig(dim=128, ffn_dim=128, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=32, text_len=8)
SIZE, GRID, BATCH = (4, 4), (2, 2), 2
LEVELS = levels([1000, 750, 500, 250], 5.0)
NOISE = BlockNoise(7, (BATCH, 4), SIZE)


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    block: int
    frames: int
    window: int | None = None
    sink: int = 0
    positions: str = "absolute"
    compact: bool = False
    independent: bool = False

    @property
    def cache(self):
        return WindowOptions(self.window, self.sink, self.block, self.positions, compact=self.compact)

    @property
    def blocks(self):
        return layout(self.frames, self.block, independent_first=self.independent)

    @property
    def mask(self):
        return teacher_forcing(self.frames, self.block, window=self.window, sink=self.sink,
                               independent_first=self.independent)


CASES = {
    "frame by frame, window and sink": Case(1, 7, 4, 1),
    "blocks of 3, window and sink": Case(3, 15, 9, 3),
    "blocks of 3, everything": Case(3, 9),
    "window without sink": Case(3, 12, 6),
    "first frame alone, odd sink": Case(3, 10, 7, 2, independent=True),
    "moving positions": Case(3, 12, 6, positions="relative"),
    "moving positions, raw keys": Case(3, 12, 6, positions="relative", compact=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def student():
    return random_network(CONFIG, 0).requires_grad_(True)


def text():
    return TextState(torch.cat([random_prompt(CONFIG, seed) for seed in range(BATCH)]))


def gradients(loss, net):
    names, parameters = zip(*net.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found)}


def relative(found, expected):
    """Of the worst parameter: norm of the difference over norm of what is expected."""
    return max(float((found[name] - g).norm() / g.norm()) for name, g in expected.items())


def inference(net, case, exit_step):
    """(noisy input of the exit step, its x0), both [B, C, F, h, w], by the rollout of inference."""
    denoiser = Recorder(make_denoiser(net, case.cache, case.frames, SIZE, [text().context]))
    list(block_rollout(denoiser, case.blocks, LEVELS[:exit_step + 1], NOISE))
    last = {call.first: call for call in denoiser.calls if call.phase == "noisy"}
    return tuple(torch.cat([getattr(call, name) for call in last.values()], 2) for name in ("x", "out"))


class FrozenContext(WholeClip):
    """[clean | noisy] at once, where the keys and values of the clean half are data, as a store holds them."""

    def exchange(self, layer, q, k, v):
        half = k.shape[1] // 2
        k, v = (torch.cat([t[:, :half].detach(), t[:, half:]], 1) for t in (k, v))
        return super().exchange(layer, q, k, v)


def dense_x0(net, case, noisy, made, exit_step, pass_type=FrozenContext):
    """x0 of the exit step of all blocks in one pass without a cache."""
    level = LEVELS[exit_step]
    timesteps = torch.tensor([0.0, level.timestep]).repeat_interleave(case.frames).expand(BATCH, -1)
    clip = pass_type(Rope(GRID, CONFIG.dim // CONFIG.heads), [*range(case.frames)] * 2)

    def cross(layer, block, y, state, _, owner):
        return Ops().cross_attention(layer, block, y, state, Ops(), owner)

    ops = Ops(attention=masked(per_token(case.mask, GRID[0] * GRID[1])), cross_attention=cross)
    velocity = forward(net, torch.cat([made.detach(), noisy.detach()], 2), timesteps, text(), clip, ops)
    return noisy.detach() - level.sigma * velocity[:, :, case.frames:]


def probe(case):
    """A fixed weight for every number of a clip, so that no gradient cancels."""
    return torch.randn(BATCH, 4, case.frames, *SIZE, generator=torch.Generator().manual_seed(5))


@every_case
@pytest.mark.parametrize("exit_step", [0, 2])
def test_gradient_equals_the_dense_one(case, exit_step):
    net = student()
    noisy, made = inference(net, case, exit_step)
    latents = self_rollout(net, case.blocks, LEVELS, NOISE, text(), exit_step, cache=case.cache)
    dense = dense_x0(net, case, noisy, made, exit_step)
    assert gap(latents.detach(), made) < 1e-5 and gap(dense.detach(), made) < 1e-5
    found = gradients((latents * probe(case)).sum(), net)
    expected = gradients((dense * probe(case)).sum(), net)
    assert relative(found, expected) < 1e-5
    assert all(float(g.norm()) > 0 for g in found.values()), "a parameter got no gradient"


def test_the_dense_gradient_can_tell():
    """Gradients through the context are another thing: the comparison above would fail with them."""
    case, net = CASES["blocks of 3, window and sink"], student()
    noisy, made = inference(net, case, 1)
    frozen, through = (gradients((dense_x0(net, case, noisy, made, 1, kind) * probe(case)).sum(), net)
                       for kind in (FrozenContext, WholeClip))
    assert relative(through, frozen) > 1e-2


@pytest.mark.parametrize("start, live", [(6, 6), (7, 9)])
def test_only_late_frames_have_gradients(start, live):
    """Blocks that start before the frame are made, but leave no graph."""
    case, net = CASES["window without sink"], student()
    noisy, made = inference(net, case, 1)
    latents = self_rollout(net, case.blocks, LEVELS, NOISE, text(), 1, start, cache=case.cache)
    assert gap(latents.detach(), made) < 1e-5
    found = gradients((latents * probe(case)).sum(), net)
    late = (dense_x0(net, case, noisy, made, 1) * probe(case))[:, :, live:]
    assert relative(found, gradients(late.sum(), net)) < 1e-5


def test_given_frames_are_context():
    """Given latents come first, are not part of the answer, and get no gradient."""
    net, blocks = student(), layout(6, 3, given=3)
    given = torch.randn(BATCH, 4, 3, *SIZE, requires_grad=True)
    latents = self_rollout(net, blocks, LEVELS, NOISE, text(), 1, cache=WindowOptions(), context=given)
    assert latents.shape == (BATCH, 4, 6, *SIZE)
    assert torch.autograd.grad(latents.sum(), given, allow_unused=True) == (None,)
    other = self_rollout(net, blocks, LEVELS, NOISE, text(), 1, cache=WindowOptions(), context=given + 1)
    assert gap(latents.detach(), other.detach()) > 1e-2


def saved_bytes(run):
    """Bytes that a call keeps for its backward pass, each storage counted once."""
    sizes, kept = {}, []

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def rollout_bytes(case, start):
    net = student()
    return saved_bytes(lambda: self_rollout(net, case.blocks, LEVELS, NOISE, text(), 1, start, cache=case.cache))


def test_memory_does_not_grow_with_the_video():
    short, long = Case(3, 12, 6), Case(3, 24, 6)
    assert rollout_bytes(long, 18) == rollout_bytes(short, 6)
    assert rollout_bytes(long, 0) > 1.5 * rollout_bytes(short, 0), "the count sees nothing"


def test_nothing_of_a_store_is_in_a_graph():
    net, case = student(), CASES["blocks of 3, window and sink"]
    denoiser = live(net, case)
    latents = live_rollout(denoiser, case.blocks, LEVELS, NOISE, 1)
    store = denoiser.conditions[0].memory.store
    buffers = [t for data in store._data for t in (data.v, data.raw, data.roped) if t is not None]
    assert latents.requires_grad and len(buffers) == 4 and not any(t.requires_grad for t in buffers)
    assert store.capacity == case.window
    latents.sum().backward()  # raises where a later write has reached the graph


def live(net, case, **settings):
    memory = make_memory(case.cache, case.frames, layers=CONFIG.layers, grid=GRID,
                         head_dim=CONFIG.dim // CONFIG.heads, device="cpu")
    return LiveDenoiser(net, [Condition([text().context], memory)], **settings)


@every_case
def test_a_live_pass_is_a_pass(case):
    """Same attention input up to the order of keys, same store afterwards, gradients to the block alone."""
    draw = torch.Generator().manual_seed(1)
    memories = [live(None, case).conditions[0].memory for _ in range(2)]
    for block in case.blocks:
        qkv = [torch.randn(1, block.frames * 4, 2, 64, generator=draw) for _ in range(3)]
        for layer_inputs in (qkv, [t.clone().requires_grad_() for t in qkv]):
            kind = LivePass if layer_inputs[0].requires_grad else Pass
            memory = memories[kind is LivePass]
            call = Call(block.first, block.frames, "noisy", memory.store.frames)
            got = kind(memory.policy.plan(call), call, memory.store, memory.rope)
            out = [got.exchange(layer, *layer_inputs) for layer in range(2)][1]
            attended = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in out))
            if kind is Pass:
                expected = attended
            else:
                assert gap(attended.detach(), expected) < 1e-5
                grads = torch.autograd.grad(attended.sum(), layer_inputs)
                assert all(float(g.abs().sum()) > 0 for g in grads[1:])
    stores = [memory.store for memory in memories]
    assert stores[0].slots == stores[1].slots and stores[0].positions == stores[1].positions
    for plain, tested in zip(stores[0]._data, stores[1]._data):
        assert torch.equal(plain.v[:, :len(stores[0].slots)], tested.v[:, :len(stores[1].slots)])


def test_without_gradients_it_is_inference():
    net, case = student(), CASES["window without sink"]
    with torch.no_grad():
        latents = self_rollout(net, case.blocks, LEVELS, NOISE, text(), 3, cache=case.cache)
    assert not latents.requires_grad
    assert torch.equal(latents, inference(net, case, 3)[1])


def test_a_kept_denoiser_takes_new_weights():
    """Streaming training keeps the store; the prompt's cached keys must not be those of the old weights."""
    net, case = student(), Case(3, 12, 6)
    denoiser = live(net, case)
    live_rollout(denoiser, case.blocks[:2], LEVELS, NOISE, 0)
    with torch.no_grad():
        for parameter in net.text_embedding.parameters():
            parameter.mul_(2.0)
    denoiser.forget()
    with torch.no_grad():
        again = live_rollout(denoiser, case.blocks[:2], LEVELS, NOISE, 0)
        fresh = live_rollout(live(net, case), case.blocks[:2], LEVELS, NOISE, 0)
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("automatic", [False, True])
def test_half_precision(automatic):
    """bfloat16 weights, or float32 weights under autocast: float32 latents near the float32 ones, with gradients."""
    case = CASES["blocks of 3, window and sink"]
    net = student() if automatic else random_network(CONFIG, 0, dtype=torch.bfloat16).requires_grad_(True)
    prompt = text() if automatic else TextState(text().context.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=automatic):
        latents = self_rollout(net, case.blocks, LEVELS, NOISE, prompt, 1, cache=case.cache)
    latents.sum().backward()
    assert latents.dtype == torch.float32 and all(p.grad is not None for p in net.parameters())
    assert 1e-5 < gap(latents.detach(), inference(student(), case, 1)[1]) < 0.5


def test_exit_steps():
    draw = torch.Generator().manual_seed(0)
    drawn = [random_exit(4, draw) for _ in range(400)]
    assert all(70 < drawn.count(step) < 130 for step in range(4))
    assert [first_gradient_frame(n) for n in (9, 21, 24, 240)] == [0, 0, 3, 219]
    for step in (-1, 4):
        with pytest.raises(ForcingError, match="Use 0 to 3"):
            self_rollout(student(), layout(3, 3), LEVELS, NOISE, text(), step, cache=WindowOptions())


def test_training_moves_a_rollout_to_its_target():
    """Fixed noise and target: the squared error of the self-rollout falls."""
    net, case = student(), Case(3, 9, 6)
    target = 0.5 * probe(case)
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3)
    errors = []
    for _ in range(25):
        error = (self_rollout(net, case.blocks, LEVELS, NOISE, text(), 1, cache=case.cache) - target).square().mean()
        errors.append(float(error.detach()))
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    assert errors[-1] < 0.5 * errors[0]


# Self-Forcing++: windows of long rollouts


class Asked:
    """Noise that notes for which blocks it was asked."""

    def __init__(self):
        self.blocks = set()

    def initial(self, block):
        self.blocks.add(block.index)
        return NOISE.initial(block)

    def renoise(self, block, step):
        return NOISE.renoise(block, step)


@pytest.mark.parametrize("offset, live_from, asked", [(0, 0, {0, 1}), (4, 3, {0, 1, 2}), (6, 6, {0, 1, 2, 3}),
                                                      (9, 9, {0, 1, 2, 3, 4})])
def test_window_of_a_long_rollout(offset, live_from, asked):
    """The window is that part of the whole rollout; its blocks have gradients, nothing behind it is made."""
    case, net, noise = Case(3, 15, 6), student(), Asked()
    whole = self_rollout(net, case.blocks, LEVELS, NOISE, text(), 1, live_from, cache=case.cache)
    whole = whole[:, :, offset:offset + 5]
    window = extended.rollout_window(net, case.blocks, LEVELS, noise, text(), 1, offset, 5, cache=case.cache)
    assert gap(window.detach(), whole.detach()) < 1e-6 and noise.blocks == asked
    weight = probe(case)[:, :, :5]
    expected = gradients((whole * weight).sum(), net)
    assert relative(gradients((window * weight).sum(), net), expected) < 1e-6


def test_frames_before_a_window_leave_no_graph():
    case, net = Case(3, 15, 6), student()
    arguments = net, case.blocks, LEVELS, NOISE, text(), 1
    window = saved_bytes(lambda: extended.rollout_window(*arguments, 10, 5, cache=case.cache))
    assert window == rollout_bytes(case, 9) < rollout_bytes(case, 6)


def test_offsets_of_windows():
    draw = torch.Generator().manual_seed(0)
    drawn = [extended.window_offset(24, 21, draw) for _ in range(400)]
    assert set(drawn) == {0, 1, 2, 3} and all(70 < drawn.count(o) < 130 for o in range(4))
    assert extended.window_offset(21, 21, draw) == 0
    with pytest.raises(ForcingError, match="Roll out at least 21"):
        extended.window_offset(18, 21, draw)
    with pytest.raises(ForcingError, match="at least 1"):
        extended.ExtendedOptions(window=0)


def gaussian(mean, spread=0.5):
    """Velocity of the exact denoiser of clips drawn from N(mean, spread^2)."""
    def velocity(x, timesteps, _):
        sigma = (timesteps / 1000)[:, None, :, None, None]
        centre = (1 - sigma) * mean
        gain = (1 - sigma) * spread ** 2 / ((1 - sigma) ** 2 * spread ** 2 + sigma ** 2)
        return (x - mean - gain * (x - centre)) / sigma
    return velocity


def test_extended_loss_renoises_the_window():
    """Teacher and critic see (1 - sigma) x0 + sigma noise of exactly the frames of the window."""
    case, net, seen = Case(3, 15, 6), student(), []
    options = extended.ExtendedOptions(window=6, dmd=DmdOptions(guidance=0.0))

    def teacher(x, timesteps, prompt):
        seen.append((x, timesteps))
        return gaussian(1.0)(x, timesteps, prompt)

    loss = extended.loss(net, case.blocks, LEVELS, NOISE, text(), None, teacher, gaussian(0.0), options,
                         torch.Generator().manual_seed(3), cache=case.cache)
    draw = torch.Generator().manual_seed(3)
    offset = extended.window_offset(15, 6, draw)
    step = random_exit(4, draw)
    clip = self_rollout(net, case.blocks, LEVELS, NOISE, text(), step, cache=case.cache).detach()
    (x, timesteps), = seen
    sigma = (timesteps / 1000)[:, None, :, None, None]
    noise = (x - (1 - sigma) * clip[:, :, offset:offset + 6]) / sigma
    assert timesteps.shape == (BATCH, 6) and abs(float(noise.std()) - 1) < 0.1 and abs(float(noise.mean())) < 0.1
    assert abs(float((noise * clip[:, :, offset:offset + 6]).mean())) < 0.2  # nothing of the clip is left in it
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_extended_training():
    """Windows of long rollouts move to the teacher's clips, with a critic that learns where the student is."""
    case, net = Case(3, 12, 6), student()
    options = extended.ExtendedOptions(window=6, dmd=DmdOptions(guidance=0.0))
    where = torch.nn.Parameter(torch.zeros(1, 4, 1, 1, 1))
    students, critics = torch.optim.AdamW(net.parameters(), 2e-4), torch.optim.Adam([where], 0.1)
    draw, means = torch.Generator().manual_seed(0), []
    for step in range(50):
        arguments = case.blocks, LEVELS[:2], replace(NOISE, seed=step), text()
        with torch.no_grad():
            clip = extended.random_window(net, *arguments, options, draw, cache=case.cache)
        means.append(float(clip.mean()))
        for _ in range(5):
            critics.zero_grad()
            critic_loss(clip, text(), gaussian(where), options.dmd, draw).backward()
            critics.step()
        loss = extended.loss(net, *arguments, None, gaussian(1.0), gaussian(where), options, draw, cache=case.cache)
        students.zero_grad()
        loss.backward()
        students.step()
    assert abs(means[0]) < 0.4 and abs(sum(means[-10:]) / 10 - 1) < 0.3
