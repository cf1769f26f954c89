"""What several node files share: the category, the cache socket, the list of systems."""
from __future__ import annotations

from comfy_api.latest import io

from ..forcing_core.presets import Preset, get, runnable

CATEGORY = "Forcing"
Cache = io.Custom("FORCING_CACHE")  # carries the frozen options of a cache policy

SYSTEMS = [preset.name for preset in runnable()]
SYSTEM_TIP = ("The published system your checkpoint belongs to. It fixes block size, window, sink, denoising steps and "
              "flow shift; the wrong one gives noise or mush.")


def system(name: str) -> Preset:
    return get(name)


def frames_widget(name: str, default: int, tooltip: str, **extra):
    return io.Int.Input(name, default=default, min=0, max=100000, tooltip=tooltip, **extra)
