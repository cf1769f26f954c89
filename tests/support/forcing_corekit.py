"""Shared by the tests of forcing_core: a tiny network, a cached run of it, and the dense oracle.

`DensePass` knows nothing of stores, policies and `rope.py`: it gets the ends of the blocks as literal numbers and
does full attention under a mask, with rotations of its own as complex multiplications in float64.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.memory import Memory
from forcing_pack.forcing_core.policies import build
from forcing_pack.forcing_core.rope import Rope
from forcing_pack.forcing_core.store import Store
from forcing_pack.forcing_core.wan import Ops, TextState, WanConfig, WanModel, forward
from torch.nn.functional import scaled_dot_product_attention

HEAD_DIM, CHANNELS, TEXT_DIM, TEXT_ROWS = 128, 4, 32, 6
CONFIG = WanConfig(dim=256, ffn_dim=256, heads=2, layers=3, in_channels=CHANNELS, out_channels=CHANNELS,
                   text_dim=TEXT_DIM)


def network(seed=0, config=CONFIG, dtype=torch.float32):
    """A random network with unit gain everywhere, so that context really changes the output."""
    draw = torch.Generator().manual_seed(seed)
    net = WanModel(config)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if name.endswith(("modulation", "bias")):
            value = 0.1 * noise
        elif parameter.ndim == 1:
            value = 1 + 0.1 * noise
        else:
            value = noise / math.prod(parameter.shape[1:]) ** 0.5
        parameter.data.copy_(value)
    return net.eval().requires_grad_(False).to_compute(dtype)


def gap(a, b):
    """Largest absolute difference, as a number that pytest can print."""
    return float((a - b).abs().max())


def prompts(batch=1, seed=0, dtype=torch.float32):
    """[B, rows, text_dim]: a different prompt for every sample."""
    return torch.randn(batch, TEXT_ROWS, TEXT_DIM, generator=torch.Generator().manual_seed(100 + seed)).to(dtype)


def latents(frames, size=(4, 6), batch=1, seed=0):
    return torch.randn(batch, CHANNELS, frames, *size, generator=torch.Generator().manual_seed(200 + seed))


def cached(net, options, frames, size=(4, 6), texts=None, ops=None, dtype=torch.float32, guidance=1.0):
    """A NetworkDenoiser with one memory, or with two where `texts` is a pair of prompt lists."""
    rows, columns = size[0] // 2, size[1] // 2
    texts = texts if texts is not None else [prompts(dtype=dtype)]
    sides = texts if isinstance(texts[0], (list, tuple)) else [texts]

    def condition(side):
        policy = build(options, frames)
        store = Store(net.config.layers, policy.capacity, rows * columns, policy.keys)
        return Condition(side, Memory(policy, store, Rope((rows, columns), net.config.dim // net.config.heads)))

    return NetworkDenoiser(net, [condition(side) for side in sides], guidance, ops or Ops(), dtype)


@dataclass(frozen=True)
class Seen:
    """One call of a denoiser: what went in and what came out."""

    phase: str
    first: int
    frames: int
    timesteps: tuple
    x: torch.Tensor
    out: torch.Tensor | None


class Recorder:
    """A denoiser that notes every call of the one it wraps."""

    def __init__(self, inner):
        self.inner, self.calls, self.events = inner, [], []

    def __call__(self, x, levels, first, phase):
        self.events.append((phase, first, x.shape[2]))
        out = self.inner(x, levels, first, phase)
        self.calls.append(Seen(phase, first, x.shape[2], tuple(level.timestep for level in levels), x, out))
        return out

    def replace_text(self, segment):
        self.events.append(("text", segment))
        self.inner.replace_text(segment)

    def blend_text(self, a, b, weight):
        self.events.append(("blend", a, b, weight))
        self.inner.blend_text(a, b, weight)

    def forget(self):
        self.events.append(("forget",))
        self.inner.forget()

    def flush(self, last):
        self.events.append(("flush", last))
        self.inner.flush(last)

    def jump(self, first, distance):
        self.events.append(("jump", first, distance))
        self.inner.jump(first, distance)


class FakeDenoiser:
    """No network: x0 is half of x, or nothing for a silent phase. For tests of the order of calls."""

    def __call__(self, x, levels, first, phase):
        return 0.5 * x if phase == "noisy" else None

    def replace_text(self, segment):
        pass

    def blend_text(self, a, b, weight):
        pass

    def forget(self):
        pass

    def flush(self, last):
        pass

    def jump(self, first, distance):
        pass


def rotated(x, places, grid):
    """Rotate x [B, n, heads, 128] of whole frames: complex numbers in float64, one exponent series an axis."""
    cells = torch.cartesian_prod(*(torch.as_tensor(axis, dtype=torch.float64) for axis in
                                   (list(places), list(range(grid[0])), list(range(grid[1])))))
    angle = torch.cat([cells[:, axis:axis + 1] * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
                       for axis, dim in enumerate((44, 42, 42))], dim=1)
    pairs = torch.view_as_complex(x.double().unflatten(3, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    return torch.view_as_real(turned).flatten(3).to(x.dtype)


def block_of(frame, ends):
    """(start, end) of the block that a frame lies in; `ends` are the ends of all blocks."""
    end = next(e for e in ends if frame < e)
    return max([0, *(e for e in ends if e <= frame)]), end


def visible(end, window, sink):
    """Frames that a block ending at `end` may see: core rule j < E and (j < S or j >= E - (W - S))."""
    return [j for j in range(end) if window is None or j < sink or j >= end - (window - sink)]


def places(frames, end, sink, positions, limit=None):
    """Temporal position of each of `frames` as seen from the block that ends at `end`."""
    if positions == "absolute" or end <= sink:
        return list(frames)
    seen = sorted(frames)
    if positions == "relative":
        return [seen.index(f) for f in frames]
    shift = max(0, end - limit)  # rebased: the newest frame stands at limit - 1
    others = [f - shift for f in seen if f >= sink]
    return [min(f, min(others) - sink + f) if f < sink else f - shift for f in frames]


class DensePass:
    """An `Exchange` of one pass over everything at once: nothing is stored, attention is masked.

    rows: for every frame of the input (kind, frame, end of its block) with kind "clean" or "noisy". A clean row
    sees the clean rows that its block may see; a noisy row sees those before its own block, and the noisy rows
    of its own block. Without noisy rows this is the block-causal oracle, with them the teacher-forcing one.
    """

    silent = False

    def __init__(self, rows, grid, window=None, sink=0, positions="absolute", limit=None):
        self.rows, self.grid = rows, grid
        self.window, self.sink, self.positions, self.limit = window, sink, positions, limit
        self._key = None

    def exchange(self, layer, q, k, v):
        self._key = k
        return q, k, v

    def masked(self, q, k, v):
        """Stands for the attention of the network; only self-attention is handed the keys of `exchange`."""
        if k is not self._key:
            return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        out = torch.empty_like(q)
        tokens = self.grid[0] * self.grid[1]
        for kind, end in sorted({(kind, end) for kind, _, end in self.rows}):
            mine = [i for i, row in enumerate(self.rows) if (row[0], row[2]) == (kind, end)]
            mask, where = self._mask(kind, end, [self.rows[i][1] for i in mine])
            here = torch.tensor([t for i in mine for t in range(i * tokens, (i + 1) * tokens)])
            queries = rotated(q[:, here], [where[i] for i in mine], self.grid)
            keys = rotated(k, where, self.grid)
            bias = torch.zeros(len(self.rows)).masked_fill(~mask, -torch.inf).repeat_interleave(tokens)
            out[:, here] = scaled_dot_product_attention(
                queries.transpose(1, 2), keys.transpose(1, 2), v.transpose(1, 2), bias.expand(len(here), -1)
            ).transpose(1, 2)
        return out

    def _mask(self, kind, end, own):
        """(which rows a block sees, the position of every row as that block sees it)."""
        frames = visible(end, self.window, self.sink)
        at = dict(zip(frames, places(frames, end, self.sink, self.positions, self.limit)))
        sees = [frame in at and (row_kind == "clean" if kind == "clean" or frame not in own else row_kind == kind)
                for row_kind, frame, _ in self.rows]
        return torch.tensor(sees), [at.get(frame, 0) for _, frame, _ in self.rows]

    @torch.no_grad()
    def run(self, net, x, timesteps, text):
        """Velocity of all rows in one no-cache pass. x [B, C, rows, H, W], timesteps one a row."""
        timesteps = torch.tensor(timesteps, dtype=torch.float32).expand(x.shape[0], -1)
        return forward(net, x, timesteps, TextState(text), self, Ops(attention=self.masked))
