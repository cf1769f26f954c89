"""bench: time rollouts and their parts on this machine, against what it can do, and beside ComfyUI's own sampler."""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from ..accelerate import WAYS
from ..bench.budget import GB, WAN_14B, Budget, budget, cards
from ..bench.clock import HOST, check_device
from ..bench.compare import load_compare, run_compare
from ..bench.official import beside_official, check_official
from ..bench.parts import Rates, rates
from ..bench.plot import COLOURS, picture
from ..bench.timing import DTYPES, Case, Setup, Timing, early_late, label, machine, measure, record, write_json
from ..errors import ForcingError
from ..media import save_png
from ..micro import bundle
from ..micro.vae import DecodeStream
from ..plan_view import format_bytes
from ..presets import get, runnable
from ..wan import WanConfig
from .demo import size

HELP = ("Time whole rollouts and their parts against two floors, the operations over the measured rate of a matmul and the "
        "bytes over that of a copy: blocks early and late in a video, the bytes of the store, the memory of the run. Numbers "
        "are medians; run it on an idle machine. The one command for an NVIDIA card: python -m forcing_core bench --model 1.3b "
        "--device cuda --preset all --size 832x480 576x320 --frames 21 81 161 --window all 12 21 --parts 1 --json bench.json "
        "--plot bench.png. The same with --accelerate all and other files shows what that brings. The one beside the official "
        "code, with a line for each acceleration: python -m forcing_core bench --model 1.3b --device cuda --frames 21 81 "
        "--window 12 21 --official DIR --json official.json. The one for a CPU: python -m forcing_core bench --compare --clock "
        "process --threads 1 --json bench.json.")

TINY = WanConfig(dim=256, ffn_dim=512, heads=2, layers=2, text_dim=64, text_len=64)
# name -> (network, usual size in pixels, usual dtype)
MODELS = {"tiny": (TINY, (128, 128), "float32"), "micro": (bundle.micro_config(128, 6), bundle.SIZE, "float32"),
          "1.3b": (WanConfig(), (832, 480), "bfloat16"), "14b": (WAN_14B, (832, 480), "bfloat16")}
RUNS, COMPARE_RUNS = 3, 10
SHORT = 21  # latent frames: the training length of most systems
HEAD_DIM = 128
COMPARED = ("tiny", "micro")


def window(text: str) -> int | None:
    """"12" -> 12, "all" -> None."""
    if text == "all":
        return None
    if not text.isdecimal() or text == "0":
        raise argparse.ArgumentTypeError(f"{text!r} is not a window: write a number of latent frames, or all")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="where to write every number")
    add("--plot", type=Path, metavar="FILE.png", help="draw the parts of every rollout (sets --parts to 1 if it is not given)")
    add("--compare", action="store_true", help="also run ComfyUI's own sampler on the same networks (needs ComfyUI)")
    add("--official", type=Path, metavar="DIR", help="also run the official Self Forcing code, from a checkout of "
                                                     "github.com/guandeh17/Self-Forcing, beside ours with and without "
                                                     "accelerations, on the same network (needs diffusers)")
    add("--budget", action="store_true", help="print the memory of these rollouts, and what fits on cards of 8 to 24 GB, and "
                                              "run nothing")
    add("--frames", type=int, nargs="*", default=[21, 60, 600],
        help="latent frames (default: 21 60 600); without a number: no rollouts, only --compare")
    add("--window", type=window, nargs="+", default=[12], help="latent frames a block may see, or all (default: 12)")
    add("--sink", type=int, help="latent frames that are never evicted (default: as the preset)")
    add("--positions", help="absolute, relative or rebased (default: as the preset)")
    add("--compare-frames", type=int, nargs="+", default=[SHORT, 161], metavar="FRAMES",
        help=f"latent frames for --compare: up to {SHORT} with everything in sight, longer ones under every --window "
             f"(default: {SHORT} 161)")
    add("--compare-models", choices=COMPARED, nargs="+", default=list(COMPARED), help="networks for --compare (default: both)")
    add("--preset", nargs="+", default=["longlive"], metavar="NAME",
        help="steps, blocks and memory as in these systems, or all (default: longlive)")
    add("--runs", type=int, help=f"runs of each rollout (default: {RUNS}, for --compare {COMPARE_RUNS})")
    add("--parts", type=int, metavar="RUNS", help="take every rollout apart, in so many runs of their own (default: 0)")
    add("--joined", action="store_true", help="make clean passes in one forward with the noisy ones behind them")
    add("--compile", action="store_true", help="torch.compile the pure halves of a layer")
    add("--accelerate", choices=WAYS, default="off", help="on an NVIDIA card: fused kernels (with Triton), CUDA graphs, or "
                                                          "all; prefetch is for ComfyUI (default: off)")
    add("--model", choices=MODELS, default="tiny", help="shape of the network, 1.3b and 14b are meant for CUDA; micro is the "
                                                        "trained one, and is decoded too (default: tiny)")
    add("--dim", type=int, help="another width, a multiple of 128")
    add("--layers", type=int, help="another number of layers")
    add("--size", nargs="+", metavar="WxH", help="pixels, multiples of 16 (default: 128x128, 64x64 for micro, else 832x480)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--dtype", choices=DTYPES, help="compute dtype (default: float32, for 1.3b and 14b bfloat16)")
    add("--clock", choices=HOST, default="wall", help="of the CPU: process is the time spent on this program alone, steadier "
                                                      "where others run; use it with --threads 1 (default: wall)")
    add("--threads", type=int, help="threads of the CPU (default: as PyTorch chooses)")


def setup_of(args: argparse.Namespace) -> Setup:
    """The set-up of the first preset and size. Raises ForcingError for a network that cannot be built."""
    config, usual_size, usual_dtype = MODELS[args.model]
    dim = config.dim if args.dim is None else args.dim
    layers = config.layers if args.layers is None else args.layers
    if dim < HEAD_DIM or dim % HEAD_DIM or layers < 1:
        raise ForcingError(f"A network {dim} wide with {layers} layers cannot be built. Use a multiple of {HEAD_DIM}, "
                           "and at least 1 layer.")
    if args.model == "micro" and (dim, layers) != (config.dim, config.layers):
        raise ForcingError("The micro network has one width and one number of layers. Use --dim and --layers with "
                           "--model tiny.")
    config = replace(config, dim=dim, heads=dim // HEAD_DIM, layers=layers,
                     ffn_dim=config.ffn_dim * dim // config.dim)
    changes = {name: getattr(args, name) for name in ("sink", "positions") if getattr(args, name) is not None}
    return Setup(get(presets(args.preset)[0]), config, size(args.size[0]) if args.size else usual_size, args.device,
                 DTYPES[args.dtype or usual_dtype], changes, args.clock, args.joined, args.compile,
                 _decoder if args.model == "micro" else None, args.accelerate)


def _decoder():
    return DecodeStream(bundle.vae()).push


def presets(names: list[str]) -> list[str]:
    """The named ones, or all that can be run."""
    return [preset.name for preset in runnable()] if names == ["all"] else names


def setups(args: argparse.Namespace, first: Setup) -> list[Setup]:
    """Every preset at every size."""
    sizes = [size(text) for text in args.size] if args.size else [first.size]
    return [replace(first, preset=get(name), size=pixels) for name, pixels in product(presets(args.preset), sizes)]


def cases(frames: list[int], windows: list[int | None]) -> list[Case]:
    """Every length under every window, each once."""
    return list(dict.fromkeys(Case(length, window) for window in windows for length in frames))


def possible(setup: Setup, wanted: list[Case], every: bool) -> list[Case]:
    """Those of the cases that the preset can do; with `every` preset asked for, the others are told and left out."""
    found = []
    for case in wanted:
        try:
            budget(setup, case)
        except ForcingError as error:
            if not every:
                raise
            show(f"left out: {setup.preset.name}, {label(case)}: {error}")
            continue
        found.append(case)
    return found


def compare_cases(frames: list[int], windows: list[int | None]) -> list[Case]:
    """Clips as long as the models were trained for see everything; longer ones are what a window is for."""
    short = [Case(length, None) for length in frames if length <= SHORT]
    return list(dict.fromkeys(short + cases([length for length in frames if length > SHORT], windows)))


def show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    for path in (args.json, args.plot):
        if path is not None and not path.parent.is_dir():
            raise ForcingError(f"The folder {path.parent} does not exist. Make it or choose another one.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    first = setup_of(args)
    each = [(setup, possible(setup, cases(args.frames, args.window), args.preset == ["all"])) for setup in setups(args, first)]
    if args.budget:
        for line in [*budget_table(each), *card_table(first)]:
            print(line)
        return 0
    compare = load_compare() if args.compare else None
    if args.official:
        check_official(args.official, cases(args.frames, args.window))
    check_device(args.device)
    info = machine(args.device)
    if info["load"] and info["load"] > info["cores"] / 2:
        show(f"The machine is busy (load {info['load']} on {info['cores']} cores): expect wrong numbers.")
    for line in budget_table(each):
        show(line)
    timings, rows, rate = _rollouts(args, each)
    compared = _compared(args, compare) if compare is not None else []
    theirs = _officially(args, first, rate)
    if args.json:
        write_json(args.json, {"machine": info, "rates": rate and vars(rate), "rollouts": rows, "compare": compared,
                               "official": theirs})
    if args.plot:
        save_png(picture(rows), args.plot)
    print(f"{info['device']}, torch {info['torch']}, {info['threads']} threads, {first.config.dim} wide, "
          f"{first.config.layers} layers, {first.size[0]}x{first.size[1]}, {str(first.dtype).removeprefix('torch.')}")
    for line in [*rollout_table(timings), *ratio_table(timings), *parts_table(rows, rate), *compare_table(compared),
                 *official_table(theirs)]:
        print(line)
    return 0


def _rollouts(args: argparse.Namespace, each: list[tuple[Setup, list[Case]]]) -> tuple[list[Timing], list[dict], Rates | None]:
    """(timings, rows for the file, what the machine can do if rollouts are taken apart)."""
    parts = (1 if args.plot else 0) if args.parts is None else args.parts
    each = [(setup, wanted) for setup, wanted in each if wanted]
    rate = rates(args.device, each[0][0].dtype, args.clock) if parts and each else None
    timings, rows = [], []
    for setup, wanted in each:
        show(f"{setup.preset.name}, {setup.size[0]}x{setup.size[1]}")
        net = bundle.network("student").to(args.device).to_compute(setup.dtype) if args.model == "micro" else None
        found = measure(setup, wanted, RUNS if args.runs is None else args.runs, show, net, parts)
        timings += found
        rows += record(setup, found, rate)
    return timings, rows, rate


def _compared(args: argparse.Namespace, compare) -> list[dict]:
    pairs = compare_cases(args.compare_frames, args.window)
    clock = "wall" if torch.cuda.is_available() else args.clock
    return [row for model in args.compare_models
            for row in run_compare(pairs, COMPARE_RUNS if args.runs is None else args.runs, show, compare, clock, model)]


def _officially(args: argparse.Namespace, setup: Setup, rate: Rates | None) -> list[dict]:
    if not args.official:
        return []
    runs, rate = RUNS if args.runs is None else args.runs, rate or rates(args.device, setup.dtype, args.clock)
    return beside_official(args.official, setup, cases(args.frames, args.window), runs, rate, show)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in (head, *rows))
    return ["", *("  ".join(cell.rjust(width) for cell, width in line) for line in lines)]


def _window(value: int | None) -> str:
    return "all" if value is None else str(value)


def _gb(count: float) -> str:
    return f"{count / GB:.3g}"


def _budget_cells(found: Budget) -> tuple[str, ...]:
    host = f" + {_gb(found.host)} host" if found.host else ""
    return (_gb(found.weights), _gb(found.store) + host, _gb(found.text), _gb(found.work), _gb(found.total))


def budget_table(each: list[tuple[Setup, list[Case]]]) -> list[str]:
    rows = [(setup.preset.name, f"{setup.size[0]}x{setup.size[1]}", str(case.frames), _window(case.window),
             *_budget_cells(budget(setup, case))) for setup, wanted in each for case in wanted]
    head = ("preset", "size", "frames", "window", "weights GB", "store", "prompt", "work, about", "together")
    return _table(head, rows) if rows else []


def card_table(setup: Setup) -> list[str]:
    """What fits on a card, for the network and the size of the arguments."""
    rows = [(f"{card} GB", choice.label if choice else "weights streamed from main memory, or a smaller picture",
             *_budget_cells(found)) for card, choice, found in cards(setup.config, setup.size)]
    return _table(("card", "the best that fits", "weights GB", "store", "prompt", "work, about", "together"), rows)


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


def parts_table(rows: list[dict], rate: Rates | None) -> list[str]:
    """Milliseconds a block of each part, and how much of an undisturbed rollout the higher floor is."""
    rows = [row for row in rows if row["parts"]]
    if not rows:
        return []
    cells = []
    for row in rows:
        block = 1000 / len(row["block_seconds"])
        parts, floors = row["parts"]["seconds"], row["floors"]
        passes = sum(number for number, _ in row["parts"]["passes"].values())
        cells.append((row["preset"], str(row["frames"]), _window(row["window"]), str(passes),
                      *(f"{block * parts[part]:.2f}" for part in COLOURS), f"{block * floors['operations']:.2f}",
                      f"{block * floors['bytes']:.2f}", f"{max(floors.values()) / row['seconds']:.0%}"))
    head = ("preset", "frames", "window", "passes", *COLOURS, "ops floor", "bytes floor", "floor/run")
    return [*_table(head, cells), f"floors: {rate.operations / 1e9:,.0f} billion operations/s of a matmul, "
                                  f"{rate.bytes / 1e9:,.1f} GB/s of a copy"]


def compare_table(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    cells = [(r.get("model", ""), str(r["frames"]), _window(r["window"]), f"{r['core_seconds']:.2f}", f"{r['our_seconds']:.2f}",
              f"{r['ratio']:.3f}", f"{r['joined_ratio']:.3f}" if "joined_ratio" in r else "-") for r in rows]
    return _table(("model", "frames", "window", "ComfyUI s", "ours s", "ratio", "joined"), cells)


def official_table(rows: list[dict]) -> list[str]:
    """The log of changes: the official code, then ours, plain and with each acceleration."""
    if not rows:
        return []
    cells = [(r["who"], str(r["frames"]), _window(r["window"]), r["attention"], f"{r['seconds']:.2f}",
              f"{(1 + 4 * (r['frames'] - 1)) / r['seconds']:.1f}", f"{r['first_seconds']:.2f}",
              "-" if r["peak_bytes"] is None else format_bytes(r["peak_bytes"]), f"{r['floor']:.0%}", f"{r['ratio']:.2f}",
              f"{r['difference']:.1e}") for r in rows]
    return _table(("Self Forcing", "frames", "window", "attention", "seconds", "pixel fps", "first block s", "peak",
                   "floor/run", "ratio", "difference"), cells)
