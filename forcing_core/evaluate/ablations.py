"""The published claims, read off the rows of an evaluation: which one of two settings is better, and does it hold here?

Sources: arXiv 2506.08009 (Self Forcing: training on own rollouts), 2510.02283 (Self-Forcing++: on rollouts longer than
the teacher's clips), 2509.22622 (LongLive: a sink); that models drift past the length they were trained on, all of them.
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Iterator, Mapping, Sequence

# claim, the setting that should be worse, the one that should be better
CLAIMS = (
    ("training on own rollouts", "teacher-forcing", "self-forcing"),
    ("training on long rollouts", "self-forcing", "long"),
    ("a sink", "self-forcing", "self-forcing-sink3"),
)
PAST = "staying within the training length"
PAST_SETTING = "self-forcing"
SETTINGS = tuple(dict.fromkeys(name for _, *names in CLAIMS for name in names))
# metric -> +1 where more is better
METRICS = {"drift": -1, "frame_accuracy": 1}


@dataclass(frozen=True)
class Verdict:
    """The claim is that `better` beats `worse`: each a setting and a length, with its figure of `metric`. holds: whether it
    does, None where one of them has no figure."""

    claim: str
    metric: str
    worse: str
    better: str
    worse_figure: float | None
    better_figure: float | None

    @property
    def holds(self) -> bool | None:
        if self.worse_figure is None or self.better_figure is None:
            return None
        return METRICS[self.metric] * (self.better_figure - self.worse_figure) > 0

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def verdicts(rows: Sequence[Mapping[str, Any]]) -> tuple[Verdict, ...]:
    """Every comparison for which the rows have both sides: two settings at each length, the shortest only where there is
    no other, since all of them were trained for it; and one setting at the shortest length against each longer one."""
    figures = {(row["settings"], row["seconds"]): row for row in rows}
    return tuple(Verdict(claim, metric, _label(worse), _label(better), _figure(figures[worse], metric),
                         _figure(figures[better], metric))
                 for claim, worse, better in _pairs(sorted({row["seconds"] for row in rows}))
                 if worse in figures and better in figures for metric in METRICS)


def _pairs(lengths: Sequence[float]) -> Iterator[tuple[str, tuple[str, float], tuple[str, float]]]:
    for claim, worse, better in CLAIMS:
        for seconds in lengths[1:] or lengths:
            yield claim, (worse, seconds), (better, seconds)
    for seconds in lengths[1:]:
        yield PAST, (PAST_SETTING, seconds), (PAST_SETTING, lengths[0])


def _label(key: tuple[str, float]) -> str:
    return f"{key[0]} at {key[1]:g} s"


def _figure(row: Mapping[str, Any], metric: str) -> float | None:
    value = row[metric]
    return value if math.isfinite(value) else None
