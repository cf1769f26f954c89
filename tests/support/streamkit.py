"""A stream of a random micro model in a process of its own, which a test may kill: `python streamkit.py SETTINGS`.

SETTINGS: JSON with folder (of the weights), path (of the video, without suffix), blocks, kind, save, every, resume (or null),
pause (seconds between two blocks), prompts (block -> text).
"""
import importlib
import json
import sys
import time
import types
from pathlib import Path

PRESET, CACHE = "longlive-infinity", {"window": 6, "sink": 3}


def make(core, settings):
    """A `Stream` of these settings; core: imports a module of forcing_core by its name."""
    standalone, bundle = core("streaming.standalone"), core("micro.bundle")
    path = {name: settings.get(name) and Path(settings[name]) for name in ("folder", "path", "save", "resume")}
    options = standalone.StreamOptions(
        blocks=settings["blocks"], kind=settings.get("kind", "mkv lossless"), save=path["save"], resume=path["resume"],
        every=settings.get("every", 2), encode=lambda text: bundle.prompt([text]),
        replay=core("steering").read_entries(settings.get("replay", [])))
    source = core("micro.source").MicroSource(folder=path["folder"])
    return standalone.Stream(source, core("presets").get(PRESET), path["path"], options, **CACHE)


def main(settings):
    package = types.ModuleType("forcing_alone")
    package.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules["forcing_alone"] = package

    def core(name):
        return importlib.import_module(f"forcing_alone.forcing_core.{name}")

    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for block, _ in make(core, settings).run():
        sys.stdout.write(f"{block.index}\n")
        sys.stdout.flush()
        time.sleep(settings.get("pause", 0))
    if settings.get("memory"):
        resource = importlib.import_module("resource")
        sys.stdout.write(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
