"""parallel: one rollout over several devices, or many rollouts at once."""
from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from ..errors import ForcingError
from ..parallel.farm import jobs_of, over_processes, over_ray
from ..parallel.launch import launch, member
from ..parallel.request import LATENTS, SNAPSHOT, VIDEO, Request, make_folder, read_jobs

HELP = ("Make one video with several processes that share every forward, or, with --jobs, many videos at once. Under torchrun "
        "it is one process of those that torchrun started, on any number of hosts.")
FPS = 16


def size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write width x height in pixels, for example 832x480")
    return int(found[1]), int(found[2])


def setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting: write NAME=VALUE, for example window=12")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help=f"folder for {LATENTS}, {SNAPSHOT} and, where it can be decoded, {VIDEO}")
    add("--processes", type=count, default=1, metavar="N", help="how many, one to a GPU (default: 1)")
    add("--weights", default="student", metavar="NAME|FILE",
        help="a micro network, random (4 heads), or a checkpoint file (default: student)")
    add("--prompt", help="a caption, for the micro networks")
    add("--conditioning", metavar="FILE",
        help="for a checkpoint file: safetensors with the encoded 'prompt' [1, n, text_dim], and 'negative' for guided systems")
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=5.0, help="length of the video (default: 5)")
    length.add_argument("--frames", type=count, help="its length in latent frames instead")
    add("--preset", help="run it like this system (default: as the weights were trained)")
    add("--size", type=size, metavar="WxH", help="of the picture in pixels (default: usual for the weights)")
    add("--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the memory, as window=12")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--dtype", default="float32", help="of the network: float32, bfloat16 or float16 (default: float32)")
    add("--every", type=count, default=4, metavar="K", help="blocks between two snapshots (default: 4)")
    add("--resume", action="store_true", help=f"go on from {SNAPSHOT} in DIR, if there is one; leave finished jobs as they are")
    add("--jobs", type=Path, metavar="FILE", help='many videos: JSON such as [{"prompt": "a red circle", "seed": 1}]')
    add("--ray", nargs="?", const="", metavar="ADDRESS", help="spread the jobs over a Ray cluster (default: one on this host)")


def request_of(args: argparse.Namespace) -> Request:
    """Raises ForcingError for a length that makes no sense."""
    if not (math.isfinite(args.seconds) and args.seconds > 0):
        raise ForcingError(f"A video of {args.seconds:g} seconds cannot be made. Use more than 0.")
    frames = args.frames or 1 + max(0, math.ceil((args.seconds * FPS - 1) / 4))
    return Request(args.out, args.weights, args.prompt, args.conditioning, args.seed, frames, args.preset, args.size,
                   dict(args.set), args.device, args.dtype, args.every, args.resume)


def run(args: argparse.Namespace) -> int:
    request = request_of(args)
    if member():
        return _as_member(args, request)
    make_folder(request.folder)
    if args.jobs is not None:
        requests = jobs_of(request, read_jobs(args.jobs))
        if args.ray is None:
            over_processes(requests, args.processes)
        else:
            over_ray(requests, args.ray or None)
        print(f"{args.out}: {len(requests)} jobs")
        return 0
    if args.ray is not None:
        raise ForcingError("Ray spreads many videos. Give --jobs, or leave out --ray; for one video on several hosts see "
                           "torchrun.")
    launch([[request]] * args.processes, together=True, advice=lambda: advice(request))
    print(f"{request.folder / LATENTS}: {request.frames} latent frames")
    return 0


def advice(request: Request) -> str:
    """How to go on after a process was lost."""
    if (request.folder / SNAPSHOT).is_file():
        return f"{request.folder / SNAPSHOT} holds the video so far: run the command again with --resume to go on."
    return "There is no snapshot yet: run the command again, with a smaller --every to have one sooner."


def _as_member(args: argparse.Namespace, request: Request) -> int:
    if args.jobs is not None or args.ray is not None:
        raise ForcingError("Processes of torchrun share one video. Leave out --jobs and --ray, or start without torchrun.")
    from ..parallel.ranks import joined  # the only case in which this process needs PyTorch
    from ..parallel.work import fulfil

    with joined(request.device) as ranks:
        fulfil(request, ranks, lambda text: print(text, file=sys.stderr, flush=True))
    print(f"{request.folder / LATENTS}: {request.frames} latent frames", file=sys.stderr)
    return 0
