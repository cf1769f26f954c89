"""Pictures of an evaluation: a contact sheet, drift over time, and bars of caption accuracy. Pillow only.

Everything is drawn at twice the size at which it is read, so that lines and letters are sharp on any screen.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

from ..errors import ForcingError
from ..media import INK, PAPER, font, pillow, save_png
from ..micro.temporal import SECOND
from .rollouts import latent_frames, times
from .run import Options, Results
from .settings import BLOCK, SETTINGS

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image

Row = Mapping[str, Any]
SMALL, BIG, MARGIN = 24, 34, 32
TILE, GAP = 144, 8
FAINT, GRID = (130, 130, 134), (222, 222, 218)
PALETTE = ((84, 134, 188), (217, 95, 46), (38, 128, 112), (150, 90, 170), (200, 150, 20), (50, 60, 110), (190, 60, 100),
           (70, 160, 60), (20, 110, 170), (150, 100, 60), (90, 80, 200), (0, 150, 160))
WIDTH, HEIGHT = 1800, 900
SAME = "The same caption and the same noise under every setting"
DRIFT = "how far colours of thing and background are from those of the first second (RGB distance)"


class _Canvas:
    """A sheet of paper with two sizes of letters."""

    def __init__(self, width: int, height: int):
        image, draw, _ = pillow()
        self.image = image.new("RGB", (round(width), round(height)), PAPER)
        self.pen, self.small, self.big = draw.Draw(self.image), font(SMALL), font(BIG)

    def text(self, x: float, y: float, words: str, anchor: str = "la", fill=INK) -> None:
        self.pen.text((x, y), words, fill, font=self.small, anchor=anchor)

    def title(self, words: str, below: str) -> None:
        self.pen.text((MARGIN, MARGIN - 6), words, INK, font=self.big)
        self.text(MARGIN, MARGIN + 40, below, fill=FAINT)


def text_width(words: Sequence[str]) -> float:
    """Pixels that the longest of the texts takes in small letters."""
    letters = font(SMALL)
    return max((letters.getlength(text) for text in words), default=0.0)


def spread(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, in the same order, at least `least` apart and inside low .. high where they fit."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    places, floor = [0.0] * len(wanted), low
    for index in order:
        places[index] = floor = max(wanted[index], floor)
        floor += least
    ceiling = high
    for index in reversed(order):
        places[index] = ceiling = min(places[index], ceiling)
        ceiling -= least
    return places


def sheet(rows: Sequence[tuple[str, str, Sequence[ndarray]]], seconds: Sequence[float], caption: str,
          title: str = SAME) -> Image:
    """One row for each (name, title, pictures uint8 [H, W, 3]), with the time of every column above. Raises ForcingError
    without rows."""
    if not rows:
        raise ForcingError("There are no videos for a contact sheet. Finish at least one.")
    image, _, _ = pillow()
    left = MARGIN + text_width([text for name, title, _ in rows for text in (name, title)]) + 2 * GAP
    top = MARGIN + 130
    width = max(left + len(seconds) * (TILE + GAP) - GAP, MARGIN + text_width([caption]))
    canvas = _Canvas(width + MARGIN, top + len(rows) * (TILE + GAP) + MARGIN - GAP)
    canvas.title(title, caption)
    for column, at in enumerate(seconds):
        canvas.text(left + column * (TILE + GAP) + TILE / 2, top - GAP, f"{at:.1f} s", "md", FAINT)
    for number, (name, title, pictures) in enumerate(rows):
        y = top + number * (TILE + GAP)
        canvas.text(MARGIN, y + TILE / 2 - 4, name, "ld")
        canvas.text(MARGIN, y + TILE / 2 + 4, title, "la", FAINT)
        for column, picture in enumerate(pictures):
            large = image.fromarray(picture).resize((TILE, TILE), image.Resampling.BICUBIC)
            canvas.image.paste(large, (round(left + column * (TILE + GAP)), y))
    return canvas.image


def _colour(name: str) -> tuple[int, int, int]:
    """Of a setting, the same in every picture; grey for what was not made by a network."""
    place = list(SETTINGS).index(name) if name in SETTINGS else None
    return FAINT if place is None else PALETTE[place % len(PALETTE)]


def _step(span: float, most: int = 8) -> float:
    """A round distance of grid lines, so that there are at most `most`."""
    size = 10.0 ** math.floor(math.log10(span / most))
    return next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= most)


class _Axes:
    """Seconds to the right, drift upwards, with a grid."""

    def __init__(self, canvas: _Canvas, right: float, longest: float, highest: float):
        self.canvas, self.longest, self.highest = canvas, longest, highest
        self.left, self.right, self.top, self.bottom = 120, right, 150, HEIGHT - 110
        for value in self._ticks(highest):
            y = self.y(value)
            canvas.pen.line((self.left, y, self.right, y), GRID, 2)
            canvas.text(self.left - 14, y, f"{value:.2f}", "rm", FAINT)
        for value in self._ticks(longest):
            canvas.text(self.x(value), self.bottom + 14, f"{value:g}", "ma", FAINT)
        canvas.text((self.left + self.right) / 2, self.bottom + 54, "seconds of video", "ma", FAINT)

    @staticmethod
    def _ticks(high: float) -> list[float]:
        step = _step(high)
        return [round(step * number, 6) for number in range(math.floor(high / step + 1e-6) + 1)]

    def x(self, second: float) -> float:
        return self.left + (self.right - self.left) * second / self.longest

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * value / self.highest


def drift_plot(rows: Sequence[Row], title: str = "Drift", below: str = DRIFT,
               colour_of: Callable[[str], tuple[int, int, int]] = _colour) -> Image:
    """Curves of colour error against the first second (or of what `title` says), one a setting, named at their ends."""
    points = {row["settings"]: [(n + 0.5, value) for n, value in enumerate(row["drift_curve"]) if math.isfinite(value)]
              for row in rows}
    points = {name: line for name, line in points.items() if line}
    canvas = _Canvas(WIDTH, HEIGHT)
    canvas.title(title, below)
    longest = max((line[-1][0] + 0.5 for line in points.values()), default=1.0)
    highest = max((value for line in points.values() for _, value in line), default=0.0)
    axes = _Axes(canvas, WIDTH - MARGIN - 90 - text_width(list(points)), longest, 1.05 * max(highest, 0.05))
    places = spread([axes.y(line[-1][1]) for line in points.values()], SMALL + 8, axes.top, axes.bottom)
    for (name, line), place in zip(points.items(), places):
        colour, ends = colour_of(name), [(axes.x(at), axes.y(value)) for at, value in line]
        canvas.pen.line(ends, colour, 5, joint="curve")
        for x, y in ends if len(ends) < 12 else ends[-1:]:
            canvas.pen.ellipse((x - 6, y - 6, x + 6, y + 6), colour)
        canvas.pen.line((*ends[-1], axes.right + 20, place, axes.right + 44, place), colour, 2)
        canvas.text(axes.right + 54, place, name, "lm", colour)
    return canvas.image


def bars(rows: Sequence[Row], metric: str = "caption_accuracy", title: str = "Caption accuracy",
         below: str = "share of clips right in every frame: number of things, colour, shape") -> Image:
    """A group of horizontal bars for each setting, one for each length, from 0 to 1."""
    names, lengths = list(dict.fromkeys(row["settings"] for row in rows)), sorted({row["seconds"] for row in rows})
    figures = {(row["settings"], row["seconds"]): row[metric] for row in rows}
    bar, left = 26, MARGIN + text_width(names) + 24
    group, top, right = len(lengths) * (bar + 4) + 22, 172, WIDTH - MARGIN - 90
    canvas = _Canvas(WIDTH, top + len(names) * group + MARGIN)
    canvas.title(title, below)
    x = float(MARGIN)
    for number, seconds in enumerate(lengths):
        canvas.pen.rectangle((x, 124, x + 24, 148), PALETTE[number % len(PALETTE)])
        canvas.text(x + 36, 136, f"{seconds:g} s", "lm")
        x += 80 + text_width([f"{seconds:g} s"])
    for place, name in enumerate(names):
        y = top + place * group
        canvas.text(left - 18, y + (group - 26) / 2, name, "rm")
        for number, seconds in enumerate(lengths):
            value, at = figures.get((name, seconds), math.nan), y + number * (bar + 4)
            canvas.pen.rectangle((left, at, right, at + bar), (238, 238, 234))
            if value > 0:
                canvas.pen.rectangle((left, at, left + (right - left) * value, at + bar), PALETTE[number % len(PALETTE)])
            canvas.text(right + 14, at + bar / 2, f"{value:.2f}" if math.isfinite(value) else "-", "lm")
    return canvas.image


def write(options: Options, results: Results, folder: Path) -> list[Path]:
    """Draw what there is into an existing folder: sheet.png of the longest finished length (sheet-5s.png and so on of the
    others), drift.png of the same length, accuracy.png of all. Returns the files; raises ForcingError as `save_png`."""
    lengths = [seconds for seconds in options.seconds if any(row["seconds"] == seconds for row in results.rows)]
    made = []
    for seconds in lengths:
        name = "sheet.png" if seconds == lengths[-1] else f"sheet-{seconds:g}s.png"
        rows = [(row["settings"], row["title"], results.tiles[row["settings"], seconds])
                for row in (*results.reference, *results.rows) if row["seconds"] == seconds]
        frames = 4 * latent_frames(seconds, BLOCK) - 3
        caption = next(row["first_caption"] for row in results.rows if row["seconds"] == seconds)
        made.append((name, sheet(rows, [frame / SECOND for frame in times(frames)], caption)))
    if lengths:
        longest = [row for row in (*results.reference, *results.rows) if row["seconds"] == lengths[-1]]
        made += [("drift.png", drift_plot(longest)), ("accuracy.png", bars(results.rows))]
    for name, picture in made:
        save_png(picture, folder / name)
    return [folder / name for name, _ in made]
