"""demo: a short video from the small model that comes with the package, on this machine."""
from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from pathlib import Path

from ..demo import DemoOptions, Made, Progress, RandomSource, Source, make
from ..errors import ForcingError
from ..micro.bundle import NETWORKS
from ..micro.source import PROMPT, MicroSource
from ..plan_view import format_bytes

HELP = ("Make a short video on the CPU with the small model that comes with the package, without any download. "
        "Ctrl-C keeps what has been made.")
RANDOM = "random"
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.mp4",
                        help="the video; a contact sheet of the same name (.png) is put beside it")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the video (default: 5)")
    parser.add_argument("--prompt", metavar="TEXT",
                        help=f"a colour, a shape, a motion and a background (default: {PROMPT!r})")
    parser.add_argument("--preset", help="run it like this system (default: as the weights were trained; beyond 5 s with a "
                                         "window of 12 latent frames)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--size", metavar="WxH",
                        help="pixels that the network makes, multiples of 16 (default: those it was trained on)")
    parser.add_argument("--weights", choices=[*NETWORKS, RANDOM], default="student",
                        help=f"the network (default: student); {RANDOM}: an untrained one, for abstract coloured noise")


def source_of(args: argparse.Namespace) -> Source:
    """The source that the arguments ask for. Raises ForcingError for a prompt that it cannot follow."""
    if args.weights != RANDOM:
        return MicroSource(PROMPT if args.prompt is None else args.prompt, args.weights)
    if args.prompt is not None:
        raise ForcingError("Random weights follow no prompt. Leave out --prompt, or --weights random.")
    return RandomSource()


def size(text: str | None) -> tuple[int, int] | None:
    """"256x144" -> (256, 144); ForcingError for anything else."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ForcingError(f"{text!r} is not a size. Write width x height in pixels, for example 256x144.")
    return int(sides[0]), int(sides[1])


@contextlib.contextmanager
def stop_on_interrupt():
    """Yield a function that tells whether Ctrl-C was pressed; a second Ctrl-C stops at once."""
    pressed = threading.Event()

    def note(number, frame):
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def show(progress: Progress) -> None:
    print(f"block {progress.block} of {progress.blocks}   {progress.frames} frames   {progress.fps:.1f} fps   "
          f"store {format_bytes(progress.store_bytes)}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    source = source_of(args)
    options = DemoOptions(args.seconds, args.preset, args.seed, size(args.size))
    with stop_on_interrupt() as pressed:
        made = make(args.out, options, source, stop=pressed, progress=show)
    for line in summary(made):
        print(line)
    if made.video is not None:
        print(source.notice)
    return INTERRUPTED if made.stopped else 0


def summary(made: Made) -> list[str]:
    if made.video is None:
        return ["Stopped before the first block was finished: nothing was written."]
    window = "everything" if made.options.window is None else f"window {made.options.window}, sink {made.options.sink}"
    lines = [f"{made.video}: {made.frames} frames in {made.seconds:.1f} s ({made.preset}, {window})",
             f"{made.sheet}: contact sheet"]
    return [f"Stopped after {made.frames} of {made.wanted} frames.", *lines] if made.stopped else lines
