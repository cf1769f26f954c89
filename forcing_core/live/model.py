"""LIVE's diffusion transformer: names of weights and arithmetic of the public definition.

Every token is modulated by its own condition: the embedded timestep of its frame plus the embedded rays of its patch (or the
embedded pose or action of its frame). Norms are rounded to float16 in every compute type, as the public code does it and as
the weights were trained.

Axes: B batch, C latent channel, F frame, h/w latent size, n tokens, D width, H heads, d head_dim.
Source: arXiv 2602.03747, public repo Junchao-cs/LIVE @20c82a9.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import backend
from ..errors import ForcingError
from .attention import Attend, Context, Rotary, block_causal, rotary, rotate
from .config import PATCH, LiveConfig

EPS = 1e-6
SDPA = backend("sdpa")


class PatchEmbedding(nn.Module):
    """[B, C, F, h, w] -> [B, n, D]."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, (1, PATCH, PATCH), (1, PATCH, PATCH))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VectorEmbedding(nn.Module):
    """[..., channels] -> [..., D]."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class RoundedNorm(nn.Module):
    """RMS norm over channels whose result is rounded to float16 before it is scaled."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(torch.mean(y * y, dim=-1, keepdim=True) + EPS)
        return (y.to(x.dtype).half() * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Fused projections and output of self-attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.wqkv, self.wo = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, turn: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values, [B, n, H, d]."""
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in self.wqkv(x).chunk(3, dim=-1))
        return rotate(q, turn), rotate(k, turn), v


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """One transformer block. `attended` and `fed` are its two halves, `keys_values` what a context keeps of it."""

    def __init__(self, config: LiveConfig):
        super().__init__()
        dim = config.dim
        self.attention, self.feed_forward = Attention(dim, config.heads), FeedForward(dim, config.ffn)
        self.attention_norm, self.ffn_norm = RoundedNorm(dim), RoundedNorm(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """shift, scale, gate of attention, then of the feed-forward, each [B, n, D]."""
        return self.adaLN_modulation(c).chunk(6, dim=-1)

    def project(self, x: Tensor, m: tuple[Tensor, ...], turn: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(modulated(self.attention_norm(x), m[0], m[1]), turn)

    def finish(self, x: Tensor, y: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        """x [B, n, D] with the attention's result y [B, n, H, d] and the feed-forward added."""
        x = x + m[2] * self.attention.wo(y.flatten(2))
        return x + m[5] * self.feed_forward(modulated(self.ffn_norm(x), m[3], m[4]))


class FinalLayer(nn.Module):
    """Modulated norm and projection to the latents of a patch."""

    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.linear = nn.Linear(dim, PATCH * PATCH * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulated(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=-1)))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """[B, F] whole timesteps (0..1000) -> float32 [B, F, width] of [cos | sin]."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angle = timesteps.float().unsqueeze(-1) * rates
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class LiveModel(nn.Module):
    """The network. `forward` gives velocities (noise minus data); `remember` computes the context of later calls."""

    def __init__(self, config: LiveConfig | None = None):
        super().__init__()
        self.config = config = config or LiveConfig()
        embedding = PatchEmbedding if config.condition == "camera" else VectorEmbedding
        self.x_embedder = PatchEmbedding(config.channels, config.dim)
        self.t_embedder = VectorEmbedding(config.frequencies, config.dim)
        self.c_embedder = embedding(config.condition_dim, config.dim)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_layer = FinalLayer(config.dim, config.channels)

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor, context: Context | None = None,
                attend: Attend = SDPA) -> Tensor:
        """Velocity [B, C, F, h, w] of the frames x, which stand behind those of the context.

        timesteps: [B, F], 0..1000; their fractions are dropped. condition: of these frames, [B, F, 6, h, w] for a camera,
        else [B, F, condition_dim]. Raises ForcingError for sizes other than the network's and for more frames than a window.
        """
        context = context or Context()
        tokens, c, turn = self._embedded(x, timesteps, condition, context.frames)
        for index, layer in enumerate(self.blocks):
            m = layer.modulation(c)
            q, k, v = layer.project(tokens, m, turn)
            y = block_causal(q, *context.extended(index, k, v), self.config.tokens, attend)
            tokens = layer.finish(tokens, y, m)
        rows, columns = self.config.grid
        return rearrange(self.final_layer(tokens, c), "b (f h w) (c p q) -> b c f (h p) (w q)", h=rows, w=columns, p=PATCH,
                         q=PATCH)

    def remember(self, x: Tensor, timesteps: Tensor, condition: Tensor, attend: Attend = SDPA,
                 context: Context | None = None) -> Context:
        """The context that these frames, behind those of `context`, are for those behind them; arguments as in `forward`."""
        before = context or Context()
        tokens, c, turn = self._embedded(x, timesteps, condition, before.frames)
        made = Context(before.frames + x.shape[2])
        for index, layer in enumerate(self.blocks):
            m = layer.modulation(c)
            q, k, v = layer.project(tokens, m, turn)
            k, v = before.extended(index, k, v)
            made.keys.append(k)
            made.values.append(v)
            if layer is not self.blocks[-1]:  # nothing reads what the last layer makes of a context
                tokens = layer.finish(tokens, block_causal(q, k, v, self.config.tokens, attend), m)
        return made

    def _embedded(self, x: Tensor, timesteps: Tensor, condition: Tensor, first: int) -> tuple[Tensor, Tensor, Rotary]:
        """(tokens, their conditions, their rotation) of frames that stand at position `first` of the window."""
        config, frames = self.config, x.shape[2]
        _check(config, x, condition, first)
        c = self.t_embedder(timestep_embedding(timesteps.long(), config.frequencies).to(x.dtype))
        if config.condition == "camera":
            c = c.repeat_interleave(config.tokens, dim=1) + self.c_embedder(condition.transpose(1, 2).to(x.dtype))
        else:
            c = (c + self.c_embedder(condition.to(x.dtype))).repeat_interleave(config.tokens, dim=1)
        return self.x_embedder(x), c, rotary(config, first, frames, x.device)


def check_latents(config: LiveConfig, x: Tensor) -> None:
    """Raise ForcingError for latents [B, C, F, h, w] of another size than the network's."""
    if tuple(x.shape[3:]) != config.latent or x.shape[1] != config.channels:
        height, width = config.picture
        raise ForcingError(f"A latent of {x.shape[1]} channels and {x.shape[3]}x{x.shape[4]} cells was given to a network for "
                           f"{config.channels} and {config.latent[0]}x{config.latent[1]}. Use pictures of {width}x{height} "
                           "pixels.")


def _check(config: LiveConfig, x: Tensor, condition: Tensor, first: int) -> None:
    check_latents(config, x)
    if first + x.shape[2] > config.window:
        raise ForcingError(f"{first + x.shape[2]} frames are more than the {config.window} that LIVE was trained on. Use a "
                           f"window of at most {config.window}.")
    each = (config.condition_dim, *config.latent) if config.condition == "camera" else (config.condition_dim,)
    if tuple(condition.shape) != (x.shape[0], x.shape[2], *each):
        raise ForcingError(f"The condition has the shape {list(condition.shape)}; {x.shape[2]} frames of this network want "
                           f"{[x.shape[0], x.shape[2], *each]}. Use a {config.condition} track as long as the video.")
