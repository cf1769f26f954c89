"""The figures of an evaluation as lines of text."""
from __future__ import annotations

import math
import textwrap
from typing import Any, Callable, Mapping, Sequence

from .ablations import Verdict
from .run import Options, Results
from .settings import SETTINGS, Setting

Row = Mapping[str, Any]
WIDTH = 118  # of running text


def _number(name: str, digits: int, factor: float = 1.0) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get(name)
        return "-" if value is None or not math.isfinite(value) else f"{factor * value:.{digits}f}"

    return cell


# heading -> cell of a row
COLUMNS: dict[str, Callable[[Row], str]] = {
    "setting": lambda row: row["settings"],
    "caption": _number("caption_accuracy", 2),
    "frames": _number("frame_accuracy", 2),
    "drift": _number("drift", 3),
    "+-": _number("drift_error", 3),
    "lost": _number("lost", 2),
    "seams": _number("seam_ratio", 2),
    "repeats": _number("repeats", 2),
    "frozen": _number("frozen", 2),
    "switch": _number("switch_delay_frames", 0),
    "obeyed": _number("switched", 2),
    "store MB": _number("store_bytes", 2, 1e-6),
    "ms/block": _number("seconds_per_block", 0, 1000),
}
KEY = ("caption: share of clips right in every frame (number, colour, shape); frames: share of right frames; drift: change "
       "of colours from the first second to the last, and its standard error; lost: share of frames without a thing; seams: "
       "roughness of motion at block borders, 1 is none; repeats, frozen: shares of frames; switch: frames until a new "
       "caption shows, the median of the clips in which it does, - where there are none; obeyed: their share; store: of one "
       "clip; ms/block: sampling of all clips.")


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Cells, the heading first, in columns: those numbered in `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) if number in left else cell.rjust(width)
                      for number, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


def result_lines(options: Options, results: Results) -> list[str]:
    """A table for each length, what was skipped, and what the columns mean."""
    lines = []
    for seconds in options.seconds:
        rows = [row for row in (*results.reference, *results.rows) if row["seconds"] == seconds]
        if any("store_bytes" in row for row in rows):
            lines += [f"{seconds:g} s, {options.clips(seconds)} unseen captions", *table(
                [tuple(COLUMNS), *(tuple(cell(row) for cell in COLUMNS.values()) for row in rows)]), ""]
    lines += [f"{row['settings']} at {row['seconds']:g} s was skipped: {row['why']}" for row in results.skipped]
    return [*lines, *textwrap.wrap(KEY, WIDTH)] if results.rows else lines


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """One line for each comparison of an ablation, with both figures."""
    words = {True: "holds", False: "does not hold", None: "not measured"}
    rows = [("verdict", "claim", "measure", "better", "", "worse", "")]
    for v in verdicts:
        figures = ["-" if figure is None else f"{figure:.3f}" for figure in (v.better_figure, v.worse_figure)]
        rows.append((words[v.holds], v.claim, v.metric.replace("_", " "), v.better, figures[0], v.worse, figures[1]))
    return table(rows, (0, 1, 2, 3, 5))


def setting_lines(usual: Sequence[str]) -> list[str]:
    """Every setting with what it is made of; those that run without being named are marked."""
    rows = [("setting", "runs", "network", "steps", "memory", "what it is")]
    rows += [(name, "yes" if name in usual else "if named", s.network, str(s.steps), _memory(s), s.title)
             for name, s in SETTINGS.items()]
    return table(rows, range(6))


def _memory(setting: Setting) -> str:
    cache = setting.cache()
    window, sink = getattr(cache, "window", None), getattr(cache, "sink", 0)
    return f"{setting.preset.policy}, {window or 'all'} frames" + (f", sink {sink}" if sink else "")
