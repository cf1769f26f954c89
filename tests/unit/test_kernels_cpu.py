"""What stands for linear layers and norms on a CPU: equal to calling the modules, and hands off unusual ones."""
import copy

import pytest
import torch
from forcing_pack.forcing_core import kernels
from forcing_pack.forcing_core.accelerate import WAYS, kernels_of, ours
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.kernels import linears, norms, plain, table
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import EmaSinkOptions, WindowOptions
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.wan import Ops
from forcing_pack.forcing_core.wan.forward import _end
from forcing_pack.forcing_core.wan.times import Embedded
from forcing_testkit.forcing_corekit import CHANNELS, TEXT_DIM, gap, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 1e-6
some = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 150), st.integers(1, 150))


@pytest.fixture(params=["onednn", "blas"])
def products(require, request, monkeypatch):
    """Those of one library, as if the processor were at home with it."""
    require(linears.has_onednn(), "This torch has no oneDNN: its linear layers were not tested", "pip install torch==2.13.0")
    made = {"onednn": linears.by_onednn, "blas": linears.by_blas}[request.param]()
    monkeypatch.setattr(table, "at_home", lambda: made)
    with torch.no_grad():
        yield made


@pytest.fixture
def row(products):
    """The row of CPUs."""
    return table.on_cpu()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module):
    """With numbers of its own in place of ones and zeros, and a row of outputs about as large as its inputs."""
    for i, p in enumerate(module.parameters()):
        p.data = draw(*p.shape, seed=i + 7) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1)
    return module


def sure(near, usual, exact):
    """Within 1e-5 of plain torch, and as near to the truth as that is, give or take the last bits."""
    unit = float(exact.abs().max().clamp(min=1))
    return gap(near, usual) <= 1e-5 * unit and gap(near, exact) <= 2 * gap(usual, exact) + 1e-6 * unit


def double(module):
    return copy.deepcopy(module).double()


def ffn(width, inner, approximate="tanh", bias=True):
    return filled(nn.Sequential(nn.Linear(width, inner, bias), nn.GELU(approximate), nn.Linear(inner, width, bias)))


@given(sizes, st.booleans(), st.booleans(), st.booleans())
@some
def _linear(found, size, bias, worth, strided):
    batch, rows, width, out = size
    layer, x = filled(nn.Linear(width, out, bias)), draw(batch, rows, width)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linears, "WORTH", 0 if worth else 1 << 60)
        assert sure(found.linear(layer, x), layer(x), double(layer)(x.double()))


@given(sizes, st.booleans(), st.sampled_from(["tanh", "none"]), st.sampled_from([1e-3, 1.0, 1e3]), st.booleans())
@some
def _ffn(found, size, bias, approximate, scale, cached):
    batch, rows, width, inner = size
    layers, x = ffn(width, inner, approximate, bias), scale * draw(batch, rows, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linears, "CACHED", 1 << 60 if cached else 0)
        assert sure(found.ffn(layers, x), layers(x), double(layers)(x.double()))


@given(sizes, st.sampled_from(["layer", "rms", "bare layer", "bare rms"]), st.sampled_from([EPS, 1e-2, None]),
       st.sampled_from([1e-3, 1.0, 1e3]))
@some
def _norm(found, size, kind, eps, scale):
    batch, rows, width, _ = size
    affine = "bare" not in kind
    module = nn.LayerNorm(width, eps or EPS, affine) if "layer" in kind else nn.RMSNorm(width, eps, affine)
    module, x = filled(module), scale * draw(batch, rows, width)
    assert sure(found.norm(module, x), module(x), double(module)(x.double())) or width == 1


@given(sizes, st.booleans())
@some
def _modulation(found, size, alike):
    """One row for all frames goes into the norm itself; a row a frame, and one a sample, do not."""
    batch, cells, width, frames = size[0], size[1] % 7 + 1, size[2] + 1, size[3] % 3 + 1
    x, m = draw(batch, frames * cells, width), draw(*([batch] if alike else [batch, frames]), 2, width, seed=1)
    shift, factor = (part.unsqueeze(-2) for part in m.unbind(-2))
    norm = nn.LayerNorm(width, EPS, elementwise_affine=False)
    usual = plain.modulate(norm, x, shift, factor)
    assert sure(found.modulate(norm, x, shift, factor), usual, plain.modulate(norm, *(t.double() for t in (x, shift, factor))))


@given(sizes, st.booleans(), st.sampled_from([(1, 2, 2), (1, 1, 1), (1, 2, 3)]))
@some
def _embed(found, size, bias, patch):
    batch, rows, channels, width = size[0], size[1] % 5 + 1, size[2] % 20 + 1, size[3]
    layer = filled(nn.Conv3d(channels, width, patch, patch, bias=bias))
    x = draw(batch, 3, channels, rows * patch[1], 2 * patch[2]).transpose(1, 2)
    assert sure(found.embed(layer, x), plain.embed(layer, x), double(layer)(x.double()).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("check", [_linear, _ffn, _norm, _modulation, _embed])
def test_equal_to_the_modules(row, check):
    check(row)


class Own(nn.Linear):
    """Somebody's own layer, whose numbers are not its output."""

    def forward(self, x):
        return 3 * super().forward(x)


def hooked(module):
    module.register_forward_hook(lambda module, args, out: 3 * out)
    return module


def patched(module):
    module.forward = lambda x: 3 * type(module).forward(module, x)
    return module


class Thrice(nn.Module):
    def forward(self, x):
        return 3 * x


def parametrized(module):
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Thrice())
    return module


UNUSUAL = {"a class of its own": lambda: Own(8, 8, bias=False), "a hook": lambda: hooked(nn.Linear(8, 8, bias=False)),
           "a patched forward": lambda: patched(nn.Linear(8, 8, bias=False)),
           "a parametrized weight": lambda: parametrized(nn.Linear(8, 8, bias=False))}


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("inside", [False, True])
def test_unusual_layers_are_called(row, monkeypatch, name, inside):
    """Alone and in a feed-forward network; one that gives three times as much says whether it was asked."""
    monkeypatch.setattr(linears, "WORTH", 0)
    layer, x = UNUSUAL[name](), draw(1, 3, 8)
    weight = layer.parametrizations.weight.original if "parametrized" in name else layer.weight
    three = 3 * nn.functional.linear(x, weight)
    if not inside:
        assert gap(row.linear(layer, x), three) <= 1e-5
        return
    end = nn.Linear(8, 8)
    assert gap(row.ffn(nn.Sequential(layer, nn.GELU(), end), x), end(nn.GELU()(three))) <= 1e-5


def test_other_unusual_modules_are_called(row):
    """Other activations, more layers, a hook on the whole, patches that overlap, a norm that somebody changed."""
    x = draw(1, 3, 8)
    for odd in (hooked(ffn(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)),
                nn.Sequential(nn.Linear(8, 8), hooked(nn.GELU("tanh")), nn.Linear(8, 8)),
                nn.Sequential(*ffn(8, 8), nn.Linear(8, 8)), nn.Identity()):
        assert torch.equal(row.ffn(odd, x), odd(x))
    video = draw(1, 2, 4, 4, 4)
    for odd in (nn.Conv3d(2, 8, (1, 2, 2), (1, 2, 2), padding=(0, 1, 1)), nn.Conv3d(2, 8, (2, 2, 2), (2, 2, 2)),
                nn.Conv3d(2, 8, (1, 3, 3), (1, 1, 1)), nn.Conv3d(2, 8, (1, 2, 2), (1, 2, 2), groups=2),
                hooked(nn.Conv3d(2, 8, (1, 2, 2), (1, 2, 2)))):
        assert torch.equal(row.embed(odd, video), plain.embed(odd, video))
    norm = hooked(nn.LayerNorm(8, EPS, elementwise_affine=False))
    assert torch.equal(row.norm(norm, x), norm(x))
    one = torch.ones(1, 1, 8)
    assert torch.equal(row.modulate(norm, x, one, one), plain.modulate(norm, x, one, one))
    assert torch.equal(row.norm(nn.Identity(), x), x)


def test_other_types_and_gradients_go_through_the_modules(monkeypatch):
    """bfloat16 has oneDNN anyway; and the operations bring no gradient back."""
    monkeypatch.setattr(table, "at_home", lambda: linears.Products(None, None))
    monkeypatch.setattr(norms, "rms", None)
    row = table.on_cpu()
    layers, norm, x = ffn(8, 8), nn.RMSNorm(8, EPS), draw(1, 3, 8)
    half = ffn(8, 8).bfloat16()
    with torch.no_grad():
        assert torch.equal(row.ffn(half, x.bfloat16()), half(x.bfloat16()))
        with pytest.raises(TypeError):  # as it would be if it were taken apart
            row.ffn(layers, x)
    with torch.enable_grad():
        for run, module in ((row.ffn, layers), (row.linear, layers[0]), (row.norm, norm)):
            run(module, x).sum().backward()
            assert all(p.grad is not None for p in module.parameters())


def test_modules_are_looked_at_once(products):
    """New numbers are seen, since they are read when they are needed; what a module is, when kernels are made again."""
    seen = []
    layer, x = nn.Linear(4, 4), draw(1, 2, 4)
    found = linears.Linears(lambda module, like: seen.append(module) or kernels.ordinary(module, like), products)
    found.linear(layer, x)
    layer.weight = nn.Parameter(2 * layer.weight.detach(), requires_grad=False)
    layer.bias.data += 1
    assert gap(found.linear(layer, x), layer(x)) <= 1e-6 and seen == [layer]
    hooked(layer)
    assert torch.equal(table.on_cpu().linear(layer, x), layer(x))


def video(net, options, found):
    memory = make_memory(options, 4, layers=len(net.blocks), grid=(2, 1), head_dim=net.config.dim // net.num_heads,
                         heads=net.num_heads, device="cpu")
    denoiser = NetworkDenoiser(net, [Condition([draw(1, 6, TEXT_DIM, seed=9)], memory)], ops=Ops(kernels=found))
    parts = block_rollout(denoiser, layout(4, 1), levels([1000, 500], 5.0), BlockNoise(1, (1, CHANNELS), (4, 2)), block=1)
    return torch.cat([x for _, x in parts], dim=2)


@pytest.mark.parametrize("options", [WindowOptions(2, 0, 1), WindowOptions(3, 1, 1, positions="relative"),
                                     EmaSinkOptions(3, 1, 1)])
def test_a_video_with_them(products, monkeypatch, options):
    """Through the whole forward; every layer of the blocks has to have been taken apart."""
    monkeypatch.setattr(linears, "WORTH", 0)
    net, made = network(), []
    counted = linears.Products(lambda *args: made.append("plain") or products.plain(*args),
                               lambda *args: made.append("gelu") or products.gelu(*args))
    monkeypatch.setattr(table, "at_home", lambda: counted)
    found = table.on_cpu(ours)
    assert gap(video(net, options, found), video(net, options, kernels.PLAIN)) <= 1e-5
    passes, layers = layers_passed(net, blocks=4, steps=2)
    ends = 2 * 4  # patches and head of every noisy pass, and patches of every clean one
    assert made.count("gelu") == passes and made.count("plain") == 7 * passes + 2 * layers + 2 * ends + layers


def layers_passed(net, blocks, steps):
    """(whole layers, last layers of clean passes, which end with their keys and values) of a video: no clean pass behind the
    last block."""
    clean = blocks - 1
    return len(net.blocks) * (blocks * steps + clean) - clean, clean


@pytest.mark.parametrize("alike, leading", [(True, 0), (False, 0), (False, 1)])
def test_the_head_of_frames_at_their_levels(row, alike, leading):
    net, ops = network(), Ops(kernels=table.on_cpu(ours))
    times = Embedded(torch.tensor([[500.0] * 3 if alike else [0.0, 500.0, 900.0]]), alike)
    times.begin(net, torch.float32, torch.float64)
    tokens = draw(1, 2 * (3 - leading), net.config.dim)
    for _ in range(2):  # the second time as it was kept
        assert gap(_end(net.head, tokens, times, leading, ops), _end(net.head, tokens, times, leading, Ops())) <= 1e-5
    assert ops.kernels.opens(net.head, tokens) and not ops.kernels.opens(net.head, tokens.bfloat16())
    assert not table.on_cpu(ours).opens(hooked(net.head), tokens)


def test_where_they_run(monkeypatch):
    """On a CPU in every way to accelerate, where torch has them."""
    monkeypatch.setitem(table.THERE, "cpu", ("cpu", lambda: True))
    monkeypatch.setitem(table.KERNELS, "cpu", lambda modules: modules)
    assert {kernels_of(name, "cpu", "a rule") for name in WAYS} == {"a rule"}
    assert kernels_of("off", "cuda") is kernels.PLAIN
    monkeypatch.setitem(table.THERE, "cpu", ("cpu", lambda: False))
    assert kernels_of("all", "cpu") is kernels.PLAIN


@pytest.mark.parametrize("name, mkl, blas", [("Intel(R) Xeon(R) Processor", True, True), ("AMD EPYC", True, False),
                                             ("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", True, True),
                                             ("Intel(R) Core(TM) i7", False, False), ("aarch64", False, False)])
def test_whose_products(products, monkeypatch, name, mkl, blas):
    monkeypatch.setattr(linears, "processor", lambda: name)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert (linears.at_home().plain is nn.functional.linear) == blas


def test_gelu_far_from_zero():
    x = torch.tensor([-1e20, -1e10, -20.0, -0.0, 0.0, 1e-30, 20.0, 1e10, 1e20])
    assert torch.equal(linears.gelu_(x.clone(), "tanh"), nn.functional.gelu(x, approximate="tanh"))
