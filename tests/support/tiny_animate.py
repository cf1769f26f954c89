"""A file of the tiny Wan Animate of `tiny_portrait`, with its motion encoder: that one has a single size, 23 M weights."""
from pathlib import Path

from safetensors.torch import save_file


def tiny_animate(path):
    """Write it and return its path. Needs the checkout."""
    from forcing_testkit import tiny_portrait

    save_file(tiny_portrait.animate_state_dict(), path)
    return Path(path)
