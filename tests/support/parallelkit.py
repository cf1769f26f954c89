"""Processes that share a rollout, played by threads of one process: the same calls, nothing to start."""
from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from forcing_pack.forcing_core.parallel.ranks import Ranks


class Mail:
    """What `size` threads lay out for each other. `exchange` gives everybody what all have brought."""

    def __init__(self, size):
        self.box, self.barrier = [None] * size, threading.Barrier(size, timeout=60)

    def exchange(self, rank, brought):
        self.box[rank] = brought
        self.barrier.wait()
        found = list(self.box)
        self.barrier.wait()
        return found


class ThreadRanks(Ranks):
    """`Ranks` over a `Mail`."""

    def __init__(self, rank, mail):
        super().__init__(rank, len(mail.box))
        object.__setattr__(self, "mail", mail)

    def swap(self, parts):
        return [torch.stack([sent[i][self.rank] for sent in self.mail.exchange(self.rank, parts)]) for i in range(len(parts))]

    def whole(self, t, dim):
        return torch.cat(self.mail.exchange(self.rank, t), dim=dim)

    def collect(self, t, dim):
        every = self.mail.exchange(self.rank, t.clone())
        return torch.cat(every, dim=dim) if self.rank == 0 and t.numel() else t


def together(size, do):
    """[do(ranks)] of `size` threads that share a rollout; what one raises, this raises."""
    mail = Mail(size)

    def one(rank):
        try:
            return do(ThreadRanks(rank, mail))
        except BaseException:
            mail.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    errors = [e for e in (future.exception() for future in futures) if e is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]
