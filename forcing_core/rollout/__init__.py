"""Rollouts: generators of finished latent blocks. They know a denoiser and nothing of networks or hosts."""
from .block import block_rollout
from .calls import calls, most_frames
from .knot import Knot, knot_rollout
from .per_step import per_step_rollout
from .recompute import recompute_rollout
from .rolling import rolling_rollout
from .state import RolloutState
from .transitions import Switch, recache

# name -> rollout(denoiser, blocks, levels, noise, **settings of block_rollout); options of a policy name theirs
ROLLOUTS = {
    "block": block_rollout,
    "rolling": rolling_rollout,
    "recompute": recompute_rollout,
    "knot": knot_rollout,
    "per_step": per_step_rollout,
}

__all__ = ["Knot", "ROLLOUTS", "RolloutState", "Switch", "block_rollout", "calls", "knot_rollout", "most_frames",
           "per_step_rollout", "recache",
           "recompute_rollout", "rolling_rollout"]
