"""Timing whole rollouts over random networks, alone or beside ComfyUI's own sampler."""
from .compare import load_compare, run_compare
from .timing import Case, Setup, Timing, early_late, machine, measure, write_json

__all__ = ["Case", "Setup", "Timing", "early_late", "load_compare", "machine", "measure", "run_compare", "write_json"]
