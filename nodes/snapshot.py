"""Rollouts that write snapshots, and go on from them. Files are in the folder `snapshots` of ComfyUI's output folder."""
from __future__ import annotations

import copy
import logging
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Iterator, Sequence

import comfy.model_management as mm
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..forcing_core import snapshot
from ..forcing_core.errors import ForcingError
from ..forcing_core.files import sweep
from ..forcing_core.plan import Block, Call
from ..forcing_core.rollout import RolloutState, Switch
from ..forcing_core.saved import Saved, Tree, copied
from .common import CATEGORY
from .host_memory import model_fingerprint
from .sampler import CausalSampler

log = logging.getLogger(__name__)
FOLDER, SUFFIX = "snapshots", ".safetensors"
NAME = re.compile(r"[\w%-][\w%. -]{0,99}", re.ASCII)  # a file of this folder, on every system
COUNT = "%block%"


def folder() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def files() -> list[str]:
    """Snapshots that there are, the newest first."""
    found = [path for path in folder().glob(f"*{SUFFIX}") if NAME.fullmatch(path.name)]
    return [path.name for path in sorted(found, key=os.path.getmtime, reverse=True)]


def path_of(name: str) -> Path:
    """Where the snapshot of this name is, or will be. Raises ForcingError for names that lead somewhere else."""
    path = folder() / name
    if not NAME.fullmatch(name) or os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder()):
        raise ForcingError(f"{name!r} is no name of a snapshot. Use letters, digits, spaces and _ - . only.")
    return path


@dataclass(frozen=True)
class Snapshots:
    """name: of the file to write, without its end; "" writes none. every: blocks between two of them, 0 for none.
    on_stop: also write one when the run is stopped. source: file to go on from, "" for none."""

    name: str = ""
    every: int = 0
    on_stop: bool = False
    source: str = ""

    def begin(self, run, seed: int) -> Kept:
        """For a run (`sampler._Run`) that has its denoiser. Raises ForcingError where it cannot go on from the source."""
        if run.options.noise == "reference":
            raise ForcingError("The noise 'reference order' depends on all that was drawn before, so a run cannot be taken up "
                               "in the middle. Set noise to 'per block' in Forcing Sampler.")
        kept = Kept(self, run, seed)
        if self.source:
            kept.open(path_of(self.source))
        return kept


class Kept:
    """What a run needs for its snapshots. state: where it stands; parts: generated latents so far, [B, C, n, H, W] each."""

    def __init__(self, how: Snapshots, run, seed: int):
        options, shape, patcher = run.options, run.shape, run.guider.model_patcher
        self.how, self.seed, self.state, self.parts = how, seed, RolloutState(), []
        self.video, self.denoiser, self.device = run.blocks, run.denoiser, patcher.load_device
        self.identity = snapshot.Identity(
            model_fingerprint(patcher),
            snapshot.settings(options.cache, given=0 if run.given is None else run.given.shape[2],
                              independent_first=options.independent_first, context_timestep=options.context_timestep,
                              **({"knot": asdict(options.knot)} if options.knot.frames else {})),
            (shape.batch, patcher.model.diffusion_model.out_dim, shape.height, shape.width))
        self._waiting: dict | None = None  # a copy of what is to be written if the run is stopped now

    def open(self, path: Path) -> None:
        sweep(path.parent, path.name.__eq__)
        found, blocks = snapshot.load(path), self.video
        if found.block.end >= blocks[-1].end:
            raise ForcingError(f"{path.name} already has {found.block.end} latent frames, and the latent has {blocks[-1].end}. "
                               "Connect a longer latent.")
        self.state = found.resume(self.identity, self.denoiser, self.device)
        next(self.state.left(blocks))  # refuses other blocks
        self._fill(found)
        how = "with the same seed" if found.seed == self.seed else f"as a branch (seed {found.seed} before)"
        log.info("Going on behind latent frame %d of %s, %s.", found.block.end - 1, path.name, how)

    def _fill(self, found: snapshot.Snapshot) -> None:
        if "stream" in found.saved:
            raise ForcingError("This snapshot is of a stream, which keeps no latents. Use Forcing Stream to go on with it.")
        self.parts = [found.latents(self.identity, found.block.end - self.video[0].first).to(self.device)]

    def blocks(self, rollout: Callable[..., Iterator[tuple[Block, Tensor]]]) -> Iterator[tuple[Block, Tensor]]:
        """All blocks of the video: those of the source, then those of the rollout, with snapshots written on the way."""
        if self.parts:
            done = [block for block in self.video if block.index <= self.state.done[0].index]
            yield from zip(done, self.parts[0].split([block.frames for block in done], dim=2))
        try:
            for block, latents in rollout(resume=self.state):
                self.parts.append(latents)
                if self.how.name and torch.isfinite(latents).all():
                    self._after(block)
                yield block, latents
        except (Exception, mm.InterruptProcessingException):
            self._write(self._waiting)
            raise

    def left(self, made: list[Call], switches: Sequence[Switch]) -> tuple[list[Call], list[Switch]]:
        """Which of all forwards and switches are still to come."""
        if self.state.done is None:
            return made, [*switches]
        first = self.state.done[0].first
        last = max(i for i, call in enumerate(made) if call.phase == "noisy" and call.first == first)
        return made[last + 1:], [switch for switch in switches if switch.at > first]

    def _after(self, block: Block) -> None:
        due = self.how.every and (block.index + 1) % self.how.every == 0
        if not due and not self.how.on_stop:
            return
        # a stop comes in the middle of the next block, when the memory is no longer what it is now
        packed = self._packed(copy=self.how.on_stop)
        self._waiting = None if due else packed
        if due:
            self._write(packed)

    def _packed(self, copy: bool) -> dict:
        return snapshot.pack(self.identity, self.denoiser, self.state, seed=self.seed, latents=torch.cat(self.parts, dim=2),
                             copy=copy)

    def _write(self, packed: dict | None) -> None:
        """A snapshot that cannot be written is no reason to lose the video."""
        if packed is None:
            return
        path = path_of(self.how.name.replace(COUNT, str(packed["rollout"]["block"][0] + 1)) + SUFFIX)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            own = re.compile(re.escape(self.how.name).replace(re.escape(COUNT), "[0-9]+") + re.escape(SUFFIX))
            sweep(path.parent, lambda name: own.fullmatch(name) is not None)
            snapshot.write(path, packed)
            log.info("Snapshot: %s", path)
        except (ForcingError, OSError) as error:
            log.error("No snapshot: %s", error)


@dataclass(frozen=True)
class StreamSnapshots:
    """Those of a stream. state: of its `streaming.recorder.Recorder`, with all blocks so far written; load: called with the
    saved part of a stream that is gone on with, and the index of its last block."""

    how: Snapshots
    state: Callable[[], Tree]
    load: Callable[[Saved, int], None]

    def begin(self, run, seed: int) -> StreamKept:
        kept = StreamKept(self, run, seed)
        if self.how.source:
            kept.open(path_of(self.how.source))
        return kept


class StreamKept(Kept):
    """Snapshots that hold no latents of the past, but the decoder, the log, and the frames that may not be on the disk. They
    are taken when a block has been written to the file."""

    def __init__(self, streams: StreamSnapshots, run, seed: int):
        super().__init__(streams.how, run, seed)
        self.streams = streams

    def _fill(self, found: snapshot.Snapshot) -> None:
        if "stream" not in found.saved:
            raise ForcingError("This snapshot is of a clip with all its latents. Use Sampler Custom Advanced to go on with it, "
                               "or choose a snapshot of a stream.")
        begun = [self.state.done[0], *self.state.in_work]
        self.streams.load(found.saved.part("stream"), max(block.index for block in begun))

    def blocks(self, rollout: Callable[..., Iterator[tuple[Block, Tensor]]]) -> Iterator[tuple[Block, Tensor]]:
        try:
            for block, latents in rollout(resume=self.state):
                yield block, latents
                if self.how.name:
                    self._after(block)
        except (Exception, mm.InterruptProcessingException, GeneratorExit):  # the last: decoding or writing a block failed
            self._write(self._waiting)
            raise

    def stopped(self) -> None:
        """The user ends the run between two blocks."""
        if self.how.name and self.how.on_stop and self.state.done is not None:
            self._write(self._packed(copy=False))

    def _packed(self, copy: bool) -> dict:
        packed = snapshot.pack(self.identity, self.denoiser, self.state, seed=self.seed)
        packed |= {"stream": self.streams.state()}
        return copied(packed) if copy else packed


def changed(sampler, **how) -> CausalSampler:
    """A SAMPLER like this one, with these of its `Snapshots` changed. Raises ForcingError for samplers of others."""
    if not isinstance(sampler, CausalSampler):
        raise ForcingError("Only a causal rollout can be saved and gone on with. Connect the SAMPLER of Forcing Preset or "
                           "Forcing Sampler.")
    made = copy.copy(sampler)
    made.snapshots = replace(sampler.snapshots or Snapshots(), **how)
    return made


class ForcingSnapshot(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingSnapshot",
            display_name="Forcing Snapshot",
            category=CATEGORY,
            description="Saves the state of a causal rollout to a file while it runs: latents, memory and place in the prompt "
                        "track; of a stream also decoder and log. Forcing Resume goes on from there.",
            search_aliases=["save state", "checkpoint", "pause"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="From Forcing Preset or Forcing Sampler."),
                io.String.Input("name", default="forcing",
                                tooltip="File name in output/snapshots. The same file is replaced each time; with %block% in "
                                        "the name every snapshot is kept, and any of them can be branched from."),
                io.Int.Input("every", default=8, min=0, max=10000,
                             tooltip="Blocks between two snapshots. A file is as large as the memory of the run, so rare ones "
                                     "cost less time. 0: only when the run is stopped."),
                io.Boolean.Input("on_stop", default=False,
                                 tooltip="Also write one on Cancel and on errors, of the last finished block. For that, a copy "
                                         "of the memory is made in main memory after every block."),
            ],
            outputs=[io.Sampler.Output(tooltip="The same rollout, which also writes snapshots.")],
        )

    @classmethod
    def execute(cls, sampler, name, every, on_stop) -> io.NodeOutput:
        path_of(name.replace(COUNT, "1") + SUFFIX)
        return io.NodeOutput(changed(sampler, name=name, every=every, on_stop=on_stop))


class ForcingResume(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingResume",
            display_name="Forcing Resume",
            category=CATEGORY,
            description="Goes on from a snapshot, exactly as if the run had never stopped, or as a branch with another seed or "
                        "prompt. The latent says how long the whole video becomes.",
            search_aliases=["load state", "continue", "branch"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="The SAMPLER of the first run: same system, same cache."),
                io.Combo.Input("snapshot", options=files(),
                               tooltip="A file of output/snapshots, the newest first. Press R to see new ones."),
                io.Latent.Input("after", optional=True,
                                tooltip="Only waits: connect the run of the same workflow that writes the snapshot, so that it "
                                        "comes first."),
            ],
            outputs=[io.Sampler.Output(tooltip="A rollout that starts with what the snapshot holds.")],
        )

    @classmethod
    def validate_inputs(cls, snapshot):
        """The file may be one that this workflow is about to write; `execute` looks for it."""
        return True

    @classmethod
    def fingerprint_inputs(cls, snapshot, **inputs):
        """A file that was written again is another one."""
        path = path_of(snapshot)
        return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None

    @classmethod
    def execute(cls, sampler, snapshot, after=None) -> io.NodeOutput:
        if not path_of(snapshot).is_file():
            raise ForcingError(f"There is no snapshot {snapshot}. Choose one that exists.")
        return io.NodeOutput(changed(sampler, source=snapshot))
