"""Worker processes on this host, and what happens when one of them ends too early.

A worker is this Python with `forcing_core.parallel.work` and JSON, not a fork: it does not matter what the process that
started it has loaded. It ends with its parent, whatever becomes of that. Workers of one rollout find each other by the same
variables that torchrun sets; no PyTorch is imported here.
"""
from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

from ..errors import ForcingError
from .request import Request, pack

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]  # the folder that this package is imported from
TOLD = 1  # `Trouble.far` of a ForcingError
POLL, SETTLE, PATIENCE = 0.1, 1.0, 3.0  # seconds
REPORT = "FORCING_REPORT"  # names the file of `Worker.report`
COMMAND = (sys.executable, "-m", "forcing_core.parallel.work")
ALONE = {"WORLD_SIZE": "1"}


class Trouble(NamedTuple):
    """far, when: how far from the cause it may be, for when one process dies, those that wait for it fail too. text: what
    happened; trace: where."""

    far: int
    when: float
    text: str
    trace: str = ""


@dataclass
class Worker:
    """number: of the process; report: file for what went wrong in it."""

    number: int
    process: subprocess.Popen
    report: Path

    @property
    def failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    def trouble(self) -> Trouble:
        code = self.process.returncode
        if code < 0:
            return Trouble(0, 0.0, f"was killed ({_signal_name(-code)})")
        try:
            found = json.loads(self.report.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return Trouble(2, 0.0, f"ended with status {code}")
        return Trouble(TOLD if found["told"] else 3, found["when"], found["text"], found["trace"])


def launch(shares: Sequence[Sequence[Request]], *, together: bool, advice: Callable[[], str]) -> None:
    """Start a worker for each share of requests and wait for all of them. together: they make one rollout, and when one
    fails the others are stopped; else they are let finish. advice: how to go on after a failure.

    Raises ForcingError with what the first worker that failed says, or what killed it.
    """
    with tempfile.TemporaryDirectory(prefix="forcing-") as folder:
        group = _group(len(shares)) if together else ALONE
        workers: list[Worker] = []
        try:
            for number, share in enumerate(shares):
                workers.append(_start(number, len(shares), share, group, Path(folder)))
            failed = _wait(workers, together)
        finally:
            _end(workers)
        if failed:
            trouble, number = min((worker.trouble(), worker.number) for worker in failed)
            log.info(trouble.trace)
            if trouble.far == TOLD:  # a ForcingError names its own fix
                raise ForcingError(trouble.text)
            raise ForcingError(f"Process {number} of {len(shares)} {trouble.text}. {advice()}")


def _group(size: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _start(number: int, count: int, share: Sequence[Request], group: dict[str, str], folder: Path) -> Worker:
    report = folder / f"{number}.json"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    env = {**threads, **os.environ, **group, "RANK": str(number), "LOCAL_RANK": str(number), "PYTHONPATH": path,
           REPORT: str(report)}
    told = folder / f"{number}.requests.json"
    told.write_text(pack(share), encoding="utf-8")
    process = subprocess.Popen([*COMMAND, str(told)], env=env, stdin=subprocess.PIPE)
    return Worker(number, process, report)


def _wait(workers: Sequence[Worker], together: bool) -> list[Worker]:
    """Those that failed, before any of the others was stopped."""
    while any(worker.process.poll() is None for worker in workers):
        if together and any(worker.failed for worker in workers):
            until = time.monotonic() + SETTLE  # who is killed last may be the cause
            while time.monotonic() < until and any(worker.process.poll() is None for worker in workers):
                time.sleep(POLL)
            break
        time.sleep(POLL)
    return [worker for worker in workers if worker.failed]


def _end(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.process.stdin.close()
        if worker.process.poll() is None:
            worker.process.terminate()
    until = time.monotonic() + PATIENCE
    for worker in workers:
        try:
            worker.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def member() -> bool:
    """Whether this process was started as one of several that share a rollout, by torchrun for example."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextmanager
def watched() -> Iterator[None]:
    """The life of a worker: it ends when its parent has ended, leaves a report where it fails, and never comes back.

    Python is not wound up: threads of gloo may still let go of tensors, and one that waits for Python's lock while it is
    wound up aborts the process (public repo pytorch/pytorch, pull request 179291), though all its work is done."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    status = 0
    try:
        yield
    except Exception as error:
        _report(error)
        status = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _follow_parent() -> None:
    try:
        while os.read(0, 1):
            pass
    finally:
        os._exit(1)


def _report(error: Exception) -> None:
    told = isinstance(error, ForcingError)
    text = str(error) if told else f"failed: {type(error).__name__}: {error}"
    found = {"told": told, "when": time.time(), "text": text, "trace": traceback.format_exc()}
    Path(os.environ[REPORT]).write_text(json.dumps(found), encoding="utf-8")
