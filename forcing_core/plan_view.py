"""What a cache policy will do, before anything runs: a table of its plans, a picture of it, and the store's bytes.

The calls of a rollout are simulated with Python ints; no network, no keys. Frames are latent frames: frame 0 is
pixel frame 0, frame f > 0 starts at pixel frame 1 + 4 * (f - 1).
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Sequence

import torch
from torch import Tensor

from .errors import ForcingError
from .media import INK, PAPER, font, pillow
from .memory import memory_bytes, memory_host_bytes
from .plan import Block, Call, Plan, layout
from .policies import Policy, build
from .policies.base import storage_of
from .rollout import calls
from .store import Keys, Storage

FPS = 16
ROWS, COLUMNS = 24, 96  # most rows and columns that are drawn; longer videos are cut in the middle
COLOURS = {"block": (217, 95, 46), "past": (84, 134, 188), "sink": (38, 128, 112), "given": (226, 178, 62),
           "kept": (176, 196, 218), "tokens": (160, 142, 192), "evicted": (226, 226, 222), "future": PAPER}
LEGEND = {"block": "block being made", "past": "past in the window", "sink": "sink", "given": "given",
          "kept": "stored, not read", "tokens": "single or merged tokens kept", "evicted": "evicted"}
FAINT, FAR = (150, 150, 150), 64  # distances beyond FAR are drawn on a square-root axis


@dataclass(frozen=True)
class Row:
    """The first forward of one block, or a joint one of a whole window of blocks: source frames it reads, their
    temporal positions, positions of its own frames, the frames dropped since the row before, which of the read
    frames are sinks, which stored ones it does not read, and of which evicted ones tokens may be left, single or merged."""

    block: Block
    read: tuple[int, ...]
    positions: tuple[int, ...]
    query: tuple[int, ...]
    evicted: tuple[int, ...]
    sink: tuple[int, ...]
    kept: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def distances(self) -> tuple[int, ...]:
        """Temporal positions of the read frames, counted from the first frame of the block."""
        return tuple(position - self.query[0] for position in self.positions)


@dataclass(frozen=True)
class PlanTable:
    """The plans of one video. frames: latent frames in all, the `given` ones included. capacity, keys: the
    store that the policy needs. unit: what a row is, a block or a window of blocks."""

    options: object
    frames: int
    given: int
    capacity: int
    keys: Keys
    rows: tuple[Row, ...]
    unit: str = "block"


@dataclass(frozen=True)
class StoreShape:
    """What the size of a store depends on besides the policy. dim = heads * head_dim; height and width are those
    of the latent; element_size: bytes a number; conditions: 2 with classifier-free guidance. Defaults: Wan 1.3B,
    832x480, bfloat16."""

    layers: int = 30
    dim: int = 1536
    height: int = 60
    width: int = 104
    batch: int = 1
    element_size: int = 2
    conditions: int = 1

    def __post_init__(self):
        if self.height % 2 or self.width % 2 or min(vars(self).values()) < 1:
            raise ForcingError(f"A latent of {self.width}x{self.height} does not divide into 2x2 patches, or a number "
                               "of the shape is not positive. Use a width and a height divisible by 16 pixels.")

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width // 4


@dataclass(frozen=True)
class Announcement:
    """bytes: exactly what the stores of all conditions take of the device. text: one line for people. host_bytes: what
    they take of host memory beside that, where they are offloaded."""

    bytes: int
    text: str
    host_bytes: int = 0


def simulate(options, frames: int, *, block: int | None = None, given: int = 0, independent_first: bool = False,
             steps: int = 5) -> PlanTable:
    """The plans of a rollout over `frames` latent frames, the first `given` of which are given.

    block: frames a block, by default that of the options. steps: denoising steps, which set how many blocks a
    rolling window holds. Raises ForcingError for lengths that cannot be made.
    """
    size = options.block if block is None else block
    if size < 1 or given < 0:
        raise ForcingError(f"Blocks of {size} after {given} given frames make no sense. Use at least 1 and 0.")
    blocks = layout(frames - given, size, given=given, independent_first=independent_first)
    policy, sink = build(options, frames), getattr(options, "sink", 0)
    rows: list[Row] = []
    held: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()
    lingering = getattr(policy, "lingering", lambda evictions: ())
    left: list[tuple[int, ...]] = []  # by eviction: a policy may keep tokens of what left
    last: Call | None = None
    for call in calls(options.rollout, blocks, steps, given=given, block=size, independent_first=independent_first,
                      window=policy.capacity):
        if call == last:  # a further step of the same block changes nothing
            continue
        last = call
        plan, held = _call(policy, replace(call, held=held))
        gone += plan.evict
        left += [plan.evict] * bool(plan.evict)
        if call.phase == "noisy":
            rows.append(replace(_row(len(rows), call, plan, held, gone, sink), tokens=tuple(lingering(left))))
            gone = ()
    unit = "window" if options.rollout == "rolling" else "block"
    return PlanTable(options, frames, given, policy.capacity, policy.keys, tuple(rows), unit)


def _row(index: int, call: Call, plan: Plan, held: tuple[int, ...], gone: tuple[int, ...], sink: int) -> Row:
    own = dict(zip(call.span, plan.query))
    read, positions = plan.read + plan.own, plan.positions + tuple(own[f] for f in plan.own)
    return Row(Block(index, call.first, call.frames), read, positions, plan.query, gone,
               tuple(f for f in read if f < min(sink, call.first)), tuple(f for f in held if f not in read))


def _call(policy: Policy, call: Call) -> tuple[Plan, tuple[int, ...]]:
    """(plan, frames held afterwards)."""
    plan = policy.plan(call)
    return plan, tuple(sorted({*call.held, *plan.write} - {*plan.evict}))


def format_bytes(count: int) -> str:
    """3450470400 -> "3.45 GB (3,290.6 MiB)"; MB below 1e9 bytes."""
    decimal = f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
    return f"{decimal} ({count / 2 ** 20:,.1f} MiB)"


def announce(options, frames: int, shape: StoreShape = StoreShape()) -> Announcement:
    """The bytes of the stores for a video of `frames` latent frames, before anything is allocated."""
    policy, storage = build(options, frames), storage_of(options)
    sizes = {"layers": shape.layers, "frame_tokens": shape.frame_tokens, "dim": shape.dim, "batch": shape.batch,
             "element_size": shape.element_size}
    total, host = (shape.conditions * count(policy, storage, **sizes) for count in (memory_bytes, memory_host_bytes))
    many = f", {shape.conditions} conditions" if shape.conditions > 1 else ""
    batch = f", batch {shape.batch}" if shape.batch > 1 else ""
    where = f" on the device and {format_bytes(host)} in host memory" if storage.offload else ""
    return Announcement(total, f"KV store {format_bytes(total)}{where}: {policy.capacity} of {frames} latent frames, "
                               f"{shape.layers} layers x {shape.dim}, {shape.frame_tokens} tokens a frame, "
                               f"{_numbers(storage, 8 * shape.element_size)}{many}{batch}", host)


def _numbers(storage: Storage, bits: int) -> str:
    """What a number is in a store whose compute dtype has so many bits."""
    if storage.coder.exact:
        return f"{bits} bit"
    newest = f" (the newest {storage.dense} frames also {bits} bit)" if storage.dense else ""
    return f"{storage.codec} with scales{newest}"


def start_seconds(frame: int) -> float:
    """When a latent frame begins in the video."""
    return 0.0 if frame == 0 else (1 + 4 * (frame - 1)) / FPS


def title(table: PlanTable) -> str:
    """One line on policy and length."""
    options = table.options
    parts = [f"window {getattr(options, 'window', None) or 'everything'}", f"sink {getattr(options, 'sink', 0)}",
             f"{getattr(options, 'positions', 'absolute')} positions"]
    given = f", {table.given} given" if table.given else ""
    pixels = 1 + 4 * (table.frames - 1)
    return ", ".join(parts) + f"  |  {table.frames} latent frames{given} = {pixels} frames, {pixels / FPS:.1f} s"


def _cut(count: int, head: int, tail: int) -> list[int | None]:
    """Numbers 0..count-1, or the first `head` and the last `tail` of them around a None."""
    if head + tail >= count:
        return list(range(count))
    return [*range(head), None, *range(count - tail, count)]


def _visible(table: PlanTable) -> tuple[list[int | None], list[int | None]]:
    """(rows, columns) to draw: all, or the beginning and the end with None as the mark of the break."""
    rows = table.rows
    half = ROWS // 2 if len(rows) > ROWS else len(rows)
    if table.frames <= COLUMNS:
        return _cut(len(rows), half, half), _cut(table.frames, table.frames, 0)
    ends = [table.given, *(row.block.end for row in rows)]
    half = max(1, min(ROWS // 2, COLUMNS * 2 // 5 // max(after - before for before, after in zip(ends, ends[1:]))))
    head = min(rows[min(half, len(rows)) - 1].block.end, COLUMNS // 2)
    recent = [f for f in rows[-min(half, len(rows))].read if f >= getattr(table.options, "sink", 0)]
    tail = min(table.frames - min(recent), COLUMNS - head)
    return _cut(len(rows), half, half), _cut(table.frames, head, tail)


def _state(table: PlanTable, row: Row, frame: int) -> str:
    if row.block.first <= frame < row.block.end:
        return "block"
    if frame >= row.block.end:
        return "future"
    if frame not in row.read:
        return "kept" if frame in row.kept else "tokens" if frame in row.tokens else "evicted"
    return "sink" if frame in row.sink else "given" if frame < table.given else "past"


class _Axis:
    """Distances in time to pixels: linear, or square-root where a sink stands far away."""

    def __init__(self, rows: Sequence[Row], left: int, right: int):
        distances = [d for row in rows for d in (*row.distances, row.query[-1] - row.query[0])]
        self.low, self.high, self.root = min(0, min(distances)), max(distances) + 1, max(map(abs, distances)) > FAR
        self.left, self.scale = left, (right - left) / (self._bend(self.high) - self._bend(self.low))

    def _bend(self, d: float) -> float:
        return math.copysign(math.sqrt(abs(d)), d) if self.root else d

    def __call__(self, distance: float) -> float:
        return self.left + (self._bend(distance) - self._bend(self.low)) * self.scale

    def ticks(self) -> tuple[int, ...]:
        """A few round distances, the farthest first."""
        steps = (1, 5, 20, 100, 300, 1000, 3000) if self.root else range(0, 1 - self.low, 10 if self.low < -30 else 5)
        return tuple(-step for step in sorted({0, *steps}, reverse=True) if -step >= self.low)


class _Sheet:
    """The picture under way. Left the matrix of source frames, right the positions of the same rows."""

    def __init__(self, table: PlanTable, width: int):
        self.table, (self.rows, self.columns) = table, _visible(table)
        self.left, self.top, self.split = 118, 132, round(width * 0.64)
        self.cell = max(2, min(26, (self.split - 24 - self.left) // len(self.columns)))
        self.line = max(13, min(24, 560 // len(self.rows)))
        image, draw, _ = pillow()
        self.image = image.new("RGB", (width, self.top + self.line * len(self.rows) + 44), PAPER)
        self.pen, self.small, self.big = draw.Draw(self.image), font(12), font(16)
        drawn = [table.rows[number] for number in self.rows if number is not None]
        self.states = {_state(table, row, frame) for row in drawn for frame in self.columns if frame is not None}
        self.axis = _Axis(drawn, self.split + 24, width - 24)

    def text(self, x: float, y: float, words: str, anchor: str = "la", fill=INK) -> None:
        self.pen.text((x, y), words, fill, font=self.small, anchor=anchor)

    def header(self, announcement: Announcement) -> None:
        self.pen.text((16, 12), title(self.table), INK, font=self.big)
        self.text(16, 36, announcement.text)
        x = 16.0
        for name, words in LEGEND.items():
            if name not in self.states:
                continue
            self.pen.rectangle((x, 60, x + 12, 72), COLOURS[name])
            self.text(x + 18, 60, words)
            x += 40 + self.pen.textlength(words, font=self.small)
        self.text(self.left, self.top - 44, f"what each {self.table.unit} sees, by latent frame (time in the video below)")
        kind = " (square-root axis)" if self.axis.root else ""
        self.text(self.axis.left, self.top - 44, f"temporal position, {self.table.unit} starts at 0{kind}")

    def frame_axis(self) -> None:
        """Frame numbers above the matrix, their times below it."""
        step, bottom, last = max(1, round(52 / self.cell)), self.image.height - 38, -math.inf
        for place, frame in enumerate(self.columns):
            x = self.left + place * self.cell
            if frame is None or x - last < 46 or (frame % step and self.columns[place - 1] is not None):
                continue
            self.text(x, self.top - 18, f"{frame}", fill=FAINT)
            self.text(x, bottom, f"{start_seconds(frame):.1f} s", fill=FAINT)
            self.pen.line((x, self.top - 4, x, self.top), FAINT)
            last = x

    def position_axis(self) -> None:
        last = -math.inf
        for distance in self.axis.ticks():
            x = self.axis(distance)
            if x - last > 30:
                self.text(x, self.top - 18, f"{distance}", "ma", FAINT)
                self.pen.line((x, self.top - 4, x, self.top + self.line * len(self.rows)), COLOURS["evicted"])
                last = x

    def row(self, y: int, row: Row) -> None:
        name = f"{self.table.unit} {row.block.index}  {start_seconds(row.block.first):.1f} s"
        self.text(self.left - 8, y + self.line / 2, name, "rm")
        gap, bottom = 1 if self.cell > 4 else 0, y + self.line - 3
        for place, frame in enumerate(self.columns):
            x = self.left + place * self.cell
            if frame is None:
                self.text(x + self.cell / 2, y + self.line / 2, ":", "mm", FAINT)
                continue
            self.pen.rectangle((x, y, x + self.cell - 1 - gap, bottom), COLOURS[_state(self.table, row, frame)])
        for frame, distance in zip(row.read, row.distances, strict=True):
            left, right = self.axis(distance), self.axis(distance + 1) - (1 if self.axis.root else 2)
            self.pen.rectangle((left, y, max(left + 2, right), bottom), COLOURS[_state(self.table, row, frame)])

    def draw(self, announcement: Announcement) -> None:
        self.header(announcement)
        self.frame_axis()
        self.position_axis()
        for place, number in enumerate(self.rows):
            y = self.top + place * self.line
            if number is None:
                hidden = len(self.table.rows) + 1 - len(self.rows)
                self.text(self.left, y + self.line / 2, f". . .   {hidden} {self.table.unit}s not drawn   . . .", "lm", FAINT)
            else:
                self.row(y, self.table.rows[number])


def draw(table: PlanTable, shape: StoreShape = StoreShape(), *, width: int = 1200) -> Tensor:
    """The table as a picture: float32 [1, H, W, 3] in 0..1 (the layout of a ComfyUI IMAGE), at most `width`
    pixels wide and about 750 high. `shape` is for the line about the store. Raises ForcingError without Pillow."""
    if not 640 <= width <= 4096:
        raise ForcingError(f"A picture {width} pixels wide cannot be read. Use 640 to 4096.")
    sheet = _Sheet(table, width)
    sheet.draw(announce(table.options, table.frames, shape))
    pixels = torch.frombuffer(bytearray(sheet.image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, sheet.image.height, sheet.image.width, 3).float() / 255
