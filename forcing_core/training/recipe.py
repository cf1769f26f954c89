"""The stages of the micro model in their order, and the recipe that runs all of them into one folder.

Every stage leaves NAME.checkpoint.pt, micro_NAME.safetensors and NAME_report.json. A stage whose weights are there is
finished; one with a checkpoint goes on from it.
"""
from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Callable, Mapping

import torch

from ..errors import ForcingError
from ..media import save_png
from ..micro.code import of_world
from ..micro.live import NETWORKS, read
from . import distil, dit, live, live_compare, network, portrait, robust, student, vae
from .loop import Stage, train
from .plot import picture
from .state import load_checkpoint, write_whole

CUDA_BATCH = 32
MINUTES = 480.0  # of the whole recipe, on a CPU
PLAN, PLOT = "micro.json", "loss.png"
Show = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """A run of one stage or of all. given: settings that replace the usual ones. start, teacher: weights that a later
    stage starts from; None: those in `out`."""

    out: Path
    device: str = "cpu"
    minutes: float | None = None
    quick: bool = False
    resume: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)
    start: Path | None = None
    teacher: Path | None = None


@dataclass(frozen=True)
class Row:
    """kind: trainer; settings: quick -> usual settings; share: of the recipe's minutes, 0 for a stage that is no part of it;
    after: stage whose weights it starts from; finish: writes weights and report; begin: starts from weights."""

    kind: Any
    settings: Callable[[bool], Any]
    share: float
    after: str | None = None
    finish: Callable[[Any, Path, dict[str, Any]], dict[str, Any]] = network.finish
    begin: Callable[..., Stage] = distil.begin


STAGES = {
    "vae": Row(vae.VaeTrainer, lambda quick: vae.QUICK if quick else vae.VaeSettings(), 0.15, finish=vae.finish),
    "teacher": Row(dit.DitTrainer, lambda quick: dit.QUICK if quick else dit.DitSettings(), 0.45),
    "resampled": Row(robust.ResampledTrainer,
                     lambda quick: robust.QUICK if quick else robust.ResampledSettings(), 0.0, "teacher"),
    "consistency": Row(distil.ConsistencyTrainer,
                       lambda quick: distil.QUICK if quick else distil.ConsistencySettings(), 0.05, "teacher"),
    "student": Row(student.StudentTrainer,
                   lambda quick: student.QUICK if quick else student.StudentSettings(), 0.2, "teacher"),
    "long": Row(student.LongTrainer,
                lambda quick: student.LONG_QUICK if quick else student.LongSettings(), 0.15, "student"),
    "portrait": Row(portrait.PortraitTrainer,
                    lambda quick: portrait.QUICK if quick else portrait.PortraitSettings(), 0.0, finish=portrait.finish),
    "live_base": Row(live.LiveTrainer, lambda quick: live.QUICK if quick else live.LiveSettings(), 0.0),
    "live_plain": Row(live.PlainTrainer, lambda quick: live.LATER_QUICK if quick else live.LaterSettings(), 0.0, "live_base",
                      begin=live.begin),
    "live_cycle": Row(live.CycleTrainer, lambda quick: live.LATER_QUICK if quick else live.LaterSettings(), 0.0, "live_base",
                      begin=live.begin),
}
LIVE = ("live_base", "live_plain", "live_cycle")


def weights(name: str, out: Path) -> Path:
    return out / f"micro_{name}.safetensors"


def checkpoint(name: str, out: Path) -> Path:
    return out / f"{name}.checkpoint.pt"


def folder(out: Path) -> None:
    """Make the folder. Raises ForcingError where that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ForcingError(f"The folder {out} cannot be made: {error.strerror}. Choose another one.") from error


def trainer(name: str, request: Request, show: Show) -> Stage:
    """A stage as it stands: from its checkpoint, or at its beginning.

    Raises ForcingError for a checkpoint that nobody asked to go on from, and for settings it does not have.
    """
    row, file = STAGES[name], checkpoint(name, request.out)
    unknown = request.given.keys() - {setting.name for setting in fields(row.kind.settings_type)}
    if unknown:
        raise ForcingError(f"Stage {name} has no setting {', '.join(sorted(unknown))}. It has "
                           f"{', '.join(setting.name for setting in fields(row.kind.settings_type))}.")
    if not file.exists():
        return _begin(row, request, show)
    if not request.resume:
        raise ForcingError(f"{file} is from an earlier run. Add --resume to go on with it, or choose another folder.")
    state = load_checkpoint(file, request.device)
    for key, value in request.given.items():
        if (there := state["settings"].get(key, value)) != value:
            raise ForcingError(f"The run in {request.out} has {key} {there}, not {value}. Leave out --{key}, or "
                               "choose another folder.")
    going = row.kind.from_state_dict(state, request.device, request.minutes)
    show(f"going on after {going.clock.total} steps")
    return going


def _begin(row: Row, request: Request, show: Show) -> Stage:
    settings = row.settings(request.quick)
    if request.device.startswith("cuda") and not request.quick:
        settings = replace(settings, batch=CUDA_BATCH)
    settings = replace(settings, minutes=request.minutes, **request.given)
    show("computing the linear code")
    if row.after is None:
        return row.kind(settings, request.device)
    start = request.start or weights(row.after, request.out)
    teacher = request.teacher or start.with_name(weights("teacher", start).name)
    return row.begin(row.kind, settings, start, teacher, request.device)


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}


def run(name: str, request: Request, show: Show, stop: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
    """Train one stage to its end and write its files: its report, or None where `stop` ended it before.

    show: gets a line every few seconds.
    """
    begin = time.perf_counter()
    folder(request.out)
    stage = trainer(name, request, show)
    stage.prepare()
    if not train(stage, checkpoint(name, request.out), lambda progress: show(line(progress)), stop):
        return None
    show("writing the weights")
    facts = {**machine(request.device), "seconds": round(time.perf_counter() - begin, 1)}
    return STAGES[name].finish(stage, request.out, facts)


def line(progress: Any) -> str:
    """A trainer's progress in a line."""
    left = progress.seconds_left
    return str(progress) + ("" if left is None else f"  {int(left) // 60}:{int(left) % 60:02d} left")


@dataclass(frozen=True)
class Plan:
    """What a run of all stages was begun with, so that it goes on with it."""

    minutes: float | None
    quick: bool
    seed: int


def plan(request: Request) -> Plan:
    """The plan of a new run, written to the folder, or that of the run that goes on.

    Raises ForcingError for a run that nobody asked to go on with, and for another seed or size than it has.
    """
    file = request.out / PLAN
    if not file.exists():
        minutes = request.minutes if request.quick else request.minutes or MINUTES
        made = Plan(minutes, request.quick, request.given.get("seed", 0))
    elif not request.resume:
        raise ForcingError(f"{file} is from an earlier run. Add --resume to go on with it, or choose another folder.")
    else:
        made = Plan(**json.loads(file.read_text()))
        if request.given.get("seed", made.seed) != made.seed or request.quick > made.quick:
            raise ForcingError(f"The run in {request.out} has seed {made.seed}{' and is a quick one' * made.quick}. "
                               "Leave out --seed and --quick, or choose another folder.")
        made = replace(made, minutes=request.minutes or made.minutes)
    write_whole(file, (json.dumps(asdict(made)) + "\n").encode())
    return made


def run_all(request: Request, show: Show, stop: Callable[[], bool] = lambda: False) -> bool:
    """Run every stage that is not finished, then draw the losses; False where `stop` ended it before."""
    folder(request.out)
    whole = plan(request)
    for name, row in STAGES.items():
        if not row.share or weights(name, request.out).exists():
            continue
        minutes = None if whole.minutes is None else whole.minutes * row.share
        part = replace(request, minutes=minutes, quick=whole.quick, resume=True, given={"seed": whole.seed})
        if run(name, part, lambda text, name=name: show(f"{name}: {text}"), stop) is None:
            return False
    save_png(picture(losses(request.out)), request.out / PLOT)
    return True


def run_live(request: Request, show: Show, stop: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
    """Train LIVE in small with and without cycle consistency, those stages that are not finished, then compare them: the rows
    of `live_compare.compare`, or None where `stop` ended it before. minutes: of the first stage; the other two always have a
    number of steps, because what they are compared by is an equal one."""
    folder(request.out)
    for name in LIVE:
        if weights(name, request.out).exists():
            continue
        part = replace(request, minutes=request.minutes if name == LIVE[0] else None, resume=True)
        if run(name, part, lambda text, name=name: show(f"{name}: {text}"), stop) is None:
            return None
    nets = {name: read(weights(name, request.out)) for name in NETWORKS}
    options = live_compare.QUICK if request.quick else live_compare.Options()
    return live_compare.compare(nets, of_world(live.LiveSettings.code_clips), request.out, options, show)


def losses(out: Path) -> dict[str, Mapping[str, list[list[float]]]]:
    """Stage -> its losses, of the reports in a folder."""
    files = {name: out / f"{name}_report.json" for name in STAGES}
    return {name: json.loads(file.read_text()).get("losses", {}) for name, file in files.items() if file.exists()}
