"""bench: time rollouts of a random network on this machine, and compare with ComfyUI's own sampler."""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..bench.compare import load_compare, run_compare
from ..bench.timing import DTYPES, Case, Setup, Timing, check_device, early_late, machine, measure, record, write_json
from ..errors import ForcingError
from ..plan_view import format_bytes
from ..presets import get
from ..wan import WanConfig
from .demo import size

HELP = ("Time whole rollouts of a network with random weights: blocks early and late in a video, and the bytes of "
        "the store. Numbers are medians; run it on an idle machine.")

TINY = WanConfig(dim=256, ffn_dim=512, heads=2, layers=2, text_dim=64, text_len=64)
# name -> (network, usual size in pixels, usual dtype)
MODELS = {"tiny": (TINY, (128, 128), "float32"), "1.3b": (WanConfig(), (832, 480), "bfloat16")}
RUNS, COMPARE_RUNS = 3, 10
SHORT = 21  # latent frames: the training length of most systems
HEAD_DIM = 128


def window(text: str) -> int | None:
    """"12" -> 12, "all" -> None."""
    if text == "all":
        return None
    if not text.isdecimal() or text == "0":
        raise argparse.ArgumentTypeError(f"{text!r} is not a window: write a number of latent frames, or all")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", type=Path, required=True, metavar="FILE", help="where to write every number")
    add("--compare", action="store_true", help="also run ComfyUI's own sampler on the same network (needs ComfyUI)")
    add("--frames", type=int, nargs="+", default=[21, 60, 600], help="latent frames (default: 21 60 600)")
    add("--window", type=window, nargs="+", default=[12], help="latent frames a block may see, or all (default: 12)")
    add("--sink", type=int, help="latent frames that are never evicted (default: as the preset)")
    add("--positions", help="absolute, relative or rebased (default: as the preset)")
    add("--compare-frames", type=int, nargs="+", default=[SHORT, 161], metavar="FRAMES",
        help=f"latent frames for --compare: up to {SHORT} with everything in sight, longer ones under every --window "
             f"(default: {SHORT} 161)")
    add("--preset", default="longlive", help="steps and blocks as in this system (default: longlive)")
    add("--runs", type=int, help=f"runs of each rollout (default: {RUNS}, for --compare {COMPARE_RUNS})")
    add("--model", choices=MODELS, default="tiny", help="shape of the network; 1.3b is meant for CUDA (default: tiny)")
    add("--dim", type=int, help="another width, a multiple of 128")
    add("--layers", type=int, help="another number of layers")
    add("--size", metavar="WxH", help="pixels, multiples of 16 (default: 128x128, for 1.3b 832x480)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--dtype", choices=DTYPES, help="compute dtype (default: float32, for 1.3b bfloat16)")


def setup_of(args: argparse.Namespace) -> Setup:
    """The set-up that the arguments describe. Raises ForcingError for a network that cannot be built."""
    config, usual_size, usual_dtype = MODELS[args.model]
    dim = config.dim if args.dim is None else args.dim
    layers = config.layers if args.layers is None else args.layers
    if dim < HEAD_DIM or dim % HEAD_DIM or layers < 1:
        raise ForcingError(f"A network {dim} wide with {layers} layers cannot be built. Use a multiple of {HEAD_DIM}, "
                           "and at least 1 layer.")
    config = replace(config, dim=dim, heads=dim // HEAD_DIM, layers=layers,
                     ffn_dim=config.ffn_dim * dim // config.dim)
    changes = {name: getattr(args, name) for name in ("sink", "positions") if getattr(args, name) is not None}
    return Setup(get(args.preset), config, size(args.size) or usual_size, args.device,
                 DTYPES[args.dtype or usual_dtype], changes)


def cases(frames: list[int], windows: list[int | None]) -> list[Case]:
    """Every length under every window, each once."""
    return list(dict.fromkeys(Case(length, window) for window in windows for length in frames))


def compare_cases(frames: list[int], windows: list[int | None]) -> list[Case]:
    """Clips as long as the models were trained for see everything; longer ones are what a window is for."""
    short = [Case(length, None) for length in frames if length <= SHORT]
    return list(dict.fromkeys(short + cases([length for length in frames if length > SHORT], windows)))


def show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    if not args.json.parent.is_dir():
        raise ForcingError(f"The folder {args.json.parent} does not exist. Make it or choose another one.")
    setup, compare = setup_of(args), load_compare() if args.compare else None
    check_device(args.device)
    info = machine(args.device)
    if info["load"] and info["load"] > info["cores"] / 2:
        show(f"The machine is busy (load {info['load']} on {info['cores']} cores): expect wrong numbers.")
    timings = measure(setup, cases(args.frames, args.window), RUNS if args.runs is None else args.runs, show)
    compared = []
    if compare is not None:
        pairs = compare_cases(args.compare_frames, args.window)
        compared = run_compare(pairs, COMPARE_RUNS if args.runs is None else args.runs, show, compare)
    write_json(args.json, {"machine": info, "rollouts": record(setup, timings), "compare": compared})
    print(f"{info['device']}, torch {info['torch']}, {info['threads']} threads, {setup.config.dim} wide, "
          f"{setup.config.layers} layers, {setup.size[0]}x{setup.size[1]}, {str(setup.dtype).removeprefix('torch.')}")
    for line in [*rollout_table(timings), *ratio_table(timings), *compare_table(compared)]:
        print(line)
    return 0


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in (head, *rows))
    return ["", *("  ".join(cell.rjust(width) for cell, width in line) for line in lines)]


def _window(value: int | None) -> str:
    return "all" if value is None else str(value)


def rollout_table(timings: list[Timing]) -> list[str]:
    if not timings:
        return []
    rows = [(str(t.frames), _window(t.window), str(t.sink), f"{t.seconds:.2f}",
             f"{1000 * torch.tensor(t.block_seconds).median():.1f}", f"{(1 + 4 * (t.frames - 1)) / t.seconds:.1f}",
             format_bytes(t.store_bytes), "-" if t.peak_bytes is None else format_bytes(t.peak_bytes))
            for t in timings]
    return _table(("frames", "window", "sink", "seconds", "ms/block", "pixel fps", "store", "peak"), rows)


def ratio_table(timings: list[Timing]) -> list[str]:
    """Whether a block late in the video takes longer than an early one; 1.00 is the aim under a window."""
    found = [(t, early_late(t)) for t in timings]
    rows = [(str(t.frames), _window(t.window), f"{1000 * e['early']:.1f} (to {e['early_frame']})",
             f"{1000 * e['late']:.1f} (to {e['late_frame']})", f"{e['ratio']:.2f}") for t, e in found if e]
    return _table(("frames", "window", "early ms/block", "late ms/block", "late/early"), rows) if rows else []


def compare_table(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    cells = [(str(r["frames"]), _window(r["window"]), f"{r['core_seconds']:.2f}", f"{r['our_seconds']:.2f}",
              f"{r['ratio']:.3f}") for r in rows]
    return _table(("frames", "window", "ComfyUI s", "ours s", "ratio"), cells)
