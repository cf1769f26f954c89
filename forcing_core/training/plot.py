"""The losses of all stages as one picture, drawn from their reports: a panel a stage, loss on a logarithmic axis."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Mapping, Sequence

from ..errors import ForcingError
from ..media import INK, PAPER, font, pillow

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Points = Sequence[Sequence[float]]  # [step, loss] pairs
PANEL, COLUMNS = (360, 240), 3  # pixels of a panel; panels in a row
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 38, 30  # of the axes in a panel
COLOURS, GRID = ((84, 134, 188), (217, 95, 46), (38, 128, 112)), (226, 226, 222)


def picture(stages: Mapping[str, Mapping[str, Points]], unit: str = "steps") -> Image:
    """An RGB image of stage -> name of a loss -> its points. unit: of the axis to the right. Raises ForcingError where there
    are no stages."""
    if not stages:
        raise ForcingError("There are no losses to draw. Train at least one stage.")
    image, draw, _ = pillow()
    columns = min(COLUMNS, len(stages))
    rows = -(-len(stages) // columns)
    sheet = image.new("RGB", (columns * PANEL[0], rows * PANEL[1]), PAPER)
    pen = draw.Draw(sheet)
    for place, (name, losses) in enumerate(stages.items()):
        _panel(pen, (place % columns * PANEL[0], place // columns * PANEL[1]), name, losses, unit)
    return sheet


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two positive numbers; of a wide range the powers alone, of a narrow one
    its ends."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    values = [digit * 10.0 ** power for power in range(first, last + 1) for digit in (1, 2, 5)]
    inside = [value for value in values if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]
    if len(inside) < 2:
        return [low, high]
    return inside if len(inside) < 7 else [value for value in inside if f"{value:e}".startswith("1.")]


def _panel(pen: ImageDraw, corner: tuple[int, int], name: str, losses: Mapping[str, Points], unit: str) -> None:
    points = [point for curve in losses.values() for point in curve if point[1] > 0]
    pen.text((corner[0] + LEFT, corner[1] + 6), name, INK, font=font(15))
    if not points:
        pen.text((corner[0] + LEFT, corner[1] + TOP + 10), "no losses were recorded", INK, font=font(12))
        return
    steps = max(step for step, _ in points)
    low, high = (edge(loss for _, loss in points) for edge in (min, max))
    low, high = (low, high) if high > 1.02 * low else (low / 1.5, high * 1.5)  # a flat line has no range of its own
    width, height = PANEL[0] - LEFT - RIGHT, PANEL[1] - TOP - BOTTOM

    def at(step: float, loss: float) -> tuple[float, float]:
        return (corner[0] + LEFT + width * step / steps,
                corner[1] + TOP + height * (math.log(high / loss) / math.log(high / low)))

    for value in ticks(low, high):
        pen.line((at(0, value), at(steps, value)), GRID)
        pen.text((corner[0] + LEFT - 6, at(0, value)[1]), f"{value:.3g}", INK, font=font(11), anchor="rm")
    for step, anchor in ((0, "lt"), (steps, "rt")):
        pen.text((at(step, low)[0], at(0, low)[1] + 6), f"{step:.0f}", INK, font=font(11), anchor=anchor)
    pen.text((corner[0] + LEFT + width / 2, at(0, low)[1] + 6), unit, INK, font=font(11), anchor="mt")
    for number, (label, curve) in enumerate(losses.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = [at(step, loss) for step, loss in curve if loss > 0]
        if len(line) > 1:
            pen.line(line, colour, width=2, joint="curve")
        pen.text((corner[0] + PANEL[0] - RIGHT, corner[1] + 8 + 14 * number), label, colour, font=font(12), anchor="rt")
