"""What a worker is told to make, as plain data that travels as JSON, and the files that it leaves."""
from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Sequence

from ..errors import ForcingError

LATENTS, VIDEO, SNAPSHOT = "latents.safetensors", "video.mp4", "snapshot.safetensors"
JOB_KEYS = {"prompt": str, "conditioning": str, "seed": int}
LARGEST_SEED = 1 << 64


@dataclass(frozen=True)
class Request:
    """One rollout. out: folder for LATENTS, VIDEO and SNAPSHOT. weights: a micro network, "random", or a checkpoint file.
    prompt: a caption for micro networks. conditioning: for a checkpoint file, a safetensors file with the encoded `prompt`
    [1, n, text_dim] and, for guided systems, `negative`. frames: latent frames. preset, size (width, height in pixels): None
    is usual for the weights. cache: settings of the memory instead of the preset's own. device: cpu or cuda. dtype: of the
    network. every: blocks between two snapshots. resume: go on from the snapshot in `out`, if there is one.

    Raises ForcingError for numbers that make no sense.
    """

    out: str
    weights: str = "student"
    prompt: str | None = None
    conditioning: str | None = None
    seed: int = 0
    frames: int = 21
    preset: str | None = None
    size: tuple[int, int] | None = None
    cache: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "float32"
    every: int = 4
    resume: bool = False

    def __post_init__(self):
        if self.frames < 1 or self.every < 1 or not 0 <= self.seed < LARGEST_SEED:
            raise ForcingError(f"{self.frames} latent frames with a snapshot every {self.every} blocks and seed {self.seed} "
                               "cannot be made. Use at least 1 frame and 1 block, and a seed from 0 to 2^64 - 1.")

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def part(self, number: int, job: dict[str, Any]) -> Request:
        """The same for one job of many, in a folder of its own."""
        return replace(self, out=str(self.folder / f"{number:03d}"), **job)


def pack(requests: Sequence[Request]) -> str:
    return json.dumps([asdict(request) for request in requests])


def unpack(text: str) -> list[Request]:
    return [Request(**told | {"size": told["size"] and tuple(told["size"])}) for told in json.loads(text)]


def read_jobs(path: Path) -> list[dict[str, Any]]:
    """The jobs of a JSON file: a list of objects with `prompt` (or `conditioning`) and `seed`. Raises ForcingError for
    anything else."""
    try:
        jobs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ForcingError(f"{path} is no list of jobs: {error}. Write JSON such as "
                           '[{"prompt": "a red circle", "seed": 0}].') from error
    if not isinstance(jobs, list) or not jobs:
        raise ForcingError(f"{path} holds no jobs. Write a list with at least one, such as [{{\"seed\": 0}}].")
    for number, job in enumerate(jobs):
        if not isinstance(job, dict) or any(type(value) is not JOB_KEYS.get(name) for name, value in job.items()):
            raise ForcingError(f"Job {number} of {path} cannot be read. It may have {', '.join(JOB_KEYS)}: the seed is a whole "
                               "number, the others are text.")
    return jobs


def make_folder(path: Path) -> None:
    """Raises ForcingError where it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ForcingError(f"The folder {path} cannot be made: {error.strerror or error}. Choose another one.") from error
    if not os.access(path, os.W_OK):
        raise ForcingError(f"The folder {path} cannot be written to. Choose another one.")
