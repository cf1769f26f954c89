"""One rollout shared by several processes: each has a part of every frame's tokens, and in self-attention a part of the heads.

Between attentions a layer works token by token, so a process needs its own share of the tokens only. In attention a head
needs all tokens but no other head: one all-to-all before it changes (my tokens, all heads) into (all tokens, my heads), one
behind it changes back. The store meets what is between the two, so a process keeps the keys and values of its heads alone,
and policies, stores and passes are those of one process. Source: arXiv 2309.14509 (DeepSpeed-Ulysses). PyTorch's own context
parallelism passes keys around a ring inside one attention over one sequence; it knows no store and fits nothing here but its
collectives.

Axis legend: B batch, f latent frame, S tokens a frame, N processes, s = S / N, H heads, h = H / N, D head_dim.
"""
from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from ..denoiser import Condition, NetworkDenoiser
from ..errors import ForcingError
from ..passes import Exchange
from ..policies import KINDS, Policy
from ..policies.bounded import Bounded
from ..saved import Saved, Tree
from ..schedule import Level
from ..wan import forward
from .ranks import Ranks

HEADS = -2  # axis of the heads in every tensor that the memories below save
# Policies that decide by frame numbers, or for each head by itself. The others look at all heads together.
HEADWISE = ("window", "rolling", "ema_sink", "deep_sink", "routing", "recency", "recompute", "rolling_sink", "reference")


def can_spread(policy: Policy) -> None:
    """Raise ForcingError for a policy that looks at all heads together."""
    kind = next((name for name, (_, make) in KINDS.items() if type(policy) is make), type(policy).__name__)
    if isinstance(policy, Bounded) and policy.options.mode == "uniform":
        return
    if kind not in HEADWISE:
        raise ForcingError(f"The memory {kind!r} chooses by all heads of the network, of which every process has only some. "
                           f"Use --processes 1, or one of {', '.join(HEADWISE)} (and bounded with mode uniform).")


def fit(heads: int, tokens: int, size: int) -> None:
    """Raise ForcingError where heads, or tokens of a latent frame, cannot be dealt out evenly to so many processes."""
    if heads % size == 0 and tokens % size == 0:
        return
    most = max(n for n in range(1, size + 1) if heads % n == 0 and tokens % n == 0)
    other = "" if heads % size else f", or a picture whose width / 16 times height / 16 is a multiple of {size}"
    raise ForcingError(f"{heads} heads and {tokens} tokens a latent frame cannot be dealt out to {size} processes. Use "
                       f"--processes {most}{other}.")


class Split:
    """`wan.forward.Beside`: from the embedding to the last layer, this process's tokens of every frame."""

    def __init__(self, net: Any, share: int, ranks: Ranks):
        self.layers, self.share, self.ranks = len(net.blocks), share, ranks

    def begin(self, tokens: Tensor) -> Tensor:
        """[B, f*S, width] -> [B, f*s, width]"""
        parts = tokens.unflatten(1, (-1, self.ranks.size, self.share))
        return parts[:, :, self.ranks.rank].flatten(1, 2)

    def number(self, index: int) -> int:
        return index

    def after(self, index: int, x: Tensor, run: Any) -> Tensor:
        """All tokens again behind the last layer."""
        if index < self.layers - 1:
            return x
        return self.ranks.whole(x.unflatten(1, (-1, self.share)), dim=2).flatten(1, 2)


class HeadPass:
    """`Exchange` of a layer that has this process's tokens, over a pass that has this process's heads. share: s."""

    def __init__(self, inner: Exchange, share: int, ranks: Ranks):
        self.inner, self.share, self.ranks = inner, share, ranks
        self.silent, self.leading = inner.silent, getattr(inner, "leading", 0)

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        if q is None:
            return self.inner.exchange(layer, None, *self._to_heads(k, v))
        return self.inner.exchange(layer, *self._to_heads(q, k, v))

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        inner = getattr(self.inner, "attend", None)
        return self._to_tokens(inner(layer, q, keys, values, attention) if inner else attention(q, keys, values))

    def _to_heads(self, *tokens: Tensor) -> list[Tensor]:
        """[B, f*s, H, D] each -> [B, f*S, h, D]"""
        size = self.ranks.size
        sent = [t.unflatten(2, (size, -1)).unflatten(1, (-1, self.share)).permute(3, 0, 1, 2, 4, 5) for t in tokens]
        return [t.permute(1, 2, 0, 3, 4, 5).flatten(1, 3) for t in self.ranks.swap(sent)]

    def _to_tokens(self, heads: Tensor) -> Tensor:
        """[B, f*S, h, D] -> [B, f*s, H, D]"""
        sent = heads.unflatten(1, (-1, self.ranks.size, self.share)).permute(2, 0, 1, 3, 4, 5)
        return self.ranks.swap([sent])[0].permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)


@dataclass
class SpreadDenoiser(NetworkDenoiser):
    """As its base, with every forward shared by all processes, which call it with the same arguments and get the same x0.

    Its `state` is whole on process 0 and the one that a single process would save, so a snapshot can be gone on from with
    any number of processes. Raises ForcingError as `fit` and `can_spread` do.
    """

    ranks: Ranks = Ranks()

    def __post_init__(self):
        for condition in self.conditions:
            memory = condition.memory
            can_spread(memory.policy)
            fit(self.net.config.heads, memory.store.frame_tokens, self.ranks.size)
            first = self.ranks.rank * self.heads
            memory.rope = replace(memory.rope, bases=memory.rope.bases[first:first + self.heads])

    @property
    def heads(self) -> int:
        return self.net.config.heads // self.ranks.size

    def state(self) -> Tree:
        return _changed(super().state(), lambda t: self.ranks.collect(t, HEADS))

    def load(self, saved: Saved) -> None:
        super().load(saved.changed(self._share))

    def _share(self, t: Tensor) -> Tensor:
        """This process's heads of a saved tensor; one with another number of heads is for `load` to refuse."""
        if t.ndim < 3 or t.shape[HEADS] != self.net.config.heads:
            return t
        return t.narrow(HEADS, self.ranks.rank * self.heads, self.heads)

    @torch.no_grad()
    def _forward(self, condition: Condition, x: Tensor, levels: Sequence[Level], memory: Exchange) -> Tensor | None:
        self.forwards += 1
        timesteps = x.new_tensor([level.timestep for level in levels], dtype=torch.float32).expand(x.shape[0], -1)
        share = condition.memory.store.frame_tokens // self.ranks.size
        return forward(self.net, x.to(self.dtype), timesteps, condition.text, HeadPass(memory, share, self.ranks), self.ops,
                       Split(self.net, share, self.ranks))


def spread(denoiser: NetworkDenoiser, ranks: Ranks) -> NetworkDenoiser:
    """The same denoiser, not used yet, shared by these processes. Raises ForcingError where it cannot be."""
    if ranks.size == 1:
        return denoiser
    if type(denoiser) is not NetworkDenoiser:
        raise ForcingError(f"A {type(denoiser).__name__} cannot be shared by processes. Use --processes 1.")
    return SpreadDenoiser(**{f.name: getattr(denoiser, f.name) for f in fields(denoiser)}, ranks=ranks)


def _changed(tree: Tree, change: Callable[[Tensor], Tensor]) -> Tree:
    return {name: _changed(value, change) if isinstance(value, dict) else change(value) if isinstance(value, Tensor) else value
            for name, value in tree.items()}
