"""What a block costs at minute 1 and at minute 20 of a video, under every policy whose memory is bounded:

    python tests/tools/constant_cost.py [--policy KIND ...] [--json FILE]

Rolls the micro model (64x64 pixels, 16 tokens a latent frame) out for 20.5 minutes, 4920 latent frames, and beside it a
second time for 1.5 minutes; the blocks of half a minute before and behind minute 1 and minute 20 are timed, a few of each
rollout in turn, in seconds of the processor. Takes about a minute of one core a policy. Fails where late blocks cost more
than 10 % more or less than early ones, or the store has other bytes than it had, or than were announced.

A file that is there keeps its rows of other policies.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import quantiles

import bench  # noqa: F401  gives pack and test kit their names
import torch
from forcing_pack.forcing_core.bench import machine
from forcing_pack.forcing_core.micro import bundle
from forcing_testkit.costkit import LONG, MINUTE, Cost, bounded_options, cost

CAPTION = "a red circle moving left on a dark background"
SIZE = (8, 8)  # of the latent
HALF, TOGETHER = MINUTE // 2, 4
MOST = 0.1


def line(cells) -> str:
    return cells[0].ljust(14) + "".join(cell.rjust(18) for cell in cells[1:])


def row(name: str, found: Cost) -> str:
    spread = " / ".join(f"{1000 * (high - low):.1f}" for low, _, high in
                        (quantiles(groups) for groups in (found.early_groups, found.late_groups)))
    cells = (name, f"{1000 * found.early:.2f}", f"{1000 * found.late:.2f}", f"{found.ratio:.3f}", spread,
             f"{sum(found.early_bytes)}", f"{sum(found.late_bytes)}")
    return line(cells) + ("" if passed(found) else "  NOT CONSTANT")


def passed(found: Cost) -> bool:
    return abs(found.ratio - 1) <= MOST and found.constant_bytes


def measured(options, minutes: int, steps: int, prompt: torch.Tensor) -> Cost:
    """Blocks around minute 1 against those around minute `minutes`, of a video half a minute longer than is measured: the
    last blocks of a rolling rollout are made by themselves."""
    return cost(options, bundle.network("student"), prompt, frames=(minutes + 1) * MINUTE, early=HALF,
                late=minutes * MINUTE - HALF, size=SIZE, steps=steps, groups=2 * HALF // (TOGETHER * options.block),
                together=TOGETHER)


def record(options, found: Cost, minutes: int, steps: int) -> dict:
    """A row of the file; seconds are of the processor."""
    seconds = {name: [round(t, 5) for t in times] if isinstance(times, tuple) else round(times, 5)
               for name, times in asdict(found).items() if name.startswith(("early", "late")) and "bytes" not in name}
    return {"options": asdict(options), "minutes": [1, minutes], "steps": steps, "ratio": round(found.ratio, 4),
            "passed": passed(found), **seconds, "early_bytes": found.early_bytes, "late_bytes": found.late_bytes,
            "announced_bytes": found.announced}


def written(rows: dict[str, dict]) -> str:
    """The whole file, a line for every policy."""
    head = {"machine": machine(), "clock": "process_time, one thread", "model": "micro student, 64x64"}
    body = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return json.dumps(head, indent=1)[:-2] + ',\n "policies": {\n' + body + "\n }\n}\n"


def main() -> int:
    known = bounded_options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", choices=known, default=list(known), metavar="KIND", help=", ".join(known))
    parser.add_argument("--steps", type=int, default=4, choices=(1, 2, 3, 4), help="denoising steps of a block (default: 4)")
    parser.add_argument("--minutes", type=int, default=LONG // MINUTE, help="where the late blocks are (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every number")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.json.read_text())["policies"] if args.json and args.json.exists() else {}
    print(line(("policy", "ms/block, min 1", f"ms/block, min {args.minutes}", "ratio", "half lie within",
                "bytes, min 1", f"bytes, min {args.minutes}")), flush=True)
    good, prompt = True, bundle.prompt([CAPTION])
    for name in args.policy:
        found = measured(known[name], args.minutes, args.steps, prompt)
        good &= passed(found)
        print(row(name, found), flush=True)
        rows[name] = record(known[name], found, args.minutes, args.steps)
        if args.json:
            args.json.write_text(written(rows))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
