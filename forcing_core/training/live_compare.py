"""LIVE in small with and without cycle consistency, after a minute of random keys: figures from pixels, a table, a plot.

Both networks play the same keys in the same worlds from the same noise. Every figure is read from decoded pictures and
compared with the world as it has to be.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from torch import Tensor

from ..live.model import LiveModel
from ..live.rollout import live_rollout
from ..live.there_and_back import there_and_back
from ..media import save_png
from ..micro import steer
from ..micro.code import LinearCode
from ..micro.live import NETWORKS, STEPS, encode
from ..noise import BlockNoise, mix
from .plot import picture
from .state import write_whole

REPORT, PLOT = "live_report.json", "live.png"
LAST = 5  # seconds at the end that count as "at the end"
HEAD = ("", "keys obeyed", "picture error", "place error", "kept", "there and back")


@dataclass(frozen=True)
class Options:
    """seconds of play of so many worlds; steps of every frame; back: seconds there, and as many back."""

    seconds: int = 60
    worlds: int = 64
    steps: int = STEPS
    back: int = 10
    seed: int = 1


QUICK = Options(seconds=6, worlds=2, steps=2, back=1)


@dataclass(frozen=True)
class Plays:
    """A track for every clip of a batch: actions [B, F, 25]."""

    actions: Tensor
    kind = "action"

    @property
    def length(self) -> int:
        return self.actions.shape[1]

    def window(self, first: int, frames: int) -> Tensor:
        return self.actions[:, first:first + frames]


def decode(code: LinearCode, latents: Tensor) -> Tensor:
    """The video [B, 3, F, 64, 64] of latents, each frame as a picture."""
    pictures = code.decode(latents.transpose(1, 2).flatten(0, 1).unsqueeze(2))
    return pictures[:, :, 0].unflatten(0, (latents.shape[0], -1)).transpose(1, 2).clamp(-1, 1)


def play(net: LiveModel, code: LinearCode, options: Options) -> dict[str, Any]:
    """Figures of one network. obeyed, kept: shares of all frames; picture (0..1), place (pixels): root mean square error of
    the last LAST seconds; curve: of the picture, by the second; back: error of the first frame after there and back."""
    frames = options.seconds * steer.FPS
    worlds, pressed = steer.draw(options.seed, options.worlds), steer.keys(options.seed, options.worlds, frames)
    places = steer.walk(worlds.start, pressed)
    truth = steer.paint(worlds, places)
    noise = BlockNoise(mix(options.seed, 2), (options.worlds, net.config.channels), net.config.latent)
    how = {"steps": options.steps}
    given = encode(code, truth[:, :, :1])
    made = live_rollout(net, Plays(steer.rows(pressed)), given, frames - 1, noise, **how)
    video = decode(code, torch.cat([given, *(x0 for _, x0 in made)], dim=2))
    error = ((video - truth) / 2).square().mean((0, 1, 3, 4))
    off = (steer.STEP * (steer.places_seen(video, worlds) - places)).square().sum(-1)[:, -LAST * steer.FPS:]
    seconds = error.unflatten(0, (-1, steer.FPS)).mean(1).sqrt().tolist()
    return {"obeyed": float(steer.obedience(video, pressed, worlds).float().mean()),
            "kept": float(steer.kept(video, worlds).float().mean()),
            "picture": float(error[-LAST * steer.FPS:].mean().sqrt()), "place": float(off.nanmean().sqrt()),
            "back": returned(net, given, pressed[:, :1 + options.back * steer.FPS], places, noise, how),
            "curve": [[second + 1, value] for second, value in enumerate(seconds)]}


def returned(net: LiveModel, given: Tensor, pressed: Tensor, places: Tensor, noise: BlockNoise, how: dict[str, Any]) -> float:
    """Error of the first frame, in latents, after these keys there and back."""
    taken = steer.taken(places[:, :pressed.shape[1]], pressed)
    back = steer.backwards(taken)
    return there_and_back(net, Plays(steer.rows(taken)), Plays(steer.rows(back)), given, noise, **how).error[0]


def compare(nets: Mapping[str, LiveModel], code: LinearCode, out: Path, options: Options = Options(),
            show: Callable[[str], None] = lambda _: None) -> dict[str, dict[str, Any]]:
    """Figures of networks by name, written to live_report.json and live.png in a folder."""
    rows = {}
    for name, net in nets.items():
        show(f"{name}: {options.seconds} s of play")
        rows[name] = play(net, code, options)
    write(rows, options, out)
    return rows


def write(rows: Mapping[str, Mapping[str, Any]], options: Options, out: Path) -> None:
    """The report and the plot of these figures."""
    write_whole(out / REPORT, (json.dumps({"options": vars(options), "networks": rows}) + "\n").encode())
    curves = {name: row["curve"] for name, row in rows.items()}
    save_png(picture({"picture error by the second": curves}, "seconds"), out / PLOT)


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for name, row in rows.items():
        cells = (f"{name}: {NETWORKS[name]}", f"{row['obeyed']:.3f}", f"{row['picture']:.4f}", f"{row['place']:.2f} px",
                 f"{row['kept']:.3f}", f"{row['back']:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines
