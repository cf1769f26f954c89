"""How much of dense attention the sparse methods keep: the part of the softmax mass that falls on what they choose.

The micro model makes videos with dense attention; in every attention of every pass each method is asked what it would have
chosen. So all are measured on the same queries and keys. Passes in which a method is dense (first block, first steps) do
not count. Beside it stands the most that any choice of so many keys for each query could keep.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Sequence

import torch
from torch import Tensor

from ..evaluate.rollouts import LATENT
from ..evaluate.settings import SETTINGS
from ..micro import bundle, world
from ..micro.vae import Z_DIM
from ..noise import BlockNoise
from ..passes import Pass
from ..policies import build, replayed_frames
from ..standalone import make_denoiser, preset_rollout
from .ann import AnnOptions
from .cross import CrossOptions
from .dummy import DummyOptions
from .light import LightOptions
from .passes import PROMPT, SPARSE, Attention, Sparse, SparsePass, Sparsity
from .view import Video

NETWORK, SETTING = "student", "self-forcing-first4"


@dataclass(frozen=True)
class Row:
    """A method at a paper's density. density, recall: the paper's, 0..1, where it has them. source: what those belong to."""

    title: str
    options: Any
    density: float | None
    recall: float | None
    source: str

    @property
    def sparse(self) -> Sparse:
        return Sparse(prompt=self.options) if self.options.name in PROMPT else Sparse(video=self.options)


_FAST = "2602.01801, H100, streams of 3000 frames"
_LIGHT = "2602.04789; gives no recall, VBench 84.5 with its weights (dense 84.1)"
# blocks of 2 tokens: 8 of a frame of 16, for 24 of a frame of 1536
ROWS = (
    Row("Light Forcing, sparsity 0.88", LightOptions(block=2), 0.12, None, _LIGHT),
    Row("Light Forcing, sparsity 0.80", LightOptions(0.80, 0.90, block=2), 0.20, None, _LIGHT),
    Row("AnnSA, hashing", AnnOptions("lsh", group=1), 0.28, 0.926, _FAST + " (AnnSA-Quant)"),
    Row("AnnSA, 8 bits", AnnOptions("quant", density=0.28, group=1), 0.28, 0.926, _FAST + " (AnnSA-Quant)"),
    Row("AnnSA, 8 bits, 4 queries together", AnnOptions("quant", density=0.28, group=4), 0.28, 0.926,
        _FAST + " (AnnSA-Quant)"),
    Row("AnnSA, 2 bits", AnnOptions("quant", bits=2, density=0.28, group=1), None, 0.20,
        _FAST + "; for 2 bits without a density"),
    Row("AnnCA, hashing", CrossOptions("lsh", density=0.331), 0.331, 0.942, _FAST + " (AnnCA-LSH)"),
    Row("AnnCA, 8 bits", CrossOptions("quant", density=0.331), 0.331, 0.942, _FAST + " (AnnCA-LSH)"),
    Row("Dummy Forcing, half of the heads", DummyOptions(), None, None, "2601.20499; gives no recall"),
)


@dataclass
class Tally:
    """Sums over all attentions in which a method was sparse. layers: layer -> (sum of recall, attentions)."""

    count: int = 0
    density: float = 0.0
    recall: float = 0.0
    best: float = 0.0
    layers: dict[int, tuple[float, int]] = field(default_factory=dict)

    def add(self, layer: int, weights: Tensor, mask: Tensor) -> None:
        """weights: float32 [B, H, n, m] of dense attention; mask: bool like it, of what the method chose."""
        recall = float((weights * mask).sum(dim=-1).mean())
        self.count, self.recall = self.count + 1, self.recall + recall
        self.density += float(mask.float().mean())
        self.best += float(_best(weights, mask.sum(dim=-1)))
        before, times = self.layers.get(layer, (0.0, 0))
        self.layers[layer] = before + recall, times + 1

    def record(self) -> dict[str, Any]:
        """Means, 0..1."""
        if not self.count:
            return {"attentions": 0}
        means = {"density": self.density, "recall": self.recall, "best": self.best}
        return {"attentions": self.count, **{name: round(total / self.count, 4) for name, total in means.items()},
                "layers": [round(total / times, 4) for _, (total, times) in sorted(self.layers.items())]}


def _best(weights: Tensor, counts: Tensor) -> Tensor:
    """Mean mass of as many of the heaviest keys as each query has chosen."""
    sums = weights.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return sums.gather(-1, counts[..., None] - 1).mean()


@dataclass
class Probe:
    """Stands for the `Sparsity` of a memory: attention stays dense, and `tallies` get what each method would choose."""

    methods: Sequence[Sparsity]
    tallies: Sequence[Tally]

    def around(self, inner: Pass) -> ProbePass:
        return ProbePass(inner, [method.around(inner) for method in self.methods], self.tallies)


class ProbePass:
    """The pass of such a memory. asked: one pass for each method, of which only the choices are used."""

    def __init__(self, inner: Pass, asked: Sequence[SparsePass], tallies: Sequence[Tally]):
        self.inner, self.asked, self.tallies = inner, asked, tallies

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        self._look(layer, q, keys, SPARSE)
        return attention(q, keys, values)

    def attend_prompt(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, attention: Attention) -> Tensor:
        self._look(layer, q, keys, PROMPT)
        return attention(q, keys, values)

    def _look(self, layer: int, q: Tensor, k: Tensor, methods: dict) -> None:
        weights = (torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * q.shape[-1] ** -0.5).softmax(dim=-1)
        for now, tally in zip(self.asked, self.tallies, strict=True):
            chosen = now.sparsity.options
            options = chosen.video if methods is SPARSE else chosen.prompt
            if options is None:
                continue
            selection = methods[options.name][1](options, now.view(layer, q.shape[1], k.shape[1]), q, k)
            if selection is not None:
                tally.add(layer, weights, selection.mask())


@torch.no_grad()
def measure(rows: Sequence[Row], *, frames: int = 21, captions: int = 4, seed: int = 0,
            net=None) -> list[dict[str, Any]]:
    """One record a row: the paper's figures and those of the micro model, on so many clips of so many latent frames.

    net: instead of the trained student. Raises ForcingError for a length that the setting cannot make.
    """
    setting = SETTINGS[SETTING]
    texts = [world.caption(spec) for spec in world.specs(world.draw(seed, captions, split="test"))]
    denoiser = make_denoiser(net or bundle.network(NETWORK), setting.cache(), frames, LATENT, [bundle.prompt(texts)])
    memory, tallies = denoiser.conditions[0].memory, [Tally() for _ in rows]
    sizes = Video(frames, setting.preset.block, memory.policy.capacity, memory.store.frame_tokens, memory.store.layers)
    memory.sparse = Probe([Sparsity(row.sparse, sizes) for row in rows], tallies)
    noise = BlockNoise(seed, (captions, Z_DIM), LATENT)
    for _ in preset_rollout(setting.preset, denoiser, frames, noise, window=replayed_frames(build(setting.cache(), frames))):
        pass
    return [_record(row, tally) for row, tally in zip(rows, tallies, strict=True)]


def _record(row: Row, tally: Tally) -> dict[str, Any]:
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(row.options).items()}
    return {"method": row.title, "options": settings, **tally.record(),
            "paper": {"density": row.density, "recall": row.recall, "source": row.source}}


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    head = ["| method | density | recall | most possible | paper: density, recall |", "|---|---|---|---|---|"]
    return head + [_line(record) for record in records]


def _line(record: dict[str, Any]) -> str:
    paper = ", ".join("-" if value is None else _percent(value)
                      for value in (record["paper"]["density"], record["paper"]["recall"]))
    own = [_percent(record[name]) if name in record else "-" for name in ("density", "recall", "best")]
    return "| " + " | ".join((record["method"], *own, paper)) + " |"


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"
