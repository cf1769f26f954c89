"""train: the micro models, stage by stage or all of them."""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.timing import check_device
from ..errors import ForcingError
from ..training import distil, dit, live, live_compare, portrait, recipe, robust, student, vae
from .demo import INTERRUPTED, stop_on_interrupt

HELP = "Train the small models of this repository on the world that it generates. Every stage can be resumed."
PATHS = {"from": ("start", "weights to start from (default: those of the stage before, in --out)"),
         "teacher": ("teacher", "weights of the teacher (default: beside those to start from)")}


@dataclass(frozen=True)
class Option:
    """A setting that has a flag of its own. kind: what reads its text."""

    name: str
    help: str
    kind: Any


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time limit: write minutes, for example 5")
    return value


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def setting(text: str) -> tuple[str, Any]:
    """"name=value" -> (name, value), the value a number, true, false, a list or a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting: write NAME=VALUE, for example muon_lr=0.001")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return name, value
    return name, tuple(parsed) if isinstance(parsed, list) else parsed


def _batch(usual: int) -> Option:
    return Option("batch", f"clips a step (default: {usual}, on CUDA {recipe.CUDA_BATCH})", positive)


def _steps(usual: int) -> Option:
    return Option("steps", f"steps of the run (default: {usual})", positive)


def _student(settings: type[student.StudentSettings]) -> tuple[Option, ...]:
    return (_steps(settings.steps), _batch(settings.batch),
            Option("frames", f"latent frames of a rollout (default: {settings.frames})", positive),
            Option("critic_steps", f"steps of the critic to one of the student (default: {settings.critic_steps})",
                   positive),
            Option("guidance", f"of the teacher, 0 for none (default: {settings.guidance})", float),
            Option("real", f"weight of a consistency loss on true clips (default: {settings.real:g})", float))


# stage -> (its line in --help, its options)
COMMANDS = {
    "vae": ("Train the VAE, to which all other stages owe their latents.",
            (Option("dim", "width of the network: 8, 12 or 16 (default: 8)", positive), _batch(vae.VaeSettings.batch))),
    "teacher": ("Train the network with teacher forcing, from which all students start.",
                (Option("dim", f"dim (default: {dit.DitSettings.dim})", positive),
                 Option("layers", f"layers (default: {dit.DitSettings.layers})", positive),
                 _steps(dit.DitSettings.steps), _batch(dit.DitSettings.batch))),
    "resampled": ("Train the teacher on histories with its own errors (Resampling Forcing).",
                  (_steps(robust.ResampledSettings.steps), _batch(robust.ResampledSettings.batch))),
    "consistency": ("Make a few-step student of the teacher, by consistency on true histories.",
                    (_steps(distil.ConsistencySettings.steps), _batch(distil.ConsistencySettings.batch))),
    "student": ("Train the few-step student on its own rollouts (Self Forcing).", _student(student.StudentSettings)),
    "long": ("Train the student on rollouts longer than the teacher's clips (Self-Forcing++).",
             _student(student.LongSettings)),
    "portrait": ("Train the micro portrait: a drawn face from one picture, driven by a puppet.",
                 (_steps(portrait.PortraitSettings.steps), _batch(portrait.PortraitSettings.batch))),
    "live_base": ("Train LIVE in small, a world that keys steer, on true clips.",
                  (_steps(live.LiveSettings.steps), _batch(live.LiveSettings.batch))),
    "live_plain": ("Go on with it, on true clips alone.", (_steps(live.LaterSettings.steps),)),
    "live_cycle": ("Go on with it by cycle consistency: recover the start of its own rollouts.",
                   (_steps(live.LaterSettings.steps),)),
    "micro": ("Run all stages one after the other, and draw their losses.", ()),
    "live": ("Run the three live stages, and compare them after a minute of play.", ()),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages = parser.add_subparsers(title="stages", dest="stage", required=True, metavar="STAGE")
    for name, (line, options) in COMMANDS.items():
        command = stages.add_parser(name, help=line, description=line)
        add = command.add_argument
        add("--out", type=Path, required=True, metavar="DIR", help="folder for checkpoints, weights and reports")
        add("--minutes", type=minutes, metavar="M", help="train for M minutes " + (
            f"in all (default: {recipe.MINUTES:g})" if name == "micro" else "instead of a number of steps"))
        add("--device", default="cpu", help="cpu or cuda (default: cpu)")
        add("--resume", action="store_true", help="go on from the checkpoint in DIR, if there is one")
        add("--quick", action="store_true", help="a few steps of a smaller model, to see that everything works")
        add("--seed", type=int, help="seed of weights and clips (default: 0)")
        for option in options:
            add("--" + option.name.replace("_", "-"), type=option.kind, help=option.help)
        if name in recipe.STAGES:
            add("--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="any other setting")
            if recipe.STAGES[name].after:
                for flag, (attribute, text) in PATHS.items():
                    add("--" + flag, dest=attribute, type=Path, metavar="FILE", help=text)


def show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def request(args: argparse.Namespace) -> recipe.Request:
    """What the command line asks for."""
    names = ("seed", *(option.name for option in COMMANDS[args.stage][1]))
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    given |= dict(getattr(args, "set", ()))
    if args.stage == "teacher" and given.get("dim", 128) % 128:
        raise ForcingError(f"A width of {given['dim']} has no whole heads. Use a multiple of 128.")
    return recipe.Request(args.out, args.device, args.minutes, args.quick, args.resume, given,
                          getattr(args, "start", None), getattr(args, "teacher", None))


def run(args: argparse.Namespace) -> int:
    check_device(args.device)
    asked = request(args)
    with stop_on_interrupt() as stop:
        if args.stage == "micro":
            done = recipe.run_all(asked, show, stop)
            lines = [f"{args.out / recipe.PLOT}: the losses of all stages"]
        elif args.stage == "live":
            rows = recipe.run_live(asked, show, stop)
            done, lines = rows is not None, [] if rows is None else live_compare.table(rows)
        else:
            report = recipe.run(args.stage, asked, show, stop)
            done, lines = report is not None, [] if report is None else summary(report, args.out)
    if not done:
        show(f"stopped; add --resume to go on from what is in {args.out}")
        return INTERRUPTED
    for line in lines:
        print(line)
    return 0


def summary(report: dict[str, Any], out: Path) -> list[str]:
    """What a finished stage is worth telling."""
    lines = [f"{out / report['file']}: {report['file_bytes'] / 2 ** 20:.1f} MiB after {report['steps']} steps"]
    if held_out := report.get("held_out"):
        lines.append(f"held-out psnr {held_out['psnr']:.2f} dB, shapes {held_out['shape_psnr']:.2f} dB (linear code: "
                     f"{held_out['code_psnr']:.2f}, {held_out['code_shape_psnr']:.2f})")
    return lines
