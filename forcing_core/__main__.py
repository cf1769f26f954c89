"""Command line: python -m forcing_core COMMAND. Only the module of the chosen command is imported."""
from __future__ import annotations

import argparse
import importlib
import logging
import sys

from .errors import ForcingError

# Command -> its module and its line in --help, which must not need PyTorch.
COMMANDS = {
    "demo": (".cli.demo", "make a short video with the embedded model"),
    "parity": (".cli.parity", "compare with recorded results of the published pipelines"),
    "bench": (".cli.bench", "measure speed and memory on this machine"),
    "evaluate": (".cli.evaluate", "measure the micro model from the pixels of its videos"),
    "recall": (".cli.recall", "measure how much attention the sparse methods keep, on the micro model"),
    "train": (".cli.train", "train the micro models"),
    "parallel": (".cli.parallel", "make a video with several GPUs, or many videos at once"),
    "presets": (".cli.presets", "list the published systems and how they are run"),
    "fetch": (".cli.fetch", "download the weights of a preset"),
    "convert": (".cli.convert", "turn a published checkpoint into one plain safetensors file"),
}
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status (0, 1 for a problem told in one line, 130 for Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(_chosen(argv)).parse_args(argv)
        logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
        return args.run(args) or 0
    except ForcingError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


def _chosen(argv: list[str]) -> str | None:
    return next((word for word in argv if word in COMMANDS), None)


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="forcing", description="Autoregressive video on Wan 2.1.")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell more about what happens")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, (module_name, line) in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=line)
            continue
        module = _module(name, module_name)
        command = commands.add_parser(name, help=line, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _module(name: str, module_name: str):
    try:
        return importlib.import_module(module_name, __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__):
            raise  # a broken installation of our own, where the traceback helps
        raise ForcingError(f"The command {name} needs the Python module {error.name}. "
                           "Install it (see the README) and try again.") from error


if __name__ == "__main__":
    sys.exit(main())
