"""Snapshots: a rollout saved between two blocks, and gone on with later, bit for bit on the same kind of device.

    save(path, identity, denoiser, state, seed=..., latents=...)      after a block was yielded
    snapshot = load(path)                                             checks the file
    state = snapshot.resume(identity, denoiser)                       checks that it fits; fills a fresh denoiser
    for block, x0 in block_rollout(..., resume=state): ...            with more blocks, or another seed or prompt

A branch is the same with another prompt or seed: what comes before stays. The noise of a rollout has to be one that is
keyed by block. A file holds tensors and plain numbers, nothing of it is ever executed, and all of it is checked before use.
"""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterable

import torch
from torch import Tensor

from . import snapshot_file
from .denoiser import Denoiser
from .errors import ForcingError
from .plan import Block
from .rollout.state import RolloutState
from .saved import Saved, Tree, copied, split

VERSION = 1
SAMPLES = 8  # values of every tensor that a fingerprint looks at
INDIFFERENT = ("offload",)  # settings of a memory that change no number


@dataclass(frozen=True)
class Identity:
    """What a run and the snapshot that it goes on from have in common.

    model: `fingerprint` of the network. settings: `settings` of memory and rollout. size: (B, C, H, W) of the latents.
    """

    model: str
    settings: dict[str, Any]
    size: tuple[int, int, int, int]


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, shapes, dtypes and a few values of every tensor: cheap, and the same on every device."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda pair: pair[0]):
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        flat = flat.view(torch.uint8) if flat.element_size() == 1 else flat  # float8 cannot be indexed everywhere
        places = torch.linspace(0, max(0, len(flat) - 1), min(SAMPLES, len(flat)), dtype=torch.float64).long()
        digest.update(flat[places.to(flat.device)].to("cpu").double().numpy().tobytes())
    return digest.hexdigest()


def settings(cache: Any, **more: Any) -> dict[str, Any]:
    """Settings that must be equal: options of a cache policy, and what else the caller names."""
    own = {name: value for name, value in asdict(cache).items() if name not in INDIFFERENT}
    return json.loads(json.dumps({"policy": type(cache).__name__.removesuffix("Options"), **own, **more}))


def save(path: Path, identity: Identity, denoiser: Denoiser, state: RolloutState, *, seed: int,
         latents: Tensor | None = None) -> None:
    """Write a snapshot, completely or not at all; see `pack` and `write`."""
    write(path, pack(identity, denoiser, state, seed=seed, latents=latents))


def pack(identity: Identity, denoiser: Denoiser, state: RolloutState, *, seed: int, latents: Tensor | None = None,
         copy: bool = False) -> Tree:
    """What a snapshot holds. latents: all generated ones so far [B, C, F, H, W], for who wants the whole video in the end.

    The tensors are those in use; copy: copies in host memory, which stay as they are while the rollout goes on.
    """
    tree: Tree = {"version": VERSION, "identity": {**asdict(identity), "size": list(identity.size)}, "seed": seed,
                  "memories": denoiser.state(), "rollout": state.state()}
    tree |= {} if latents is None else {"latents": latents}
    return copied(tree) if copy else tree


def write(path: Path, packed: Tree) -> None:
    """Raises ForcingError where the file cannot be written; an older one of that name stays then."""
    plain, tensors = split(packed)
    snapshot_file.write(path, json.dumps(plain), tensors)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was read. block: the newest final one. seed: of the run that made it."""

    saved: Saved
    block: Block
    seed: int

    def resume(self, identity: Identity, denoiser: Denoiser, device: torch.device | str = "cpu") -> RolloutState:
        """Fill a denoiser that was not used yet, and give the state for the `resume` of a rollout.

        Raises ForcingError naming what does not fit: another model, size, policy or setting.
        """
        _compare(self.saved.part("identity"), identity)
        denoiser.load(self.saved.part("memories"))
        return RolloutState.load(self.saved.part("rollout"), identity.size, device)

    def latents(self, identity: Identity, frames: int) -> Tensor:
        """All generated latents so far [B, C, frames, H, W]. Raises ForcingError where they were not saved."""
        batch, channels, *size = identity.size
        return self.saved.tensor("latents", (batch, channels, frames, *size))


def load(path: Path) -> Snapshot:
    """Read a snapshot. Raises ForcingError for one that is missing, cut, changed, or of another version."""
    text, tensors = snapshot_file.read(path)
    try:
        saved = Saved(json.loads(text, parse_constant=_refuse), tensors)
    except (ValueError, RecursionError) as error:
        raise ForcingError(f"{path.name} is no snapshot of this program. Choose another file.") from error
    saved.same("version", VERSION, "Use the version of the node pack that wrote it.")
    numbers = saved.part("rollout").integers("block")
    if len(numbers) != 3:
        raise ForcingError(f"{path.name} does not say where it ends. Take an earlier or another snapshot.")
    return Snapshot(saved, Block(*numbers), saved.integer("seed", 0, 1 << 64))


def _compare(saved: Saved, identity: Identity) -> None:
    saved.same("size", list(identity.size), "The latent has another size [batch, channels, height, width]: connect one like "
                                            "that of the first run.")
    part = saved.part("settings")
    for name in ("policy", *sorted(identity.settings)):
        part.same(name, identity.settings.get(name), "Use the cache policy and the settings of the first run (Forcing Cache, "
                                                     "Forcing Preset, Forcing Sampler).")
    if saved.text("model") != identity.model:
        raise ForcingError("The snapshot was made with another model. Load the model of the first run, with the same type of "
                           "weights.")


def _refuse(constant: str) -> None:
    raise ValueError(constant)
