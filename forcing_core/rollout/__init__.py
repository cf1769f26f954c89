"""Rollouts: generators of finished latent blocks. They know a denoiser and nothing of networks or hosts."""
from .block import Switch, block_rollout, recache

# name -> rollout(denoiser, blocks, levels, noise, **settings of block_rollout); options of a policy name theirs
ROLLOUTS = {
    "block": block_rollout,
}

__all__ = ["ROLLOUTS", "Switch", "block_rollout", "recache"]
