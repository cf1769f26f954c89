"""The evaluation: every setting at every length, one row of figures each, beside rendered clips of the same captions."""
from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Callable, Sequence

from ..errors import ForcingError
from ..micro import bundle, metrics, temporal, world
from ..micro.captions import parse
from ..micro.observe import frames_of
from ..noise import mix
from .rollouts import Made, Models, Turn, latent_frames, roll, times
from .settings import BLOCK, Setting

if TYPE_CHECKING:
    from numpy import ndarray

SECONDS = (5.0, 30.0, 120.0)
LONGEST = 3600.0
CAPTIONS = ((10.0, 24), (60.0, 8), (math.inf, 4))  # (up to so many seconds, captions): fewer where videos are long
QUICK_CAPTIONS = 6
SWITCH_SECONDS = (5.0, 10.0)  # shortest and longest video in which a prompt switch is measured
RENDERED = "rendered"
NO_SWITCH = {"switch_delay_frames": None, "switched": None, "switch_seconds": None, "transition": None,
             "switch_note": f"a video of less than {SWITCH_SECONDS[0]:g} s has no time for one"}
_SWITCH = 0x5C  # stream of random numbers


@dataclass(frozen=True)
class Options:
    """settings: what is compared. seconds: lengths, each rounded up to whole blocks. captions: clips a setting, None is
    by length. seed: of captions and noise. Raises ForcingError for lengths or numbers that cannot be made."""

    settings: tuple[Setting, ...]
    seconds: tuple[float, ...] = SECONDS
    captions: int | None = None
    seed: int = 0

    def __post_init__(self):
        for value in self.seconds:
            if not (math.isfinite(value) and 0 < value <= LONGEST):
                raise ForcingError(f"Videos of {value:g} seconds cannot be made. "
                                   f"Use more than 0 and at most {LONGEST:g} seconds.")
        if self.captions is not None and self.captions < 1:
            raise ForcingError(f"{self.captions} captions measure nothing. Use at least 1.")
        object.__setattr__(self, "seconds", tuple(sorted(set(self.seconds))))

    def clips(self, seconds: float) -> int:
        """How many captions are rolled out at that length."""
        return self.captions or next(count for limit, count in CAPTIONS if seconds <= limit)

    def specs(self, seconds: float) -> list[world.ClipSpec]:
        """Clips whose captions no network was trained on; the longer lengths have the first of them."""
        return world.specs(world.draw(self.seed, self.clips(seconds), split="test"))


@dataclass(frozen=True)
class Progress:
    """Where an evaluation stands. part: "video" or "prompt switch"."""

    run: int
    runs: int
    setting: str
    seconds: float
    part: str
    block: int
    blocks: int


@dataclass
class Results:
    """rows: one a setting and length; reference: rendered clips, measured alike; skipped: what could not be run, and why.

    tiles: pictures of the first caption, {(name, seconds): uint8 arrays [64, 64, 3]}. switches: figures of the prompt switch,
    which a setting makes once, by its name.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    reference: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    tiles: dict[tuple[str, float], list[ndarray]] = field(default_factory=dict)
    switches: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: bool = False


class _Stopped(Exception):
    pass


def evaluate(options: Options, models: Models, *, stop: Callable[[], bool] = lambda: False,
             progress: Callable[[Progress], None] = lambda _: None,
             finished: Callable[[Results], None] = lambda _: None) -> Results:
    """Run everything, the shortest length first.

    stop: asked after every block; once it says True, the rows that are finished are returned. finished: told after
    every row. A setting that cannot make a length is skipped and named in the results.
    """
    results, runs = Results(), len(options.settings) * len(options.seconds)
    run = 0
    try:
        for seconds in options.seconds:
            _rendered(options, seconds, results)
            for setting in options.settings:
                run += 1

                def tick(part, block, blocks, at=(run, runs, setting.name, seconds)):
                    progress(Progress(*at, part, block, blocks))
                    if stop():
                        raise _Stopped

                try:
                    _setting(options, setting, seconds, models, results, tick)
                except ForcingError as error:
                    results.skipped.append({"settings": setting.name, "seconds": seconds, "why": str(error)})
                finished(results)
    except _Stopped:
        results.stopped = True
    return results


def _setting(options: Options, setting: Setting, seconds: float, models: Models, results: Results,
             tick: Callable[[str, int, int], None]) -> None:
    begin, specs = time.perf_counter(), options.specs(seconds)
    captions = [world.caption(spec) for spec in specs]
    frames = latent_frames(seconds, setting.preset.block)
    made = roll(models, setting, captions, frames, options.seed, lambda *at: tick("video", *at))
    if seconds >= SWITCH_SECONDS[0] and setting.name not in results.switches:
        results.switches[setting.name] = _switch(options, setting, specs, seconds, models,
                                                 lambda *at: tick("prompt switch", *at))
    results.tiles[setting.name, seconds] = made.tiles
    results.rows.append({
        "settings": setting.name, "title": setting.title, "network": setting.network, "seconds": seconds,
        "captions": len(specs), "first_caption": captions[0], **measure(made, captions),
        **results.switches.get(setting.name, NO_SWITCH),
        "store_bytes": made.store_bytes // len(specs), "seconds_per_block": made.seconds_per_block,
        "seconds_in_all": round(time.perf_counter() - begin, 1)})


def measure(made: Made, captions: Sequence[str]) -> dict[str, Any]:
    """The figures of `metrics.report`, the standard error of `drift`, and `drift_curve`: its mean for each whole second."""
    parsed = [parse(caption) for caption in captions]
    seen = metrics.align(made.observation, parsed)
    curves, each = temporal.drift_curves(seen), temporal.drift(seen)["drift"]
    curve = (curves["colour"] + curves["background"])[:, :max(1, made.pixels.frames // temporal.SECOND)]
    error = each.std().item() / len(captions) ** 0.5 if len(captions) > 1 else math.nan
    return {**metrics.figures(seen, parsed, made.pixels, made.sizes), "drift_error": error,
            "drift_curve": curve.nanmean(0).tolist()}


def _switch(options: Options, setting: Setting, specs: Sequence[world.ClipSpec], seconds: float, models: Models,
            tick: Callable[[int, int], None]) -> dict[str, Any]:
    """Frames from the first one made for another caption until the clip shows it: the median over the clips that got there,
    None where none did or where the setting cannot switch; and the share of them. The switch is in the middle of a video
    of its own, of at most the longer one of SWITCH_SECONDS, by the transition of the setting."""
    frames = latent_frames(min(seconds, SWITCH_SECONDS[1]), setting.preset.block)
    turn = Turn(frames // setting.preset.block // 2, other_captions(specs, options.seed))
    try:
        made = roll(models, setting, [world.caption(spec) for spec in specs], frames, options.seed, tick, turn)
    except ForcingError as error:
        return {**NO_SWITCH, "switch_note": str(error)}
    delays = metrics.switch_delay_frames(made.observation, turn.captions, 0)
    obeyed = [delay for delay in delays if delay is not None]
    return {"switch_delay_frames": median(obeyed) if obeyed else None, "switched": len(obeyed) / len(delays),
            "switch_seconds": (4 * frames - 3) / world.FPS, "transition": setting.transition, "switch_note": ""}


def other_captions(specs: Sequence[world.ClipSpec], seed: int) -> list[str]:
    """For each clip the caption of another one that differs in colour and in shape."""
    pool = world.specs(world.draw(mix(seed, _SWITCH), 64, split="test"))
    chosen = []
    for number, spec in enumerate(specs):
        old = spec.things[0]
        turned = pool[number % len(pool):] + pool[:number % len(pool)]
        chosen.append(next(clip for clip in turned
                           if clip.things[0].colour != old.colour and clip.things[0].shape != old.shape))
    return [world.caption(spec) for spec in chosen]


def _rendered(options: Options, seconds: float, results: Results) -> None:
    """The clips that the captions were taken from, as the yardstick sees them."""
    specs, blocks = options.specs(seconds), latent_frames(seconds, BLOCK) // BLOCK
    captions, made = [world.caption(spec) for spec in specs], Made(times(4 * BLOCK * blocks - 3), [BLOCK] * blocks)
    ends = [0, *(4 * BLOCK * (block + 1) - 3 for block in range(blocks))]
    for start, end in zip(ends, ends[1:]):
        made.look(frames_of(world.render(specs, end - start, start=start)))
    results.tiles[RENDERED, seconds] = made.tiles
    results.reference.append({"settings": RENDERED, "title": "what the captions say", "seconds": seconds,
                              "captions": len(specs), **measure(made, captions)})


def report(options: Options, models: Models, results: Results, machine: dict[str, Any],
           ablations: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Everything as strict JSON: what was not measured (NaN) is null."""
    return strict({
        "rows": results.rows, "reference": results.reference, "skipped": results.skipped, "stopped": results.stopped,
        "ablations": list(ablations), "seed": options.seed, "machine": machine,
        "captions": [world.caption(spec) for spec in options.specs(options.seconds[0])],
        "training": {name: bundle.training(name, models.folder) for name in (*models.nets, "vae")}})


def strict(value: Any) -> Any:
    """The same without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load(folder: Path | None, settings: Sequence[Setting]) -> Models:
    """The models that the settings need. Raises ForcingError where one is missing."""
    return Models(folder or bundle.WEIGHTS, (setting.network for setting in settings))
