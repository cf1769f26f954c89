"""Rollouts: generators of finished latent blocks. They know a denoiser and nothing of networks or hosts."""
from .block import Switch, block_rollout, recache

__all__ = ["Switch", "block_rollout", "recache"]
