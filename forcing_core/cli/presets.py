"""presets: the table of published systems."""
from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ..presets import PRESETS, Preset, get

HELP = "List the published systems and how they are run; with a NAME, everything known about one of them."

COLUMNS = (
    ("name", lambda p: p.name),
    ("runs", lambda p: "yes" if p.available else "no"),
    ("policy", lambda p: p.policy),
    ("block", lambda p: str(p.block)),
    ("window", lambda p: "all" if p.window is None else str(p.window)),
    ("sink", lambda p: str(p.sink)),
    ("positions", lambda p: p.positions),
    ("steps", lambda p: ",".join(map(str, p.steps)) or f"{p.step_count} {p.solver}"),
    ("licence", lambda p: p.licence),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this preset in full")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.name:
        preset = get(args.name)
        print(json.dumps(row(preset), indent=2) if args.json else in_full(preset))
    else:
        print(json.dumps([row(p) for p in PRESETS.values()], indent=2) if args.json else table())
    return 0


def row(preset: Preset) -> dict:
    """Everything about a preset as JSON-ready data."""
    return asdict(preset) | {"options": dict(preset.options), "available": preset.available, "runs": preset.runs}


def table() -> str:
    """One line a preset, in columns."""
    lines = [[title for title, _ in COLUMNS]] + [[cell(p) for _, cell in COLUMNS] for p in PRESETS.values()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def in_full(preset: Preset) -> str:
    """One line a field."""
    return "\n".join(f"{name:18}{_text(value)}" for name, value in row(preset).items())


def _text(value) -> str:
    if isinstance(value, dict) and "repo" in value:
        return f"{value['repo']}/{value['path']}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "-"
    # The negative prompt is Chinese, and not every terminal can print it.
    return "-" if value in (None, "") else str(value).encode("ascii", "backslashreplace").decode()
