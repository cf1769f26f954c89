"""The micro portrait, run with and without the parts of Knot Forcing, and measured from its pixels.

All ways have the same network, steps, window and driving tracks. Source of the parts: arXiv 2512.21734 (Knot Forcing).
Axes: B people, F latent frames; latents [B, 16, F, 8, 8].
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import ForcingError
from ..media import save_png
from ..micro import face
from ..micro.code import LinearCode
from ..micro.face_metrics import FIRST, Truth, measure, scores, truth
from ..micro.portrait import Drive, Portrait, driven
from ..micro.temporal import SECOND
from ..noise import BlockNoise, mix
from ..plan import Block, layout
from ..policies import ReferenceOptions, WindowOptions
from ..presets import FEW_STEP
from ..rollout import Knot, knot_rollout
from ..schedule import levels
from . import plots
from .settings import BLOCK
from .tables import table

if TYPE_CHECKING:
    from PIL.Image import Image

WINDOW, SHIFT = 9, 5.0
CLIP, OVERLAP = 21, 3  # latent frames of an overlapping clip, and those that it takes over
PART = 16  # latent frames decoded at once
AHEAD = ReferenceOptions(window=WINDOW, block=BLOCK, positions="relative")
SINK = WindowOptions(window=WINDOW + 1, sink=1, block=BLOCK, positions="relative")
START = WindowOptions(window=WINDOW, block=BLOCK, positions="relative")
RENDERED = "rendered"
# what the whole of Knot Forcing is asked for: figure -> (is it enough, in words)
GOALS: dict[str, tuple[Callable[[float], bool], str]] = {
    "identity_ratio": (lambda value: value <= 1.5, "identity at most 1.5x that of the first 5 s"),
    "mouth": (lambda value: value >= 0.9, "mouth correlates at least 0.9"),
    "seam_roughness": (lambda value: value <= 1.2, "seams at most 1.2x as rough"),
}
Show = Callable[[str], None]


@dataclass(frozen=True)
class Way:
    """knot: its latent frames. cache: the memory; where it has no room for a reference, that is the frame before the video.
    clips: overlapping clips, each with a memory of its own."""

    title: str
    knot: int = 1
    cache: WindowOptions = AHEAD
    clips: bool = False


WAYS = {
    "knot": Way("knot and reference running ahead"),
    "no-knot": Way("without knot", knot=0),
    "not-ahead": Way("reference as a sink, not ahead", cache=SINK),
    "start-only": Way("reference as the first frame only", cache=START),
    "clips": Way(f"clips of {CLIP} latents, {OVERLAP} shared", knot=0, clips=True),
}


@dataclass(frozen=True)
class Scene:
    """People and what moves them. reference: latents [B, 16, 1, 8, 8]; drive: of all frames and of a knot behind them."""

    reference: Tensor
    drive: Tensor
    true: Truth
    frames: int


def scene(code: LinearCode, people: int, frames: int, seed: int) -> Scene:
    """People whom no training saw, over `frames` latent frames."""
    who = face.identities(mix(seed, 0xE7A1), people)
    drive = face.eased(face.track(mix(seed, 0xE7A1), people, 4 * (frames + 1) - 3))
    puppets = [code.encode(face.driver(torch.cat([drive[:, :, :1], part], 2)))[:, :, 1:]
               for part in drive[:, :, 1:].split(4 * PART, 2)]
    first = code.encode(face.driver(drive[:, :, :1]))
    return Scene(code.encode(face.reference(who)[:, :, None]), torch.cat([first, *puppets], 2),
                 truth(who, drive[:, :, :4 * frames - 3]), frames)


def rollout(way: Way, portrait: Portrait, at: Scene, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(latent frames of a block, x0) of a video, in order."""
    if way.clips:
        yield from _clips(portrait, at, seed)
        return
    ahead = isinstance(way.cache, ReferenceOptions)
    given = 0 if ahead else 1
    target = driven(portrait, way.cache, at.frames + given, Drive(at.drive, -given), way.knot)
    context = {"reference": at.reference} if ahead else {"context": at.reference}
    yield from _made(target, layout(at.frames, BLOCK, given=given), seed, knot=Knot(way.knot), **context)


def _clips(portrait: Portrait, at: Scene, seed: int) -> Iterator[tuple[int, Tensor]]:
    done, newest = 0, None
    while done < at.frames:
        given = 0 if newest is None else OVERLAP
        count = min(CLIP - given, at.frames - done)
        target = driven(portrait, AHEAD, CLIP, Drive(at.drive, done - given))
        for size, x0 in _made(target, layout(count, BLOCK, given=given), mix(seed, done), reference=at.reference,
                              context=newest):
            newest = x0
            yield size, x0
        done += count


def _made(target: Any, blocks: Sequence[Block], seed: int, **more: Any) -> Iterator[tuple[int, Tensor]]:
    batch, channels, _, *size = target.drive.latents.shape
    noise = BlockNoise(seed, (batch, channels), tuple(size))
    for block, x0 in knot_rollout(target, blocks, levels(FEW_STEP, SHIFT), noise, block=BLOCK, **more):
        yield block.frames, x0


def decoded(code: LinearCode, latents: Tensor) -> Tensor:
    """Video [B, 3, T, 64, 64] in float16."""
    first = latents[:, :, :1]
    parts = [code.decode(torch.cat([first, part], 2))[:, :, 1:].half() for part in latents[:, :, 1:].split(PART, 2)]
    return torch.cat([code.decode(first).half(), *parts], 2)


def seams(way: Way, sizes: Sequence[int]) -> list[int]:
    """Blocks whose borders count as seams: those of the clips, where the video is made of clips."""
    if not way.clips:
        return list(sizes)
    left, out = sum(sizes), []
    while left:
        out.append(min(CLIP - (OVERLAP if out else 0), left))
        left -= out[-1]
    return out


@torch.no_grad()
def evaluate(portrait: Portrait, seconds: float, people: int, seed: int, show: Show = lambda _: None) -> dict[str, Any]:
    """Rows of all ways and of the rendered truth as the code shows it, with verdicts on the first.

    Raises ForcingError for a video of less than two blocks.
    """
    frames = BLOCK * round((seconds * SECOND + 3) / 4 / BLOCK)
    if frames < 2 * BLOCK or people < 1:
        raise ForcingError(f"{people} people over {seconds:g} s are too little. Use at least 1, and 2 seconds.")
    show("painting")
    at = scene(portrait.code, people, frames, seed)
    rendered = at.true.video.float().div(127.5).sub(1)
    coded = decoded(portrait.code, _encoded(portrait.code, rendered))
    plain = measure(coded, at.true)
    rows = [{"settings": RENDERED, "title": "rendered, through the code", **scores(plain, [BLOCK] * (frames // BLOCK))}]
    pictures = {RENDERED: coded[0, :, _shown(coded.shape[2])].float()}
    for name, way in WAYS.items():
        show(way.title)
        begin, sizes, parts = time.perf_counter(), [], []
        for size, x0 in rollout(way, portrait, at, seed):
            sizes.append(size)
            parts.append(x0)
        spent = time.perf_counter() - begin
        video = decoded(portrait.code, torch.cat(parts, 2))
        rows.append({"settings": name, "title": way.title, **scores(measure(video, at.true), seams(way, sizes)),
                     "seconds_per_block": spent / len(sizes)})
        pictures[name] = video[0, :, _shown(video.shape[2])].float()
    goals = {text: ok(rows[1][figure]) for figure, (ok, text) in GOALS.items()}
    return {"seconds": (4 * frames - 3) / SECOND, "people": people, "seed": seed, "rows": rows, "goals": goals,
            "pictures": pictures}


def _encoded(code: LinearCode, video: Tensor) -> Tensor:
    first = video[:, :, :1]
    parts = [code.encode(torch.cat([first, part], 2))[:, :, 1:] for part in video[:, :, 1:].split(4 * PART, 2)]
    return torch.cat([code.encode(first), *parts], 2)


def _shown(frames: int) -> list[int]:
    """Numbers of the frames on the contact sheet."""
    return [round(n * (frames - 1) / 7) for n in range(8)]


def lines(result: dict[str, Any]) -> list[str]:
    """A table, and what was asked for."""
    columns = {"identity": "identity_first", "worst 5 s": "identity_worst", "last 5 s": "identity_last",
               "ratio": "identity_ratio", "mouth": "mouth", "seams": "seam_roughness"}
    cells = [[row["title"], *(f"{row[key]:.3f}" for key in columns.values())] for row in result["rows"]]
    words = {True: "yes", False: "no"}
    return [f"{result['seconds']:.1f} s, {result['people']} people", *table([["way", *columns], *cells]), "",
            *(f"{words[ok]}: {text}" for text, ok in result["goals"].items()), "",
            f"identity: RGB distance of skin, hair, eyes, shirt and wall from the true colours over the first {FIRST} s, the",
            "worst and the last; mouth: correlation of its opening with the driving signal; seams: change of the error where",
            "blocks (or clips) meet, over that inside of them."]


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """portrait.png, the identity error over time, and portrait-sheet.png, in an existing folder."""
    names = list(WAYS)
    titles = {row["title"]: row for row in result["rows"]}

    def colour(title: str) -> tuple[int, int, int]:
        name = titles[title]["settings"]
        return plots.PALETTE[names.index(name)] if name in names else plots.FAINT

    rows = [{"settings": row["title"], "drift_curve": row["curve"]} for row in result["rows"]]
    made: dict[str, Image] = {"portrait.png": plots.drift_plot(
        rows, "Identity", "how far the colours of a face are from its own (RGB distance), by second", colour)}
    tiles = [(row["settings"], row["title"], [_picture(p) for p in result["pictures"][row["settings"]].unbind(1)])
             for row in result["rows"]]
    times = [n * result["seconds"] / 7 for n in range(8)]
    made["portrait-sheet.png"] = plots.sheet(tiles, times, "the first person; the rendered face is shown as the code holds it",
                                             "The same face and the same driving track in every way")
    for name, image in made.items():
        save_png(image, folder / name)
    return [folder / name for name in made]


def _picture(pixels: Tensor) -> Any:
    return pixels.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
