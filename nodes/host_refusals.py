"""What a causal rollout refuses to run with, before it starts: each would leave holes in its memory."""
from __future__ import annotations

from contextlib import contextmanager

import comfy.model_management as mm

from ..forcing_core.errors import ForcingError
from .host_memory import Shape

# helpers that skip or cut forwards; with a KV store a skipped forward is a hole in memory
REFUSED_WRAPPERS = {"easycache": "EasyCache", "lazycache": "LazyCache"}
PARTIAL = ("A condition covers only part of the picture or of the frames, which a causal rollout cannot do. Remove the "
           "area from the conditioning.")


def refuse_partial_conditions(guider, shape: Shape, first_sigma: float) -> None:
    """Raise ForcingError for conditions that would skip forwards, and with them the writing of their store."""
    sizes = (shape.frames, shape.height, shape.width)
    for cond in (c for side in guider.conds.values() for c in side or ()):
        area = cond.get("area", ())
        area = area[:len(area) // 2]
        if any(part < whole for part, whole in zip(reversed(area), reversed(sizes))):
            raise ForcingError(PARTIAL)
        if cond.get("timestep_end", 0.0) > 0 or cond.get("timestep_start", first_sigma) < first_sigma:
            raise ForcingError("A condition is limited to a range of steps, so it would miss forwards that write its KV "
                               "store. Remove the timestep range from the conditioning.")
        if any(len({frame.strength for frame in hook.hook_keyframe.keyframes}) > 1 for hook in hooks_of(cond)):
            raise ForcingError("A condition has a LoRA whose strength changes over the steps, and ComfyUI never goes back to "
                               "the first one, as every block would have to. Remove the hook keyframes from the "
                               "conditioning.")


def hooks_of(cond: dict) -> list:
    """The hooks (LoRAs and the like) that ComfyUI puts on for one condition only."""
    return [] if cond.get("hooks") is None else cond["hooks"].hooks


def refuse_incompatible(model_options: dict) -> None:
    """Raise ForcingError, by name, for helpers that would leave holes in the store."""
    if model_options.get("context_handler") is not None:
        raise ForcingError("Context windows cannot be combined with a causal rollout, which has a window of its own. "
                           "Remove the Context Windows node; Forcing Cache sets the window.")
    if "multigpu_clones" in model_options:
        raise ForcingError("A causal rollout keeps its KV store on one device. Remove the MultiGPU node from this model.")
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    found = {key for by_key in wrappers.values() for key in by_key}
    for key, name in REFUSED_WRAPPERS.items():
        if key in found:
            raise ForcingError(f"{name} skips forwards, which would leave holes in the KV store. Remove the {name} node.")


_running: set[int] = set()  # ids of networks a rollout is using now; numbers only, emptied by `exclusive`


@contextmanager
def exclusive(net):
    """One rollout at a time on a network: a second one would mix its forwards into the first one's."""
    if id(net) in _running:
        raise ForcingError("Another causal rollout is active on this model. Wait until it is done, or interrupt it.")
    _running.add(id(net))
    try:
        yield
    finally:
        _running.discard(id(net))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is a device or host allocation failure."""
    return mm.is_oom(error) or (isinstance(error, RuntimeError) and "not enough memory" in str(error))
