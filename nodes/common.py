"""What several node files share: the category, the cache socket, the list of systems."""
from __future__ import annotations

from comfy_api.latest import io

from ..forcing_core.presets import runnable

CATEGORY = "Forcing"
Cache = io.Custom("FORCING_CACHE")  # carries the frozen options of a cache policy

SYSTEMS = [preset.name for preset in runnable()]
SYSTEM_TIP = ("The published system your checkpoint belongs to. It fixes block size, window, sink, denoising steps and "
              "flow shift; the wrong one gives noise or mush.")

