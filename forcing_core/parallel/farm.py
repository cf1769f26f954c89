"""Many rollouts at once, each in one process and in a folder of its own, over this host or over Ray.

Every job is what the same request would be alone, so its numbers do not depend on where it runs. A farm that was stopped goes
on with `resume`: complete folders are left as they are. Ray (2.x) is optional and imported when it is asked for.
"""
from __future__ import annotations

import importlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Sequence

from ..errors import ForcingError
from .launch import ROOT, launch
from .request import LATENTS, Request, make_folder, pack, unpack

Files = dict[str, bytes]
EXCLUDED = ["__pycache__", "**/__pycache__"]


def jobs_of(request: Request, jobs: Sequence[dict[str, Any]]) -> list[Request]:
    """A request for each job, in folders 000, 001, ... of the request's."""
    return [request.part(number, job) for number, job in enumerate(jobs)]


def over_processes(requests: Sequence[Request], processes: int) -> None:
    """Deal the requests out to so many processes of this host, GPU i to process i. One that dies does not stop the others.
    Raises ForcingError for what went wrong, once all have ended."""
    shares = [requests[i::processes] for i in range(min(processes, len(requests)))]
    launch(shares, together=False, advice=lambda: _advice(requests))


def _advice(requests: Sequence[Request]) -> str:
    left = [request.folder.name for request in requests if not (request.folder / LATENTS).is_file()]
    return f"Not finished: {', '.join(left) or 'none'}. Run the command again with --resume."


def over_ray(requests: Sequence[Request], address: str | None = None) -> None:
    """One Ray task a request, one GPU or CPU each; what they make is brought to this host. address: of a running cluster, None
    starts one here. A checkpoint file has to lie at the same place on every host. Raises ForcingError for what went wrong,
    once all have ended, and without Ray."""
    ray = _ray()
    pending = [r for r in requests if not (r.resume and (r.folder / LATENTS).is_file())]
    for request in pending:
        make_folder(request.folder)
    _connect(ray, address)
    try:
        gpus = {"num_gpus": 1} if requests[0].device == "cuda" else {"num_cpus": 1}
        task = ray.remote(**gpus)(made_elsewhere)
        running = {task.remote(pack([replace(request, resume=False)])): request for request in pending}
        failed = [_bring(ray, *ready, running) for ready in _as_ready(ray, list(running))]
    finally:
        ray.shutdown()
    if problems := [text for text in failed if text]:
        raise ForcingError(f"{problems[0]} {_advice(requests)}")


def _connect(ray: Any, address: str | None) -> None:
    here = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address, runtime_env={"py_modules": [str(ROOT / "forcing_core")], "excludes": EXCLUDED}, **here)
    except Exception as error:  # Ray raises its own kinds, connection errors and plain exceptions
        raise ForcingError(f"Ray cannot be used: {' '.join(str(error).split())[-500:]}. Check the address of the cluster, or "
                           "leave out --ray to stay on this host.") from error


def made_elsewhere(told: str) -> Files:
    """Fulfil a request in a folder of this host, and return its files by name. Runs in a process of Ray."""
    from .ranks import Ranks, device_of
    from .work import fulfil  # PyTorch is for the workers alone

    request, = unpack(told)
    with tempfile.TemporaryDirectory(prefix="forcing-") as folder:
        fulfil(replace(request, out=folder), Ranks(device=device_of(request.device)), lambda text: None)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _as_ready(ray: Any, waiting: list[Any]):
    while waiting:
        ready, waiting = ray.wait(waiting)
        yield ready


def _bring(ray: Any, ready: Any, running: dict[Any, Request]) -> str:
    """Write what one task made; what went wrong, or nothing."""
    folder = running[ready].folder
    try:
        files = ray.get(ready)
    except Exception as error:  # of whatever kind: the other jobs go on
        return f"Job {folder.name} failed: {' '.join(str(error).split())[-500:]}."
    for name in sorted(files, key=lambda name: name == LATENTS):  # which say that the folder is complete
        (folder / name).write_bytes(files[name])
    return ""


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ForcingError("Ray is not installed. Install it with 'pip install ray', or leave out --ray to stay on this "
                           "host.") from error
