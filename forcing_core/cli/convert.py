"""convert: a published checkpoint -> one plain safetensors file."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import ForcingError
from ..presets import get, guess

HELP = ("Turn a published checkpoint (.pt or .safetensors, any container and prefix) into one plain safetensors file "
        "that ComfyUI's own loader opens, with a LoRA merged in if one is given.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="checkpoint to read")
    parser.add_argument("target", type=Path, help="safetensors file to write")
    parser.add_argument("--preset", help="preset it belongs to (default: by its name)")
    parser.add_argument("--key", help="container to take: generator_ema, generator, model or flat")
    parser.add_argument("--lora", type=Path, help="LoRA to merge, for example LongLive's lora.pt")
    parser.add_argument("--strength", type=float, default=1.0, help="factor in front of the LoRA (default 1)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16",
                        help="of the result (default bf16; a LIVE checkpoint is 7 times nearer to its public code in fp16)")
    parser.add_argument("--causal-ar", action="store_true",
                        help="mark the file for ComfyUI's own autoregressive sampler (not needed by this pack)")
    parser.add_argument("--as-lora", action="store_true",
                        help="the source is a LoRA: write it under ComfyUI's names instead")
    parser.add_argument("--vae", type=Path, help="autoencoder of a LIVE checkpoint (vae-kl16.ckpt), put into the same file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing target")


def run(args: argparse.Namespace) -> int:
    if args.as_lora:
        return _convert_lora(args)
    if _is_live(args):
        return _convert_live(args)
    from ..checkpoints import convert  # here, so that --help works without PyTorch

    loaded = convert(args.source, args.target, preset=args.preset, key=args.key, lora=args.lora,
                     strength=args.strength, dtype=args.dtype, causal_ar=args.causal_ar, overwrite=args.overwrite,
                     progress=_progress if sys.stderr.isatty() else None)
    for sentence in loaded.report:
        print(sentence)
    print(f"Wrote {args.target} ({args.dtype}).")
    return 0


def _is_live(args: argparse.Namespace) -> bool:
    """Whether the source is a checkpoint of LIVE, by the preset that was asked for or by its name."""
    preset = get(args.preset) if args.preset else guess(str(args.source))
    return preset is not None and preset.policy == "sliding"


def _convert_live(args: argparse.Namespace) -> int:
    from ..live import convert

    if args.lora or args.causal_ar or args.key:
        raise ForcingError("A LIVE checkpoint takes no --lora, --key and --causal-ar. Leave them out.")
    loaded = convert(args.source, args.target, vae=args.vae, dtype=args.dtype, overwrite=args.overwrite)
    for sentence in loaded.report:
        print(sentence)
    print(f"Wrote {args.target} ({args.dtype}, the autoencoder fp32).")
    return 0


def _convert_lora(args: argparse.Namespace) -> int:
    from ..checkpoints import load_lora, to_comfy, write_safetensors

    lora = load_lora(args.source, key=args.key)
    write_safetensors(to_comfy(lora), args.target, overwrite=args.overwrite)
    print(f"Wrote {args.target}: {len(lora.pairs)} layers, rank {lora.rank}.")
    return 0


def _progress(done: int, total: int) -> None:
    print(f"\r{100 * done // max(total, 1):3d} %", end="\n" if done == total else "", file=sys.stderr, flush=True)
