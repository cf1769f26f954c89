"""Where the time of a rollout goes, and how near that is to what the machine can do.

    pass          forwards of the network: noisy, clean, or two of them joined
      matmul      its linear layers and the patch embedding
      attention   the kernel, for the memory and for the prompt
      store       planning, rotating, writing and reading keys and values
      elementwise all else of a forward: norms, modulation, activations, and Python between kernels
    solver        noise, x0, what happens between two forwards
    decode        the VAE, where the model has one

Two floors: the operations of matmul and attention over the measured rate of a large matmul (by the kernel that is faster at
it, where there are two), and the bytes that they move - every operand and every result once - over the measured rate of a
large copy.
"""
from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

from ..accelerate import kernels_of
from ..denoiser import NetworkDenoiser
from ..kernels import PLAIN, Kernels
from .clock import Clock, clock

SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product sets the rate
COPIED = {"cpu": 2 ** 26, "cuda": 2 ** 30}  # bytes of the copy that sets the other
TRIES = 5
INSIDE = ("matmul", "attention", "store")  # measured parts of a pass; elementwise is what is left of it


@dataclass(frozen=True)
class Rates:
    """What the device does at its best: operations a second of a matmul, bytes a second read and written by a copy."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Parts:
    """One rollout, taken apart. seconds: part -> seconds, which add up to `total` (noticeably more than an undisturbed
    run takes, where forwards are tiny). passes: phase -> (number, seconds). operations, bytes: of matmul and attention."""

    seconds: dict[str, float]
    passes: dict[str, tuple[int, float]]
    total: float
    operations: int
    bytes: int

    def floors(self, rates: Rates) -> dict[str, float]:
        """Seconds that the whole would take at those rates."""
        return {"operations": self.operations / rates.operations, "bytes": self.bytes / rates.bytes}


def rates(device: str, dtype: torch.dtype, kind: str = "wall") -> Rates:
    """Measured now, the best of a few tries."""
    where, watch = device.split(":")[0], clock(device, kind)
    side = SIDE[where]
    a, out = torch.randn(side, side, device=device).to(dtype), torch.empty(side, side, device=device, dtype=dtype)
    layer, kernels = nn.Linear(side, side, bias=False, device=device, dtype=dtype), kernels_of("off", device)
    with torch.no_grad():
        product = min(_best(watch, lambda: torch.mm(a, a, out=out)), _best(watch, lambda: kernels.linear(layer, a)))
    source = torch.empty(COPIED[where], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source).fill_(0)
    return Rates(2 * side ** 3 / product, 2 * COPIED[where] / _best(watch, lambda: target.copy_(source)))


def _best(watch: Clock, work: Callable[[], Any]) -> float:
    work()
    found = []
    for _ in range(TRIES):
        start = watch.stamp()
        work()
        found.append(watch.seconds(start, watch.stamp()))
    return max(min(found), 1e-9)


class Meter:
    """Stamps around the work of each part, read when all is done. operations, bytes: counted from shapes on the way."""

    def __init__(self, watch: Clock):
        self.watch = watch
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.operations = self.bytes = 0
        self._open: list[Any] = []

    def timed(self, part: str, work: Callable, count: Callable[..., None] | None = None) -> Callable:
        def run(*args, **kwargs):
            start = self.watch.stamp()
            out = work(*args, **kwargs)
            self.spans[part].append((start, self.watch.stamp()))
            if count is not None:
                count(out, *args)
            return out
        return run

    def attention(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.operations += 4 * q.numel() * k.shape[1]
        self.bytes += sum(t.numel() * t.element_size() for t in (q, k, v, out))

    def enter(self, module: nn.Module, args: tuple) -> None:
        self._open.append(self.watch.stamp())

    def leave(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        self.spans["matmul"].append((self._open.pop(), self.watch.stamp()))
        self.product(out, module, args[0])

    def product(self, out: Tensor, module: nn.Module, x: Tensor) -> None:
        """Of a linear layer, or of a convolution whose patches do not overlap."""
        self._product(module, x, out.numel())

    def products(self, out: Tensor, module: nn.Module, x: Tensor) -> None:
        """Of a feed-forward network, where what one layer gives is what the next one takes."""
        for layer in (m for m in module.modules() if isinstance(m, nn.Linear)):
            self._product(layer, x, x.numel() // x.shape[-1] * layer.out_features)
            x = x.new_empty(1).expand(*x.shape[:-1], layer.out_features)

    def _product(self, module: nn.Module, x: Tensor, results: int) -> None:
        self.operations += 2 * results * prod(module.weight.shape[1:])
        self.bytes += (x.numel() + results) * x.element_size() + module.weight.numel() * module.weight.element_size()

    def seconds(self, part: str) -> float:
        return sum(self.watch.seconds(a, b) for a, b in self.spans[part])


class Metered:
    """A denoiser whose forwards are metered, by phase."""

    def __init__(self, denoiser: NetworkDenoiser, meter: Meter):
        self._denoiser, self._meter = denoiser, meter
        denoiser.ops = replace(denoiser.ops, attention=meter.timed("attention", denoiser.ops.attention, meter.attention),
                               kernels=_timed_kernels(denoiser.ops.kernels, meter))
        for condition in denoiser.conditions:
            condition.memory.begin = _begins(condition.memory.begin, meter)

    def __call__(self, x, levels, first, phase):
        return self._meter.timed(f"pass {phase}", self._denoiser)(x, levels, first, phase)

    def joined(self, clean, noisy):
        return self._meter.timed("pass joined", self._denoiser.joined)(clean, noisy)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)


def _timed_kernels(kernels: Kernels, meter: Meter) -> Kernels:
    """Plain ones call modules, which have hooks then."""
    if kernels is PLAIN:
        return PLAIN
    return replace(kernels, linear=meter.timed("matmul", kernels.linear, meter.product),
                   embed=meter.timed("matmul", kernels.embed, meter.product),
                   ffn=meter.timed("matmul", kernels.ffn, meter.products))


def _begins(begin: Callable, meter: Meter) -> Callable:
    begin = meter.timed("store", begin)

    def run(*args):
        now = begin(*args)
        now.exchange = meter.timed("store", now.exchange)
        return now
    return run


@contextmanager
def metering(net: nn.Module, meter: Meter, kernels: Kernels) -> Iterator[None]:
    """Take the times of all linear layers and convolutions of a network, but for those that `kernels` run."""
    run = set() if kernels is PLAIN else {*_in_kernels(net, kernels)}
    modules = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv3d)) and module not in run]
    hooks = [hook for module in modules
             for hook in (module.register_forward_pre_hook(meter.enter), module.register_forward_hook(meter.leave))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_kernels(net: nn.Module, kernels: Kernels) -> Iterator[nn.Module]:
    """What `wan.forward` gives to kernels; a prompt's keys and values are made by modules."""
    yield net.patch_embedding
    if kernels.opens(net.head, net.head.modulation):
        yield net.head.head
    for block in net.blocks:
        mine, prompt = block.self_attn, block.cross_attn
        yield from (mine.q, mine.k, mine.v, mine.o, prompt.q, prompt.o, *block.ffn)


def read(meter: Meter, start: Any, end: Any) -> Parts:
    """What a metered rollout between two stamps came to. Its decoding is a span "decode", if there is any."""
    phases = [name for name in meter.spans if name.startswith("pass ")]
    passes = {name.removeprefix("pass "): (len(meter.spans[name]), meter.seconds(name)) for name in phases}
    forwards, total = sum(seconds for _, seconds in passes.values()), meter.watch.seconds(start, end)
    seconds = {part: meter.seconds(part) for part in (*INSIDE, "decode")}
    decode = seconds.pop("decode")
    seconds["elementwise"] = forwards - sum(seconds.values())
    seconds |= {"solver": total - forwards - decode, "decode": decode}
    return Parts(seconds, passes, total, meter.operations, meter.bytes)


def merged(runs: list[Parts]) -> Parts:
    """The run with the median total."""
    return sorted(runs, key=lambda parts: parts.total)[len(runs) // 2]
