"""train: the micro models, stage by stage."""
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import torch

from ..bench.timing import check_device
from ..errors import ForcingError
from ..training import dit, vae
from ..training.loop import train
from ..training.state import load_checkpoint
from .demo import INTERRUPTED, stop_on_interrupt

HELP = "Train the small models of this repository on the world that it generates. Every stage can be resumed."
CUDA_BATCH = 32


@dataclass(frozen=True)
class Stage:
    """help: its line in --help; add_arguments: what only this stage takes; run: args -> exit status."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages = parser.add_subparsers(title="stages", dest="stage", required=True, metavar="STAGE")
    for name, stage in STAGES.items():
        command = stages.add_parser(name, help=stage.help, description=stage.help)
        add = command.add_argument
        add("--out", type=Path, required=True, metavar="DIR", help="folder for checkpoint, weights and report")
        add("--minutes", type=minutes, metavar="M", help="train for M minutes instead of a number of steps")
        add("--device", default="cpu", help="cpu or cuda (default: cpu)")
        add("--resume", action="store_true", help="go on from the checkpoint in DIR, if there is one")
        add("--quick", action="store_true", help="a few steps of a smaller model, to see that everything works")
        add("--seed", type=int, help="seed of weights and clips (default: 0)")
        stage.add_arguments(command)


def run(args: argparse.Namespace) -> int:
    return STAGES[args.stage].run(args)


def show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare(args: argparse.Namespace, checkpoint: str) -> dict[str, Any] | None:
    """Make the folder; the checkpoint to go on from, or None. Raises ForcingError where one would be lost."""
    check_device(args.device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ForcingError(f"The folder {args.out} cannot be made: {error.strerror}. Choose another one.") from error
    path = args.out / checkpoint
    if not path.exists():
        return None
    if not args.resume:
        raise ForcingError(f"{path} is from an earlier run. Add --resume to go on with it, or choose another folder.")
    return load_checkpoint(path, args.device)


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}


# --- vae

def _vae_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dim", type=positive, help="width of the network: 8, 12 or 16 (default: 12)")
    parser.add_argument("--batch", type=positive, help=f"clips a step (default: 4, on CUDA {CUDA_BATCH})")


def _vae_trainer(args: argparse.Namespace) -> vae.VaeTrainer:
    given = {name: value for name in ("dim", "batch", "seed") if (value := getattr(args, name)) is not None}
    if state := prepare(args, vae.CHECKPOINT):
        for name, value in given.items():
            if state["settings"][name] != value:
                raise ForcingError(f"The run in {args.out} has {name} {state['settings'][name]}, not {value}. Leave "
                                   f"out --{name}, or choose another folder.")
        trainer = vae.VaeTrainer.from_state_dict(state, args.device, args.minutes)
        show(f"going on after {trainer.clock.total} steps")
        return trainer
    settings = vae.QUICK if args.quick else vae.VaeSettings()
    if args.device.startswith("cuda") and not args.quick:
        settings = replace(settings, batch=CUDA_BATCH)
    show("computing the linear code")
    return vae.VaeTrainer(replace(settings, minutes=args.minutes, **given), args.device)


def _vae_line(progress: vae.Progress) -> str:
    left = progress.seconds_left
    left = "" if left is None else f"  {int(left) // 60}:{int(left) % 60:02d} left"
    return (f"{progress.phase}  step {progress.step}  loss {progress.loss:.4f}  psnr {progress.psnr:.1f} dB  "
            f"shapes {progress.shape_psnr:.1f} dB  {progress.seconds_per_step:.3f} s/step{left}")


def _run_vae(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    torch.backends.cudnn.benchmark = args.device.startswith("cuda")
    trainer = _vae_trainer(args)
    trainer.layout = vae.faster_layout(trainer) if not trainer.done else trainer.layout
    with stop_on_interrupt() as stop:
        done = train(trainer, args.out / vae.CHECKPOINT, lambda progress: show(_vae_line(progress)), stop)
    if not done:
        show(f"stopped; add --resume to go on from {args.out / vae.CHECKPOINT}")
        return INTERRUPTED
    show("measuring on held-out clips")
    report = vae.finish(trainer, args.out, {**machine(args.device), "layout": trainer.layout,
                                            "seconds": round(time.perf_counter() - begin, 1)})
    held_out = report["held_out"]
    print(f"{args.out / vae.WEIGHTS}: {report['file_bytes'] / 2 ** 20:.1f} MiB, held-out psnr {held_out['psnr']:.2f} "
          f"dB, shapes {held_out['shape_psnr']:.2f} dB (linear code: {held_out['code_psnr']:.2f}, "
          f"{held_out['code_shape_psnr']:.2f})")
    return 0


# --- teacher

def _dit_arguments(parser: argparse.ArgumentParser) -> None:
    for name, usual in (("dim", dit.DitSettings.dim), ("layers", dit.DitSettings.layers), ("steps", dit.DitSettings.steps)):
        parser.add_argument(f"--{name}", type=positive, help=f"{name} (default: {usual})")
    parser.add_argument("--batch", type=positive, help=f"clips a step (default: 8, on CUDA {CUDA_BATCH})")


def _dit_trainer(args: argparse.Namespace) -> dit.DitTrainer:
    if state := prepare(args, dit.CHECKPOINT):
        trainer = dit.DitTrainer.from_state_dict(state, args.device, args.minutes)
        show(f"going on after {trainer.clock.total} steps")
        return trainer
    settings = dit.QUICK if args.quick else dit.DitSettings()
    if args.device.startswith("cuda") and not args.quick:
        settings = replace(settings, batch=CUDA_BATCH)
    names = ("dim", "layers", "steps", "batch", "seed")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if given.get("dim", 128) % 128:
        raise ForcingError(f"A width of {given['dim']} has no whole heads. Use a multiple of 128.")
    show("computing the linear code")
    return dit.DitTrainer(replace(settings, minutes=args.minutes, **given), args.device)


def _dit_line(progress: dit.Progress) -> str:
    left = progress.seconds_left
    left = "" if left is None else f"  {int(left) // 60}:{int(left) % 60:02d} left"
    return f"{progress.phase}  step {progress.step}  loss {progress.loss:.4f}  {progress.seconds_per_step:.3f} s/step{left}"


def _run_dit(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    trainer = _dit_trainer(args)
    with stop_on_interrupt() as stop:
        done = train(trainer, args.out / dit.CHECKPOINT, lambda progress: show(_dit_line(progress)), stop)
    if not done:
        show(f"stopped; add --resume to go on from {args.out / dit.CHECKPOINT}")
        return INTERRUPTED
    report = dit.finish(trainer, args.out, {**machine(args.device), "seconds": round(time.perf_counter() - begin, 1)})
    print(f"{args.out / dit.WEIGHTS}: {report['file_bytes'] / 2 ** 20:.1f} MiB after {report['steps']} steps")
    return 0


STAGES = {
    "vae": Stage("Train the VAE, to which all other stages owe their latents.", _vae_arguments, _run_vae),
    "teacher": Stage("Train the network with teacher forcing, from which all students start.", _dit_arguments, _run_dit),
}
