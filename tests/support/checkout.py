"""Find the ComfyUI checkout that the tests run against, or say what is missing and how to get it."""
import importlib.metadata
import os
import re
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
# Hundreds of megabytes of media and help pages: the server starts without them.
NOT_NEEDED = ("comfyui-workflow-templates", "comfyui-embedded-docs")


@dataclass(frozen=True)
class Checkout:
    """`root` is a usable checkout, or None with the reason in `problem` and the way out in `fix`."""
    root: Path | None
    problem: str = ""
    fix: str = ""


def candidates(repo=REPO):
    """Where a checkout may be, best first."""
    if os.environ.get("COMFYUI_PATH"):
        # Asked for by name: falling back to another checkout would test the wrong host.
        return [Path(os.environ["COMFYUI_PATH"]).expanduser()]
    hosts = [folder.parent for folder in repo.parents if folder.name == "custom_nodes"]
    return [*hosts, Path.home() / "comfy" / "ComfyUI"]


def missing_requirements(root):
    """Names of the checkout's requirements that this environment lacks; versions are pip's business."""
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [match.group() for line in lines if (match := re.match(r"[A-Za-z0-9._-]+", line.strip()))]
    return [name for name in names if name not in NOT_NEEDED and not _installed(name)]


def _installed(name):
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def find(repo=REPO):
    places = candidates(repo)
    root = next((place for place in places if (place / "main.py").is_file() and (place / "comfy").is_dir()), None)
    if root is None:
        return Checkout(None, f"no ComfyUI checkout at {' or '.join(map(str, places))}",
                        "clone ComfyUI 0.21 or later there, or set COMFYUI_PATH to a checkout")
    if missing := missing_requirements(root):
        return Checkout(None, f"this Python lacks ComfyUI requirements: {', '.join(missing)}",
                        f"install {root / 'requirements.txt'} into it (with torch, torchvision and torchaudio "
                        "pinned in the same command), or run .ci/run with FORCING_VENV set to a new folder")
    return Checkout(root.resolve())
