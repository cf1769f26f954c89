"""A window, and before it in time the keys and values of a reference that is never forgotten and runs ahead.

The reference (a portrait, mostly one latent frame) is written once, by a clean pass of its own at frame number
`plan.REFERENCE`. It stands later in time than the frames that are being made, so that they move towards it as if it were
the last frame of the video: at position n, a multiple of `stride` behind `lookahead`, which moves on as soon as a block,
its knot included, would reach it. Its raw keys are kept, so moving it costs a rotation and no forward.

Source: arXiv 2512.21734 (Knot Forcing). Lookahead 8 and stride 4 are those of a third-party re-implementation; the paper's
are not known.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import ForcingError
from ..plan import REFERENCE, Call, Plan
from ..store import Keys
from .window import Window, WindowOptions


@dataclass(frozen=True)
class ReferenceOptions(WindowOptions):
    """references: latent frames of the reference, beside the window's. lookahead: position where it stands first.
    stride: how far it moves at a time. The others: as in `WindowOptions`; positions count for the window, from which the
    reference keeps its distance in all of them.
    """

    references: int = 1
    lookahead: int = 8
    stride: int = 4

    def __post_init__(self):
        super().__post_init__()
        if min(self.references, self.lookahead, self.stride) < 1:
            raise ForcingError(f"references {self.references}, lookahead {self.lookahead}, stride {self.stride} make no sense. "
                               "Use at least 1 for each; 1, 8 and 4 are usual.")

    def stand(self, end: int) -> int:
        """Position of the reference, counted as frame numbers are, for a block whose last frame is end - 1: behind it."""
        return self.lookahead + self.stride * max(0, -(-(end - self.lookahead) // self.stride))


def with_reference(cache: Any, references: int, lookahead: int, stride: int) -> ReferenceOptions:
    """The same window, with room for a reference. Raises ForcingError for options of another policy."""
    if not isinstance(cache, WindowOptions):
        raise ForcingError(f"A reference needs a plain window, and {type(cache).__name__.removesuffix('Options')} is another "
                           "memory. Choose the policy 'window' in Forcing Cache, or connect no reference.")
    return ReferenceOptions(**{**asdict(cache), "references": references, "lookahead": lookahead, "stride": stride})


class Reference:
    """Plans of a window with a reference. Without one in the store they are those of the window. replays: frames that a
    recache goes over, the window's.
    """

    def __init__(self, options: ReferenceOptions, frames: int):
        self.options, self._window = options, Window(options, frames)
        self.replays = self._window.capacity
        self.capacity = self.replays + options.references
        moving = Keys.RAW if options.compact else Keys.BOTH
        self.keys = moving if self._window.keys is Keys.ROPED else self._window.keys

    def plan(self, call: Call) -> Plan:
        if call.first >= REFERENCE:
            return self._written(call)
        held = tuple(f for f in call.held if f < REFERENCE)
        plan, reference = self._window.plan(replace(call, held=held)), call.held[len(held):]
        end = call.first + call.frames
        # what separates it from the query is a distance between frames, whatever the window counts from
        start = plan.query[-1] + self.options.stand(end + call.ahead) - (end - 1)
        return replace(plan, read=plan.read + reference,
                       positions=plan.positions + tuple(range(start, start + len(reference))))

    def _written(self, call: Call) -> Plan:
        """The pass that writes the reference: it sees nothing but itself."""
        if call.frames > self.options.references:
            raise ForcingError(f"The reference has {call.frames} latent frames and the memory has room for "
                               f"{self.options.references}. Set references to {call.frames}.")
        start = self.options.stand(call.ahead)
        places = tuple(range(start, start + call.frames))
        return Plan(tuple(f for f in call.held if f in call.span), call.span, call.span, places, places)

    def flushed(self, held: tuple[int, ...], last: int) -> tuple[int, ...]:
        """The sink, the newest `last` frames and the reference."""
        frames = tuple(f for f in held if f < REFERENCE)
        return self._window.flushed(frames, last) + held[len(frames):]

    def bases(self, heads: int) -> tuple[float, ...]:
        return self._window.bases(heads)
