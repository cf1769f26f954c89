"""The causal forward of Wan 2.1 over any module tree that has Wan's submodules.

Axis legend: B batch, C latent channel, F latent frame, h/w latent size, S tokens a frame, n = F*S tokens,
D width, H heads, d head_dim.

Modules are called: what a weight is (LoRA-patched, fp8, GGUF, paged) stays the owner's business. Only `kernels/` may do the
work of one instead, where it is nothing but its numbers.
Arithmetic follows arXiv 2503.20314 and the public repo guandeh17/Self-Forcing: per-frame timesteps, raw
(un-modulated-in-time) norms, no gate on cross-attention, no mask anywhere.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Protocol, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ..attention import backend
from ..errors import ForcingError
from ..kernels import PLAIN, Kernels
from ..passes import Exchange
from .text import TextState
from .times import Embedded


def _own_parameter(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.to(like)


def _cross_attention(layer: int, block: nn.Module, x: Tensor, text: TextState, ops: "Ops", net: Any) -> Tensor:
    """Cross-attention of normed x [B, n, D] with the prompt's cached keys and values."""
    attention = block.cross_attn
    k, v = text.keys_values(layer, attention, net.text_embedding)
    norm, linear = ops.kernels.norm, ops.kernels.linear
    return linear(attention.o, _attend(ops, norm(attention.norm_q, linear(attention.q, x)), k, v, net.num_heads))


def _whole_block(layer: int, run: Callable[[Tensor], Tensor], x: Tensor, extras: dict) -> Tensor:
    return run(x)


def _unchanged(layer: int, x: Tensor, **_) -> Tensor:
    return x


def _eager(fn: Callable) -> Callable:
    return fn


@dataclass(frozen=True)
class Ops:
    """What a host may replace. The defaults are plain torch.

    attention: (q, k, v) [B, n, H, d] -> [B, n, H, d]; one that has `flat` (q, k, v, heads), [B, n, D] -> [B, n, D], is
    spared the way there and back. parameter: a raw Parameter, as the compute dtype of a
    tensor. cross_attention: as `_cross_attention`. around_block, after_self_attention, after_cross_attention:
    places where a host's patches act. sinusoid: dtype of the timestep embedding's angles. compile: wraps
    the two pure halves of a layer (the store stays outside of what is compiled). kernels: what norms, modulation,
    gates and the way of keys into the store are done with; others than plain ones are not compiled.
    """

    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = backend("sdpa")
    parameter: Callable[[Tensor, Tensor], Tensor] = _own_parameter
    cross_attention: Callable[..., Tensor] = _cross_attention
    around_block: Callable[..., Tensor] = _whole_block
    after_self_attention: Callable[..., Tensor] = _unchanged
    after_cross_attention: Callable[..., Tensor] = _unchanged
    sinusoid: torch.dtype = torch.float64
    compile: Callable[[Callable], Callable] = _eager
    kernels: Kernels = PLAIN


def _attend(ops: Ops, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[B, n, D] projections -> [B, n, D]."""
    if hasattr(ops.attention, "flat"):
        return ops.attention.flat(q, k, v, heads)
    return ops.attention(*(t.view(*t.shape[:2], heads, -1) for t in (q, k, v))).flatten(2)


def _plainly(layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Callable) -> Tensor:
    return attention(q, keys, values)


def _behind(leading: int, frames: int, x: Tensor, y: Tensor, *m: Tensor) -> list[Tensor]:
    """Tokens x, y [B, n, D] and modulations of all `frames` but the first `leading`."""
    tokens = x.shape[1] // frames * leading
    return [x[:, tokens:], y[:, tokens:], *(t if t.dim() == 3 else t[:, leading:] for t in m)]


def keys_and_values(block: nn.Module, x: Tensor, m: Sequence[Tensor], heads: int, kernels: Kernels = PLAIN,
                    raw: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(modulated input, k, v): the first half of a layer up to what a store keeps. k, v [B, n, H, d]; k [B, n, D] as
    projected where it is wanted `raw`."""
    y = kernels.modulate(block.norm1, x, m[0], m[1])
    attention = block.self_attn
    k, v = kernels.linear(attention.k, y), kernels.linear(attention.v, y)
    k = k if raw else kernels.norm(attention.norm_k, k).view(*y.shape[:2], heads, -1)
    return y, k, v.view(*y.shape[:2], heads, -1)


def feed_forward(block: nn.Module, x: Tensor, m: Sequence[Tensor], kernels: Kernels = PLAIN) -> Tensor:
    return kernels.gate(x, kernels.ffn(block.ffn, kernels.modulate(block.norm2, x, m[3], m[4])), m[5])


class Beside(Protocol):
    """What a network has beside its blocks (VACE's control blocks, a camera adapter), for one forward. layers: of the
    store, all in all. `begin` gets the embedded frames; `number` is the layer of the store that a block has; `after` what
    comes behind a block. Tokens are [B, n, D]; None, as from a layer, ends a silent pass.
    """

    layers: int

    def begin(self, tokens: Tensor) -> Tensor: ...

    def number(self, index: int) -> int: ...

    def after(self, index: int, x: Tensor, run: "_Run") -> Tensor | None: ...


class Alone:
    """A network without anything beside its blocks."""

    def __init__(self, net: Any):
        self.layers = len(net.blocks)

    def begin(self, tokens: Tensor) -> Tensor:
        return tokens

    def number(self, index: int) -> int:
        return index

    def after(self, index: int, x: Tensor, run: "_Run") -> Tensor:
        return x


class _Run:
    """One forward: what all layers share. Lives as long as the forward does."""

    def __init__(self, net: Any, text: TextState, memory: Exchange, times: Embedded, ops: Ops, layers: int):
        self.net, self.text, self.memory, self.times, self.ops, self.layers = net, text, memory, times, ops, layers
        self.e = times.projected
        self.take = ops.kernels.meet(memory)
        if ops.kernels is PLAIN:
            self.first_half, self.ffn = ops.compile(keys_and_values), ops.compile(feed_forward)
        else:
            self.first_half = partial(keys_and_values, kernels=ops.kernels, raw=self.take is not None)
            self.ffn = partial(feed_forward, kernels=ops.kernels)
        self.attend = getattr(memory, "attend", _plainly)
        self.flat = getattr(ops.attention, "flat", None) if self.attend is _plainly else None
        self.observed, self.asked = getattr(memory, "observes", False), getattr(memory, "asks", False)
        self.leading = getattr(memory, "leading", 0)
        self.attend_prompt = getattr(memory, "attend_prompt", None)

    def layer(self, index: int, block: nn.Module, x: Tensor) -> Tensor | None:
        """One layer of the store. Returns None after the last layer of a silent pass: its keys are all that is wanted."""
        ops, heads = self.ops, self.net.num_heads
        m = self.times.modulation(index, block, x, ops.parameter)
        y, k, v = self.first_half(block, x, m, heads)
        attention = block.self_attn
        last = self.memory.silent and index == self.layers - 1
        if self.leading and index == self.layers - 1:
            x, y, *m = _behind(self.leading, self.e.shape[1], x, y, *m)
        q = None if last and not self.observed else self._query(attention, y)
        if self.asked:
            self.memory.ask(index, self.text.mean_key(index, block.cross_attn, self.net.text_embedding, heads))
        found = self._exchange(index, attention, q, k, v)
        if last:
            return None
        q, keys, values = found
        if self.flat:
            y = self.flat(q.flatten(2), keys.flatten(2), values.flatten(2), heads)
        else:
            y = self.attend(index, q, keys, values, ops.attention).flatten(2)
        y = ops.kernels.linear(attention.o, ops.after_self_attention(index, y, q=q, k=keys))
        x = ops.kernels.gate(x, y, m[2])
        y = ops.kernels.norm(block.norm3, x)
        x = x + ops.cross_attention(index, block, y, self.text, self._prompt_ops(index), self.net)
        x = ops.after_cross_attention(index, x)
        return self.ffn(block, x, m)

    def _query(self, attention: nn.Module, y: Tensor) -> Tensor:
        norm, linear = self.ops.kernels.norm, self.ops.kernels.linear
        q = linear(attention.q, y)
        return q if self.take else norm(attention.norm_q, q).view(*y.shape[:2], self.net.num_heads, -1)

    def _exchange(self, index: int, attention: nn.Module, q: Tensor | None, k: Tensor, v: Tensor):
        if self.take:
            return self.take(index, attention, self.net.num_heads, q, k, v)
        return self.memory.exchange(index, q, k, v)

    def _prompt_ops(self, index: int) -> Ops:
        """What cross-attention works with: an attention of the pass where that has one for prompts."""
        if self.attend_prompt is None:
            return self.ops
        return replace(self.ops, attention=partial(self.attend_prompt, index, attention=self.ops.attention))


def forward(net: Any, x: Tensor, timesteps: Tensor | Embedded, text: TextState, memory: Exchange, ops: Ops,
            beside: Beside | None = None) -> Tensor | None:
    """Velocity of the call's frames, [B, C, F, h, w], without the `leading` ones of a joined pass, or None for a silent
    (clean, recache) pass.

    net: our WanModel or ComfyUI's. x: [B, C, F, h, w] in the compute dtype, h and w even; with channels of conditioning
    behind those of the latents where the network has them. timesteps: float32 [B, F], 0..1000, alone or as `Embedded`.
    Raises ForcingError for odd sizes.
    """
    beside = beside or Alone(net)
    if x.shape[3] % net.patch_size[1] or x.shape[4] % net.patch_size[2]:
        raise ForcingError(f"A latent of {x.shape[3]}x{x.shape[4]} does not divide into 2x2 patches. "
                           "Use a width and a height divisible by 16 pixels.")
    grid = tuple(size // patch for size, patch in zip(x.shape[2:], net.patch_size))
    tokens = beside.begin(ops.kernels.embed(net.patch_embedding, x))
    known = timesteps if isinstance(timesteps, Embedded) else text.times.of(timesteps)
    times = known.begin(net, x.dtype, ops.sinusoid)
    run = _Run(net, text, memory, times, ops, beside.layers)
    for index, block in enumerate(net.blocks):
        number = beside.number(index)
        step = lambda y, i=number, b=block: run.layer(i, b, y)  # noqa: E731
        tokens = ops.around_block(index, step, tokens, {"e": run.e, "text": text})
        tokens = None if tokens is None else beside.after(index, tokens, run)
        if tokens is None:
            return None
    grid = (grid[0] - run.leading, *grid[1:])
    return unpatchify(_end(net.head, tokens, times, run.leading, ops), grid, net.patch_size, net.out_dim)


def _end(head: nn.Module, tokens: Tensor, times: Embedded, leading: int, ops: Ops) -> Tensor:
    """Tokens [B, n, D] -> the numbers of their patches [B, n, pt*ph*pw*C]."""
    if not ops.kernels.opens(head, tokens):
        return head(tokens, times.ending(leading))
    shift, factor = times.last_modulation(head, tokens, ops.parameter, leading)
    return ops.kernels.linear(head.head, ops.kernels.modulate(head.norm, tokens, shift, factor))


def remember(net: Any, tokens: Tensor, text: TextState, memory: Exchange, ops: Ops) -> None:
    """Send tokens [B, n, D] of no frame through all layers at timestep 0, as one silent pass: what `memory` is given of them
    is all that is wanted. Patches around blocks do not act."""
    times = Embedded(tokens.new_zeros(tokens.shape[0], 1, dtype=torch.float32)).begin(net, tokens.dtype, ops.sinusoid)
    run = _Run(net, text, memory, times, ops, len(net.blocks))
    for index, block in enumerate(net.blocks):
        tokens = run.layer(index, block, tokens)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int], channels: int) -> Tensor:
    """[B, n, pt*ph*pw*C] (channel fastest) -> [B, C, F, h, w]."""
    (f, h, w), (pt, ph, pw) = grid, patch
    return rearrange(tokens, "b (f h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)", f=f, h=h, w=w, pt=pt, ph=ph, pw=pw,
                     c=channels)
