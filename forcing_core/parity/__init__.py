"""Comparison with recorded runs of the official implementations ("golden cases")."""
from .case import Case, load_network, read_case
from .run import Report, run_case

__all__ = ["Case", "Report", "load_network", "read_case", "run_case"]
