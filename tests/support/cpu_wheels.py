"""Import the CUDA wheels of torchvision and torchaudio next to a CPU build of torch.

ComfyUI imports both at start-up, but the wheels that pip installs on Linux are linked against CUDA:
torchvision then fails on fake kernels for operators that do not exist, torchaudio on its library.
`install()` arms an import hook: nothing is imported early, nothing on disk is touched, and wheels
that import as they are never notice it.
"""
import importlib.abc
import importlib.util
import sys


def _torchvision_without_ops():
    """Give the fake kernels their schemas; the kernels themselves (nms and kin) stay missing."""
    from torch import library

    for name in ("nms", "qnms"):
        library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _torchaudio_without_library():
    """torchaudio works without its library when it believes that none was built."""
    sys.modules["torchaudio._extension.utils"]._load_lib = lambda lib: False


REMEDIES = {
    "torchvision": (RuntimeError, _torchvision_without_ops),
    "torchaudio": (OSError, _torchaudio_without_library),
}


class _SecondTry(importlib.abc.Loader):
    """Runs a module; if that fails the known way on a CPU torch, applies the remedy and runs it again."""

    def __init__(self, loader, error, remedy):
        self.loader, self.error, self.remedy = loader, error, remedy

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        import torch

        try:
            self.loader.exec_module(module)
        except self.error:
            if torch.version.cuda or torch.version.hip:
                raise
            self.remedy()
            self.loader.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self):
        self.asking = False

    def find_spec(self, name, path=None, target=None):
        if self.asking or name not in REMEDIES:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None:
            spec.loader = _SecondTry(spec.loader, *REMEDIES[name])
        return spec


def install():
    sys.meta_path.insert(0, _Finder())
