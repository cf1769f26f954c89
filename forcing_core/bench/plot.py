"""The parts of every rollout as one picture: a bar a rollout, milliseconds a block, and the two floors as marks on it."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Sequence

from ..errors import ForcingError
from ..media import INK, PAPER, font, pillow
from ..training.plot import ticks

if TYPE_CHECKING:
    from PIL.Image import Image

Row = Mapping[str, Any]
COLOURS = {"matmul": (84, 134, 188), "attention": (217, 95, 46), "store": (38, 128, 112), "elementwise": (226, 178, 62),
           "solver": (160, 142, 192), "decode": (120, 120, 124)}
FLOORS = {"operations": (150, 20, 60), "bytes": (20, 20, 24)}
GRID, BAR, ROW, WIDTH, TOP = (222, 222, 218), 26, 52, 1400, 96


def picture(rows: Sequence[Row]) -> Image:
    """An RGB image of rows of `timing.record` that have parts and floors. Raises ForcingError without any."""
    rows = [row for row in rows if row["parts"] and row["floors"]]
    if not rows:
        raise ForcingError("There are no parts to draw. Measure at least one rollout with --parts 1 or more.")
    image, draw, _ = pillow()
    sheet = image.new("RGB", (WIDTH, TOP + ROW * len(rows) + 44), PAPER)
    pen, small = draw.Draw(sheet), font(14)
    names = [label(row) for row in rows]
    left, right = 24 + max(small.getlength(name) for name in names), WIDTH - 90
    longest = max(max(_block(row, row["parts"]["total"]), *(_block(row, s) for s in row["floors"].values())) for row in rows)
    pen.text((24, 14), "milliseconds a block", INK, font=font(20))
    _legend(pen, small)
    for value in ticks(longest / 10, longest):
        x = left + (right - left) * value / longest
        pen.line((x, TOP - 8, x, TOP + ROW * len(rows)), GRID)
        pen.text((x, TOP + ROW * len(rows) + 8), f"{value:.3g}", INK, font=small, anchor="ma")
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        y, x = TOP + place * ROW + 8, float(left)
        pen.text((left - 12, y + BAR / 2), name, INK, font=small, anchor="rm")
        for part, colour in COLOURS.items():
            wide = (right - left) * _block(row, max(0.0, row["parts"]["seconds"][part])) / longest
            pen.rectangle((x, y, x + wide, y + BAR), colour)
            x += wide
        pen.text((x + 8, y + BAR / 2), f"{_block(row, row['parts']['total']):.4g}", INK, font=small, anchor="lm")
        for floor, colour in FLOORS.items():
            at = left + (right - left) * _block(row, row["floors"][floor]) / longest
            pen.line((at, y - 5, at, y + BAR + 5), colour, width=3)
    return sheet


def label(row: Row) -> str:
    how = "".join(f", {name}" for name in ("joined", "compiled") if row[name])
    return (f"{row['preset']} {row['width']}x{row['height']}, {row['frames']} frames, window "
            f"{row['window'] or 'all'}{how}")


def _block(row: Row, seconds: float) -> float:
    """Milliseconds a block."""
    return 1000 * seconds / len(row["block_seconds"])


def _legend(pen, small) -> None:
    x = 24.0
    for name, colour in {**COLOURS, **{f"floor by {floor}": colour for floor, colour in FLOORS.items()}}.items():
        pen.rectangle((x, 52, x + 14, 66), colour)
        pen.text((x + 20, 59), name, INK, font=small, anchor="lm")
        x += 44 + small.getlength(name)
