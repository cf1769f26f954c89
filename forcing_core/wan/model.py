"""A compact Wan 2.1 text-to-video network with the official key names.

Only parameters and the small modules that hold them; the forward is `wan.forward.forward`, which also runs
over ComfyUI's stock modules. Source: arXiv 2503.20314 (Wan), public repo Wan-Video/Wan2.1.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WanConfig:
    """Shape of a Wan 2.1 T2V network. Defaults are the 1.3B model; head_dim is always 128 in public ones."""

    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6


class Attention(nn.Module):
    """Projections of self- or cross-attention; queries and keys are normed over the full width."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)


class Layer(nn.Module):
    """One transformer block."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = Attention(dim, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = Attention(dim, eps)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"),
                                 nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim ** 0.5)


class Head(nn.Module):
    """Modulated norm and projection to the pixels of a patch."""

    def __init__(self, config: WanConfig):
        super().__init__()
        t, h, w = config.patch
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, t * h * w * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim ** 0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, F*S, D]; e [B, F, D], the time embedding before its projection."""
        shift, scale = (self.modulation.unsqueeze(0) + e.unsqueeze(2)).unbind(2)
        tokens = x.unflatten(1, (e.shape[1], -1))
        y = torch.addcmul(shift.unsqueeze(2), self.norm(tokens), 1 + scale.unsqueeze(2))
        return self.head(y.flatten(1, 2))


class WanModel(nn.Module):
    """The module tree. `patch_embedding` stays float32 whatever the rest is, as in ComfyUI."""

    def __init__(self, config: WanConfig = WanConfig()):
        super().__init__()
        self.config = config
        self.num_heads, self.patch_size = config.heads, config.patch
        self.freq_dim, self.out_dim = config.freq_dim, config.out_channels
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch, config.patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"),
                                            nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = Head(config)

    def to_compute(self, dtype: torch.dtype) -> "WanModel":
        """Cast everything but the patch embedding to the compute dtype."""
        self.to(dtype)
        self.patch_embedding.float()
        return self
