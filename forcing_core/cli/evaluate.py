"""evaluate: what the micro model makes of captions it was never shown, under several settings."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..bench.timing import machine, write_json
from ..errors import ForcingError
from ..evaluate import ablations, plots, portrait
from ..evaluate.run import CAPTIONS, QUICK_CAPTIONS, SECONDS, Options, Progress, Results, evaluate, load, report, strict
from ..evaluate.settings import ALL, QUICK, USUAL, choose
from ..evaluate.tables import result_lines, setting_lines, verdict_lines
from ..media import check_writers
from ..micro.portrait import FILE
from ..micro.portrait import load as load_portrait
from .demo import INTERRUPTED, stop_on_interrupt

HELP = ("Make videos of captions with the micro model under several settings (networks and memories) and measure them "
        "from their pixels. Everything is seeded. Ctrl-C keeps the rows that are finished.")
BAR = 24
PORTRAIT_SECONDS, QUICK_SECONDS, PEOPLE = 120.0, 10.0, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    counts = ", ".join(f"{count}" for _, count in CAPTIONS)
    add("--seconds", type=float, nargs="+", metavar="S",
        help=f"lengths of the videos (default: {' '.join(f'{s:g}' for s in SECONDS)}; with --quick the first)")
    add("--settings", nargs="+", metavar="NAME", help=f"what to compare, or {ALL} (default: every one that is not slow)")
    add("--captions", type=int, metavar="N",
        help=f"clips of each setting (default: {counts} for videos up to 10 s, up to 60 s, longer)")
    add("--seed", type=int, default=0, help="seed of captions and noise (default: 0)")
    add("--quick", action="store_true", help=f"{QUICK_CAPTIONS} captions, 5 s, {len(QUICK)} settings: under a minute")
    add("--ablations", action="store_true", help="compare what the papers claim: does each direction hold here?")
    add("--json", type=Path, metavar="FILE", help="write every number there; updated after every row")
    add("--out", type=Path, metavar="DIR", help="folder for the plots: sheet.png, drift.png, accuracy.png")
    add("--weights", type=Path, metavar="DIR", help="folder of other weights (default: those of the package)")
    add("--portrait", action="store_true", help=f"measure the micro portrait instead, with and without the parts of Knot "
        f"Forcing ({PORTRAIT_SECONDS:g} s, {PEOPLE} people unless --seconds and --captions say otherwise)")
    add("--list", action="store_true", help="list the settings and stop")


def options_of(args: argparse.Namespace) -> Options:
    """What the arguments ask for. ForcingError for unknown settings, lengths and numbers that cannot be made."""
    names = [*(args.settings or ()), *(ablations.SETTINGS if args.ablations else ())]
    short = args.quick and not args.ablations  # the claims are about videos longer than those of the training
    seconds = args.seconds or (SECONDS[:1] if short else SECONDS)
    captions = QUICK_CAPTIONS if args.captions is None and args.quick else args.captions
    return Options(choose(names or (QUICK if args.quick else USUAL)), tuple(seconds), captions, args.seed)


def check_places(args: argparse.Namespace) -> None:
    """Complain about places that cannot be written to before the first minute is spent, and make the folder of plots."""
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ForcingError(f"{args.json} cannot be written: it is a folder, or its folder does not exist. "
                           "Choose a file in an existing folder.")
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ForcingError(f"The folder {args.out} cannot be made: {error.strerror}. Choose another one.") from error


class Line:
    """Progress on one line of a terminal, or where there is none a line for every finished video."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()

    def show(self, progress: Progress) -> None:
        done = progress.block == progress.blocks
        full = round(BAR * progress.block / progress.blocks)
        text = (f"{progress.run} of {progress.runs}  [{'#' * full}{'.' * (BAR - full)}]  {progress.setting}, "
                f"{progress.seconds:g} s, {progress.part}")
        if self.live:
            self.stream.write("\r\x1b[K" + text)
            self.stream.flush()
        elif done:
            print(text, file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """A step of something that has no blocks to count."""
        self.stream.write(f"\r\x1b[K{text}" if self.live else f"{text}\n")
        self.stream.flush()

    def end(self) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def run(args: argparse.Namespace) -> int:
    if args.list:
        print("\n".join(setting_lines(USUAL)))
        return 0
    check_writers()
    if args.portrait:
        return run_portrait(args)
    options = options_of(args)
    check_places(args)
    models, info, line = load(args.weights, options.settings), machine(), Line()

    def save(results: Results) -> None:
        if args.json is not None:
            verdicts = [verdict.record() for verdict in ablations.verdicts(results.rows)] if args.ablations else []
            write_json(args.json, report(options, models, results, info, verdicts))

    with stop_on_interrupt() as pressed:
        results = evaluate(options, models, stop=pressed, progress=line.show, finished=save)
    line.end()
    save(results)
    return _finish(args, options, results)


def run_portrait(args: argparse.Namespace) -> int:
    if args.settings or args.ablations or len(args.seconds or ()) > 1:
        raise ForcingError("--portrait has ways of its own and one length. Leave out --settings and --ablations, and give one "
                           "number of seconds.")
    check_places(args)
    line = Line()
    chosen = load_portrait(*([args.weights / FILE] if args.weights else []))
    seconds, = args.seconds or [QUICK_SECONDS if args.quick else PORTRAIT_SECONDS]
    result = portrait.evaluate(chosen, seconds, args.captions or PEOPLE, args.seed, line.say)
    line.end()
    if args.json is not None:
        told = {key: value for key, value in result.items() if key != "pictures"}
        write_json(args.json, strict(told | {"machine": machine()}))
    print("\n".join([*portrait.lines(result), *map(str, portrait.write(result, args.out) if args.out else ())]))
    return 0


def _finish(args: argparse.Namespace, options: Options, results: Results) -> int:
    lines = result_lines(options, results)
    if args.ablations:
        lines += ["", *verdict_lines(ablations.verdicts(results.rows))]
    if results.stopped:
        lines.append(f"Stopped after {len(results.rows)} of {len(options.settings) * len(options.seconds)} rows.")
    if args.out is not None:
        lines += [str(path) for path in plots.write(options, results, args.out)]
    print("\n".join(lines))
    return INTERRUPTED if results.stopped else 0 if results.rows else 1
