"""What a block costs at minute 1 and at minute 20 of a video, under every policy whose memory is bounded:

    python tests/tools/constant_cost.py [--policy KIND ...] [--json FILE]

Rolls a network of the micro models' shape (random weights, 16 tokens a frame) out for 20 minutes, 4800 latent frames, and
beside it a second time for one minute; the last blocks of both are timed in turn. Takes about two minutes a policy on an
idle core. Fails where a late block takes more than 10 % longer, or the store is larger.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import bench  # noqa: F401  gives pack and test kit their names
import torch
from forcing_pack.forcing_core.wan import WanConfig
from forcing_testkit.costkit import LONG, MINUTE, Cost, bounded_options, cost

CONFIG = WanConfig(dim=128, ffn_dim=512, heads=1, layers=6, in_channels=16, out_channels=16, freq_dim=128, text_dim=64,
                   text_len=16)
SIZE = (8, 8)
MOST = 1.1


def row(name: str, found: Cost) -> str:
    cells = (name, f"{1000 * found.early:.2f}", f"{1000 * found.late:.2f}", f"{found.ratio:.3f}",
             f"{sum(found.early_bytes)}", f"{sum(found.late_bytes)}")
    return line(cells) + ("" if passed(found) else "  TOO MUCH")


def line(cells) -> str:
    return cells[0].ljust(14) + "".join(cell.rjust(17) for cell in cells[1:])


def passed(found: Cost) -> bool:
    return found.ratio <= MOST and found.early_bytes == found.late_bytes


def main() -> int:
    known = bounded_options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", choices=known, default=list(known), metavar="KIND", help=", ".join(known))
    parser.add_argument("--steps", type=int, default=4, choices=(1, 2, 3, 4), help="denoising steps of a block (default: 4)")
    parser.add_argument("--blocks", type=int, default=20, help="blocks whose median counts (default: 20)")
    parser.add_argument("--minutes", type=int, default=LONG // MINUTE, help="length of the video (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every number")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(line(("policy", "ms/block, min 1", f"ms/block, min {args.minutes}", "ratio", "bytes, min 1",
                f"bytes, min {args.minutes}")), flush=True)
    results = {}
    for name in args.policy:
        late = args.minutes * MINUTE
        results[name] = cost(known[name], CONFIG, frames=late + MINUTE, early=MINUTE, late=late, size=SIZE, steps=args.steps,
                             blocks=args.blocks)  # a minute longer: the last blocks of a rolling rollout are made by themselves
        print(row(name, results[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({name: asdict(found) for name, found in results.items()}, indent=1) + "\n")
    return 0 if all(map(passed, results.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
