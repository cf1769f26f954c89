"""Nodes that exist only in tests. Linked into the test server's custom_nodes."""
from .conditioning import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
