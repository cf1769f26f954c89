"""Causal rollouts of Wan 2.1 in pure torch: schedules, KV store, cache policies, rollouts, checkpoints.

Nothing here imports ComfyUI. Start reading at `rollout/block.py`; the vocabulary is in the README.
"""
