"""Rollouts: generators of finished latent blocks. They know a denoiser and nothing of networks or hosts."""
from .block import block_rollout
from .calls import calls, most_frames
from .rolling import rolling_rollout
from .transitions import Switch, recache

# name -> rollout(denoiser, blocks, levels, noise, **settings of block_rollout); options of a policy name theirs
ROLLOUTS = {
    "block": block_rollout,
    "rolling": rolling_rollout,
}

__all__ = ["ROLLOUTS", "Switch", "block_rollout", "calls", "most_frames", "recache", "rolling_rollout"]
