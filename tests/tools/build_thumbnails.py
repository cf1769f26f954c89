"""Write workflows/*.jpg: a title card with the plan of the rollout, one row a block, one column a latent frame.

    python tests/tools/build_thumbnails.py [NAME ...]

The card of `hello` shows pictures of the bundled model instead, so it needs the trained weights.
"""
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Callable

import bench
import stream_pictures
from examples import COMPARED_MICRO, SMALL
from examples_clips import CLIPS
from examples_knot import SHORT
from examples_long import COMPARED, LONG
from forcing_pack.forcing_core import plan_view
from forcing_pack.forcing_core.media import font
from forcing_pack.forcing_core.micro.source import MicroSource
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.options import from_preset
from forcing_pack.forcing_core.plan import Block
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.rollout.clips import Clips, lay
from forcing_pack.forcing_core.standalone import preset_rollout, window_options
from PIL import Image, ImageDraw

SIZE, SCALE, LIMIT = (640, 360), 2, 100_000
TOP, BOTTOM, TITLE, TEXT, FAINT = (22, 26, 36), (38, 44, 60), (245, 245, 242), (176, 184, 200), (58, 65, 84)
STATES = {**plan_view.COLOURS, "evicted": (50, 56, 74), "future": None}
LEFT, RIGHT, HIGH, LOW = 300, 604, 52, 288
COLUMNS = 4  # of pictures
BETWEEN = 10  # plans


@dataclass(frozen=True)
class Card:
    """title: lines of the heading. frames, given: of the plan in latent frames. caches: policies that are drawn, one
    below the other; None is the preset's own. captions: of the bundled model's clips that are shown in place of plans,
    one a row. rows: makes such clips. clips: of a bidirectional model, in place of a preset's plan."""

    title: tuple
    text: tuple
    preset: str
    frames: int = 21
    given: int = 0
    caches: tuple = (None,)
    captions: tuple = ()
    rows: Callable | None = None
    clips: Clips | None = None


CARDS = {
    "hello": Card(("Hello",), ("Text to video", "Nothing to download"), "self-forcing", captions=(
        "a red circle moving right on a dark background", "a yellow triangle moving up on a light background",
        "a blue square moving down on a light background", "a green circle moving left on a dark background")),
    "self_forcing_t2v": Card(("Self Forcing",), ("Text to video", "5 s, 4 steps a block"), "self-forcing"),
    "causal_forcing_framewise_t2v": Card(("Causal", "Forcing"), ("Text to video", "Frame by frame, 4 steps"),
                                         "causal-forcing-framewise"),
    "causal_forcing_framewise_i2v": Card(("Causal", "Forcing"), ("Image to video", "Frame by frame, 4 steps"),
                                         "causal-forcing-framewise", given=1),
    "causal_forcing_pp_2step_t2v": Card(("Causal", "Forcing++"), ("Text to video", "Frame by frame, 2 steps"),
                                        "causal-forcing++-2step"),
    "longlive_30s": Card(("LongLive",), ("Text to video", "30 s, constant memory"), "longlive", 120),
    "longlive_60s_prompts": Card(("LongLive", "with prompts"), ("Text to video", "1 min, four prompts"), "longlive", 240),
    "multi_scene_story": Card(("A story in", "four scenes"), ("Text to video, 20 s", "Flush, cut, recache"), "longlive", 81),
    "extend_video": Card(("Extend", "a video"), ("5 s + 5 s, two prompts", "Self Forcing with a sink"), "self-forcing",
                         42, 21, (LONG,)),
    "low_vram_fp8": Card(("Little", "memory"), ("Text to video in fp8", "Small, compact cache"), "self-forcing",
                         caches=(SMALL,)),
    "rolling_forcing_30s": Card(("Rolling", "Forcing"), ("Text to video, 30 s", "Five blocks at once"), "rolling-forcing", 120),
    "reward_forcing_60s": Card(("Reward", "Forcing"), ("Text to video, 1 min", "Window of 9, EMA sink"), "reward-forcing", 240),
    "deep_forcing_60s": Card(("Deep", "Forcing"), ("Text to video, 1 min", "Self Forcing weights"), "deep-forcing", 240),
    "compare_long_self_forcing": Card(("Compare", "memories"), ("15 s, side by side", "Self Forcing weights"), "self-forcing",
                                      60, caches=tuple(COMPARED.values())[:3]),
    "sparse_micro": Card(("Sparse", "attention"), ("AnnSA, 28 % of the keys", "Nothing to download"), "self-forcing", 21),
    "compare_micro": Card(("Compare", "memories"), ("10 s, side by side", "Nothing to download"), "self-forcing", 42,
                          caches=tuple(COMPARED_MICRO.values())),
    "endless_stream": Card(("Endless", "stream"), ("Written while it is made", "Nothing to download"), "self-forcing",
                           rows=stream_pictures.endless_stream),
    "knot_reference": Card(("Stay close", "to a picture"), ("Text to video, 5 s", "Knots, reference ahead"), "self-forcing",
                           caches=(SHORT,)),
    "resume_and_branch": Card(("Resume", "and branch"), ("One beginning, three ends", "Nothing to download"), "self-forcing",
                              rows=stream_pictures.resume_and_branch),
    "video_continuation": Card(("Go on with", "a video"), ("Video to video", "Nothing to download"), "self-forcing",
                               rows=stream_pictures.video_continuation),
    "restyle_video": Card(("Restyle", "a video"), ("Video to video", "Nothing to download"), "self-forcing",
                          rows=stream_pictures.restyle_video),
    "portrait_micro": Card(("A portrait", "that speaks"), ("Driven by sound", "Nothing to download"), "self-forcing", 42,
                           caches=(SHORT,)),
    "portrait_idle": Card(("An idle", "portrait"), ("Moved by live prompts", "Nothing to download"), "self-forcing",
                          rows=stream_pictures.portrait_idle),
    "portrait_vace": Card(("Portrait", "with VACE"), ("Face from a picture,", "motion from a video"), "self-forcing", 81,
                          caches=(SHORT,)),
    "portrait_s2v": Card(("Live", "Avatar"), ("A picture and a voice", "12 frames a step, no end"), "live-avatar", 60),
    "portrait_animate": Card(("Animate", "without end"), ("Clip after clip,", "latents handed over"), "", 74, clips=CLIPS),
    "live_camera": Card(("LIVE",), ("A camera in a picture", "Frame by frame"), "live", rows=stream_pictures.live_camera),
    "live_steer": Card(("A world", "you steer"), ("Arrow keys, frame by frame", "Nothing to download"), "live",
                       rows=stream_pictures.live_steer),
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
    if card.captions or card.rows:
        clips(image, card.rows() if card.rows else [clip(caption, 1) for caption in card.captions])
        return image.resize(SIZE, Image.Resampling.LANCZOS)
    tables = [clip_table(card)] if card.clips else [table_of(card, cache) for cache in card.caches]
    high = (LOW - HIGH + BETWEEN) / len(tables)
    for number, table in enumerate(tables):
        plan(pen, table, HIGH + number * high, HIGH + (number + 1) * high - BETWEEN)
    legend(pen, tables)
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


def clips(image, rows):
    """Evenly spaced pictures of every clip, one below the other."""
    side, gap = 64, (RIGHT - LEFT - COLUMNS * 64) // (COLUMNS - 1)
    top = (SIZE[1] - len(rows) * (side + gap) + gap) // 2
    for row, pictures in enumerate(rows):
        for column in range(COLUMNS):
            picture = Image.fromarray(pictures[column * (len(pictures) - 1) // (COLUMNS - 1)])
            place = LEFT + column * (side + gap), top + row * (side + gap)
            image.paste(picture.resize((side * SCALE,) * 2, Image.Resampling.NEAREST), [x * SCALE for x in place])


def clip(caption, seed, frames=21):
    """Pictures of the bundled model, uint8 [H, W, 3]."""
    preset, source = get("micro"), MicroSource(caption)
    size = source.latent_size(*source.size)
    denoiser, decode = source.denoiser(preset, window_options(preset), frames, size), source.decoder()
    noise = BlockNoise(seed, (1, source.channels), size)
    return [picture for _, x0 in preset_rollout(preset, denoiser, frames, noise) for picture in decode(x0)]


def table_of(card, cache):
    options = from_preset(get(card.preset), cache)
    return plan_view.simulate(options.cache, card.frames, given=card.given, steps=len(options.expected) - 1)


def clip_table(card):
    """The same with a row for every clip; what is handed over is given."""
    rows = [SimpleNamespace(block=Block(clip.index, clip.first + clip.given, clip.frames - clip.given), sink=(), kept=(),
                            tokens=(), read=range(clip.first, clip.first + clip.given))
            for clip in lay(card.frames, card.clips)]
    return SimpleNamespace(rows=rows, frames=card.frames, given=card.frames)


def plan(pen, table, top, bottom):
    wide, high = (RIGHT - LEFT) / table.frames, (bottom - top) / len(table.rows)
    gap = 0.12 * min(wide, high) if wide > 4 else 0
    for number, row in enumerate(table.rows):
        for frame in range(row.block.end):
            box = (LEFT + frame * wide, top + number * high, LEFT + (frame + 1) * wide - gap,
                   top + (number + 1) * high - max(gap, 0.8))
            pen.rectangle([side * SCALE for side in box], STATES[state(table, row, frame)])


def state(table, row, frame):
    """What `frame` is to the block of `row`; a key of plan_view.COLOURS."""
    if frame >= row.block.first:
        return "block"
    if frame not in row.read:
        return "kept" if frame in row.kept else "tokens" if frame in row.tokens else "evicted"
    return "sink" if frame in row.sink else "given" if frame < table.given else "past"


def legend(pen, tables):
    """Names of the colours that these plans have, and where time goes."""
    seen = {state(table, row, frame) for table in tables for row in table.rows for frame in range(row.block.end)}
    names = {"sink": "sink", "given": "given", "past": "window", "block": "new", "tokens": "tokens", "kept": "kept",
             "evicted": "dropped"}
    x = LEFT
    for key, name in names.items():
        if key in seen:
            pen.rectangle([side * SCALE for side in (x, 312, x + 11, 323)], STATES[key])
            pen.text(((x + 16) * SCALE, 309 * SCALE), name, TEXT, font=font(13 * SCALE))
            x += 26 + pen.textlength(name, font=font(13 * SCALE)) / SCALE
    pen.line([side * SCALE for side in (LEFT, 296, RIGHT, 296)], FAINT, SCALE)


if __name__ == "__main__":
    main()
