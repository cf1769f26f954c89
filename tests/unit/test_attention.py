"""The attention seam: kernels that write to their keys, and the choice of a backend."""
import sys
import types

import pytest
import torch
from forcing_pack.forcing_core import attention
from forcing_pack.forcing_core.attention import Backend, backend, sage_mutates_keys
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.rollout import block_rollout
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.wan import Ops
from forcing_testkit.forcing_corekit import CHANNELS, cached, gap, network

SDPA = backend("sdpa")


def smooth_in_place(q, k, v):
    """What SageAttention 1.x does to the keys it is given."""
    k -= k.mean(dim=1, keepdim=True)
    return SDPA(q, k, v)


def smooth_a_copy(q, k, v):
    return SDPA(q, k - k.mean(dim=1, keepdim=True), v)


def video(net, kernel, options):
    denoiser = cached(net, options, 12, ops=Ops(attention=kernel))
    noise = BlockNoise(3, (1, CHANNELS), (4, 6))
    return torch.cat([x for _, x in block_rollout(denoiser, layout(12, 3), levels([1000, 500], 5.0), noise)], dim=2)


@pytest.mark.parametrize("options", [WindowOptions(), WindowOptions(9, 3, 3), WindowOptions(9, 3, 3, "relative")],
                         ids=["dense", "window", "relative"])
def test_a_kernel_that_writes_to_its_keys(options):
    """Guards the copy in Backend: keys read from the store are views of it, so without the copy every block
    shifts the keys of the past (errors of about 1 from the second block on)."""
    net = network()
    wanted = video(net, Backend(smooth_a_copy), options)
    assert torch.equal(video(net, Backend(smooth_in_place, mutates=True), options), wanted)
    assert gap(video(net, Backend(smooth_in_place, mutates=False), options), wanted) > 1e-3
    assert gap(wanted, video(net, SDPA, options)) <= 1e-4  # the shift itself is invisible to softmax


def test_backend_hands_over_a_copy_only_where_needed():
    given = torch.zeros(1, 2, 1, 4)
    seen = []

    def kernel(q, k, v):
        seen.append(k is given)
        return q

    Backend(kernel)(given, given, given)
    Backend(kernel, mutates=True)(given, given, given)
    assert seen == [True, False]


def test_sdpa_is_softmax_over_all_keys():
    """Axis order and scale: [B, n, H, D] with 1/sqrt(D), no mask."""
    q, k, v = torch.randn(3, 2, 5, 2, 8, generator=torch.Generator().manual_seed(1))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8 ** 0.5).softmax(-1)
    assert gap(SDPA(q, k, v), torch.einsum("bhqk,bkhd->bqhd", weights, v)) <= 1e-6


def test_unknown_backend():
    with pytest.raises(ForcingError, match="Use one of sdpa, sage"):
        backend("flash")


def test_missing_sageattention(monkeypatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ForcingError, match="pip install sageattention"):
        backend("sage")


@pytest.mark.parametrize("version, mutates", [("1.0.6", True), ("2.0.1", False), ("2.2.0", False), ("3.0.0b1", False),
                                              ("10.0", False)])
def test_sage_version_switch(monkeypatch, version, mutates):
    """1.x subtracts the key mean in place, 2.x makes a new tensor; the package index still carries 1.0.6."""
    monkeypatch.setattr(attention.metadata, "version", lambda name: version)
    assert sage_mutates_keys() is mutates


def test_sage_gets_no_mask_and_a_copy(monkeypatch):
    """sageattn swallows an attn_mask silently and is_causal is top-left aligned: neither may ever be passed."""
    calls = []

    def sageattn(q, k, v, tensor_layout, is_causal):
        calls.append((tuple(q.shape), tensor_layout, is_causal, q.is_contiguous()))
        k -= k.mean(dim=2, keepdim=True)
        return SDPA(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    fake = types.ModuleType("sageattention")
    fake.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", fake)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention.metadata, "version", lambda name: "1.0.6")
    q, k, v = torch.randn(3, 1, 5, 1, 8, generator=torch.Generator().manual_seed(1))  # one head: no hidden copy
    before = k.clone()
    out = backend("sage")(q, k, v)
    assert calls == [((1, 1, 5, 8), "HND", False, True)]
    assert gap(out, SDPA(q, before, v)) <= 1e-6
    assert torch.equal(k, before)
