"""recall: how much of dense attention the sparse methods keep, on the micro model, beside the papers' figures."""
from __future__ import annotations

import argparse
from pathlib import Path

from ..bench.timing import machine, write_json
from ..errors import ForcingError
from ..sparse import recall

HELP = ("Make clips with the micro model and dense attention, and ask every sparse method what it would have chosen: the part "
        "of the attention mass that falls on it, at the densities of the papers. Everything is seeded.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--frames", type=int, default=21, help="latent frames of a clip, whole blocks of 3 (default: 21)")
    add("--captions", type=int, default=4, metavar="N", help="clips (default: 4)")
    add("--seed", type=int, default=0, help="seed of captions and noise (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write every number there")


def run(args: argparse.Namespace) -> int:
    if args.captions < 1 or args.frames < 1:
        raise ForcingError(f"{args.captions} clips of {args.frames} latent frames measure nothing. Use at least 1 of each.")
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ForcingError(f"{args.json} cannot be written: it is a folder, or its folder does not exist. Choose a file in an "
                           "existing folder.")
    records = recall.measure(recall.ROWS, frames=args.frames, captions=args.captions, seed=args.seed)
    if args.json is not None:
        write_json(args.json, {"machine": machine(), "network": f"micro {recall.NETWORK}", "frames": args.frames,
                               "captions": args.captions, "seed": args.seed, "methods": records})
    print("\n".join(recall.table(records)))
    return 0
