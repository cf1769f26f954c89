"""`parity DIR`: run recorded cases of the official implementations and compare the final latents."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..errors import ForcingError
from ..parity import load_network, read_case, run_case
from ..parity.case import WEIGHTS

HELP = "compare rollouts with recorded cases of the official implementations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of *.safetensors cases and their weights")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case; may be repeated")


def _paths(folder: Path, names: list[str] | None) -> list[Path]:
    if not folder.is_dir():
        raise ForcingError(f"{folder} is not a folder. Give the folder that holds the cases and {WEIGHTS}.")
    if not (folder / WEIGHTS).is_file():
        raise ForcingError(f"{folder} has no {WEIGHTS}. The cases need the network they were recorded with.")
    found = {path.stem: path for path in sorted(folder.glob("*.safetensors")) if path.name != WEIGHTS}
    missing = [name for name in names or () if name not in found]
    if missing or not found:
        raise ForcingError(f"No case {', '.join(missing) or 'at all'} in {folder}. "
                           f"Cases there: {', '.join(found) or 'none'}.")
    return [found[name] for name in names] if names else list(found.values())


def _line(path: Path, net) -> tuple[bool, str]:
    try:
        r = run_case(read_case(path), net)
    except ForcingError as error:
        return False, f"FAIL {path.stem:28} {error}"
    verdict = "ok  " if r.passed else "FAIL"
    return r.passed, (f"{verdict} {r.name:28} rel_l2 {r.rel_l2:.1e} (<= {r.limit_rel:.0e})  max_abs {r.max_abs:.1e} "
                      f"(<= {r.limit_abs:.0e})  forwards {r.forwards} (expected {r.expected}, reference {r.reference})"
                      f"  {r.seconds:.1f} s")


def run(args: argparse.Namespace) -> int:
    paths = _paths(args.folder, args.case)
    torch.backends.cudnn.allow_tf32 = False  # the cases are float32; TF32 convolutions are not
    net = load_network(args.folder, args.device)
    failed = []
    for number, path in enumerate(paths, 1):
        if sys.stderr.isatty():
            print(f"[{number}/{len(paths)}] {path.stem}", end="\r", file=sys.stderr, flush=True)
        passed, line = _line(path, net)
        print(line, flush=True)
        if not passed:
            failed.append(path.stem)
    names = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{len(paths) - len(failed)} of {len(paths)} cases pass{names}")
    return 1 if failed else 0
