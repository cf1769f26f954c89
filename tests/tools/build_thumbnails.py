"""Write workflows/*.jpg: a title card with the plan of the rollout, one row a block, one column a latent frame.

    python tests/tools/build_thumbnails.py [NAME ...]
"""
import sys
from dataclasses import dataclass

import bench
from examples import LONG, SMALL
from forcing_pack.forcing_core import plan_view
from forcing_pack.forcing_core.media import font
from forcing_pack.forcing_core.options import from_preset
from forcing_pack.forcing_core.presets import get
from PIL import Image, ImageDraw

SIZE, SCALE, LIMIT = (640, 360), 2, 100_000
TOP, BOTTOM, TITLE, TEXT, FAINT = (22, 26, 36), (38, 44, 60), (245, 245, 242), (176, 184, 200), (58, 65, 84)
STATES = {**plan_view.COLOURS, "evicted": (50, 56, 74), "future": None}
LEFT, RIGHT, HIGH, LOW = 300, 604, 52, 288


@dataclass(frozen=True)
class Card:
    """title: lines of the heading. frames, given: of the plan in latent frames."""

    title: tuple
    text: tuple
    preset: str
    frames: int = 21
    given: int = 0
    cache: object = None


CARDS = {
    "self_forcing_t2v": Card(("Self Forcing",), ("Text to video", "5 s, 4 steps a block"), "self-forcing"),
    "causal_forcing_framewise_t2v": Card(("Causal", "Forcing"), ("Text to video", "Frame by frame, 4 steps"),
                                         "causal-forcing-framewise"),
    "causal_forcing_framewise_i2v": Card(("Causal", "Forcing"), ("Image to video", "Frame by frame, 4 steps"),
                                         "causal-forcing-framewise", given=1),
    "causal_forcing_pp_2step_t2v": Card(("Causal", "Forcing++"), ("Text to video", "Frame by frame, 2 steps"),
                                        "causal-forcing++-2step"),
    "longlive_30s": Card(("LongLive",), ("Text to video", "30 s, constant memory"), "longlive", 120),
    "extend_video": Card(("Extend", "a video"), ("5 s + 5 s, two prompts", "Self Forcing with a sink"), "self-forcing",
                         42, 21, LONG),
    "low_vram_fp8": Card(("Little", "memory"), ("Text to video in fp8", "Small, compact cache"), "self-forcing",
                         cache=SMALL),
}


def main():
    for name in sys.argv[1:] or CARDS:
        path = bench.WORKFLOWS / f"{name}.jpg"
        draw(CARDS[name]).save(path, quality=88, optimize=True)
        if path.stat().st_size > LIMIT:
            sys.exit(f"{path.name} takes {path.stat().st_size} bytes; templates stay below {LIMIT}")


def draw(card):
    """Drawn twice as large and scaled down, so that thin cells stay clean."""
    width, height = (side * SCALE for side in SIZE)
    image = Image.linear_gradient("L").resize((width, height))
    image = Image.composite(Image.new("RGB", image.size, BOTTOM), Image.new("RGB", image.size, TOP), image)
    pen = ImageDraw.Draw(image)
    write(pen, card)
    table = plan_view.simulate(from_preset(get(card.preset), card.cache).cache, card.frames, given=card.given)
    plan(pen, table)
    legend(pen, table)
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def write(pen, card):
    y = 52
    for line in card.title:
        pen.text((36 * SCALE, y * SCALE), line, TITLE, font=font(42 * SCALE))
        y += 48
    y += 14
    for line in card.text:
        pen.text((36 * SCALE, y * SCALE), line, TEXT, font=font(19 * SCALE))
        y += 27
    pen.text((36 * SCALE, 318 * SCALE), "ComfyUI-Forcing", TEXT, font=font(14 * SCALE))


def plan(pen, table):
    wide, high = (RIGHT - LEFT) / table.frames, (LOW - HIGH) / len(table.rows)
    gap = 0.12 * min(wide, high) if wide > 4 else 0
    for number, row in enumerate(table.rows):
        for frame in range(row.block.end):
            box = (LEFT + frame * wide, HIGH + number * high, LEFT + (frame + 1) * wide - gap,
                   HIGH + (number + 1) * high - max(gap, 0.8))
            pen.rectangle([side * SCALE for side in box], STATES[state(table, row, frame)])


def state(table, row, frame):
    """What `frame` is to the block of `row`; a key of plan_view.COLOURS."""
    if frame >= row.block.first:
        return "block"
    if frame not in row.read:
        return "evicted"
    return "sink" if frame in row.sink else "given" if frame < table.given else "past"


def legend(pen, table):
    """Names of the colours that this plan has, and where time goes."""
    seen = {state(table, row, frame) for row in table.rows for frame in range(row.block.end)}
    names = {"sink": "sink", "given": "given", "past": "window", "block": "new", "evicted": "dropped"}
    x = LEFT
    for key, name in names.items():
        if key in seen:
            pen.rectangle([side * SCALE for side in (x, 312, x + 11, 323)], STATES[key])
            pen.text(((x + 16) * SCALE, 309 * SCALE), name, TEXT, font=font(13 * SCALE))
            x += 26 + pen.textlength(name, font=font(13 * SCALE)) / SCALE
    pen.line([side * SCALE for side in (LEFT, 296, RIGHT, 296)], FAINT, SCALE)


if __name__ == "__main__":
    main()
