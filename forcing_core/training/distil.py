"""Stage "consistency" of the micro model, and what it shares with the stages after it: a teacher that stays as it is.

Causal consistency distillation (Causal Forcing++, arXiv 2605.15141) makes of the many-step teacher a network that
makes video in a few steps of true histories, from which Self Forcing can start.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import ForcingError
from ..micro import bundle
from ..micro.code import LinearCode
from ..wan import TextState, WanModel
from . import causal_consistency
from .network import NetSettings, NetTrainer
from .state import Average


@dataclass(frozen=True)
class DistilSettings(NetSettings):
    """teacher_steps, teacher_guidance: of the Euler schedule that consistency is learnt along, see
    `causal_consistency.ConsistencyOptions`. shapes: extra weight of the foreground."""

    teacher_steps: int = 24
    teacher_guidance: float = 1.3
    shapes: float = 3.0


@dataclass(frozen=True)
class ConsistencySettings(DistilSettings):
    """The learning rates are a quarter of the teacher's: the weights are nearly there. Half of the published steps of
    the schedule and a short average carry what is learnt at its end to its beginning several times as fast."""

    steps: int = 1500
    muon_lr: float = 0.005
    adamw_lr: float = 1e-3
    average: float = 0.95


class DistilTrainer(NetTrainer):
    """Starts from the weights of earlier stages, see `begin`. `agreement` needs the network's average as a network."""

    frozen = ("teacher", "mean")
    settings: DistilSettings

    def __init__(self, settings: DistilSettings, device: str = "cpu", code: LinearCode | None = None):
        super().__init__(settings, device, code)
        self.options = causal_consistency.ConsistencyOptions(steps=settings.teacher_steps, per_block=True,
                                                             guidance=settings.teacher_guidance)

    def begin(self, student: WanModel, teacher: WanModel) -> None:
        """Put the weights of earlier stages in place, before the first step."""
        for name, source in self.sources(student, teacher).items():
            self.nets[name].load_state_dict(source.state_dict())
        self.average = Average(self.net, self.settings.average)

    def sources(self, student: WanModel, teacher: WanModel) -> dict[str, WanModel]:
        """What every network starts as."""
        return {"net": student, "mean": student, "teacher": teacher}

    def agreement(self, generator: torch.Generator) -> Tensor:
        """The consistency loss of a batch of true clips."""
        clean, shapes, text = self.batch()
        empty = TextState(torch.zeros_like(text))
        return causal_consistency.loss(self.net, self.nets["mean"], self.nets["teacher"], clean, TextState(text), empty,
                                       self.options, generator, cells=1 + self.settings.shapes * shapes)

    def move(self, value: Tensor, before: int) -> None:
        """One optimiser step down this loss. before: how many there were."""
        value.backward()
        self.optimisers["optimiser"].step(self.rate())
        self.average.update(self.net, before)
        self.average.copy_to(self.nets["mean"])


class ConsistencyTrainer(DistilTrainer):
    name, stream, settings_type = "consistency", 10, ConsistencySettings

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; the loss, still on the device."""
        value = self.agreement(self.generator())
        self.move(value, self.clock.total)
        return self.noted({"loss": value})


QUICK = ConsistencySettings(batch=2, lengths=(9, 21), steps=4, code_clips=16)


def origin(file: Path) -> Mapping[str, Any]:
    """What a stage has to take over from the network that it starts from: its size and its linear code.

    Raises ForcingError for a file that no stage wrote.
    """
    with safe_open(file, framework="pt") as opened:
        told = json.loads((opened.metadata() or {}).get("forcing.training", "{}")).get("settings", {})
    names = {field.name for field in fields(NetSettings)}
    if not {"dim", "layers", "seed", "code_clips"} <= told.keys() & names:
        raise ForcingError(f"{file} does not tell how it was trained. Give weights that "
                           "'python -m forcing_core train' wrote.")
    seed = told.get("code_seed")
    return {"dim": told["dim"], "layers": told["layers"], "code_clips": told["code_clips"], "level": told["level"],
            "code_seed": told["seed"] if seed is None else seed}


def begin(kind: type[DistilTrainer], settings: DistilSettings, student: Path, teacher: Path,
          device: str = "cpu") -> DistilTrainer:
    """A trainer that starts from these files; size and code of `settings` are replaced by theirs.

    Raises ForcingError where one is missing or they do not go together.
    """
    for file in (student, teacher):
        if not file.is_file():
            raise ForcingError(f"There is no {file} to start from. Train that stage first, or name another file.")
    inherited = origin(teacher)
    if inherited != origin(student):
        raise ForcingError(f"{student} and {teacher} are of different sizes, worlds or linear codes. Give a student "
                           "that was made from this teacher.")
    trainer = kind(replace(settings, **inherited), device)
    trainer.begin(bundle.read(student), bundle.read(teacher))
    return trainer
