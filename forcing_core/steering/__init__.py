"""Steering a rollout while it runs: commands, the mailbox that a rollout asks before every block, and their exact replay.

    steering = Steering(prepare=encode)            thread-safe; `send` from anywhere
    helm = Helm(steering, denoiser, noise, ...)    what a rollout is given as `steer`
    for block, x0 in block_rollout(..., steer=helm): ...
    again = Steering(steering.log, prepare=encode)     does the same at the same blocks, bit for bit

A block never changes while it is made: a command acts before the next block that begins, and the log says which one that
was. Pauses change no number, so a replay does not wait. Changes of prompt go the ways of `rollout/transitions.py`.
"""
from .command import Command, Refused, read_command
from .helm import Helm, SteeredNoise
from .log import Entry, pixel_frame, read_entries, read_log, write_log
from .mailbox import Steering

__all__ = ["Command", "Entry", "Helm", "Refused", "SteeredNoise", "Steering", "pixel_frame", "read_command", "read_entries",
           "read_log", "write_log"]
