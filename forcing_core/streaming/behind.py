"""One job behind: a block is decoded and written in a thread of its own while the next one is sampled.

There is never more than one job: who hands over the next waits for it. So jobs are done in their order, what waits is one
block, and a command acts at most one block later than without the thread.
"""
from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable

import torch


class Behind:
    """Does jobs of one other thread, one after the other. As a context it ends with the last job done; where that failed,
    its error is raised unless another is on its way. A failed job is the last one: its error comes back at every call."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, "forcing-decode")
        self._job: Future | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.settle()

    def hand(self, job: Callable[[], None]) -> None:
        """Have this done as soon as the job before is, for which this waits; raises what that one raised."""
        self.settle()
        self._job = self._pool.submit(_as_here(job))

    def settle(self) -> None:
        """Wait until nothing is left to be done."""
        if self._job is not None:
            self._job.result()


def _as_here(job: Callable[[], None]) -> Callable[[], None]:
    """The job under the calling thread's way of keeping no gradients, which other threads do not inherit."""
    inference = torch.is_inference_mode_enabled()

    def done() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # in this order: the mode "off" allows gradients
            job()
    return done
