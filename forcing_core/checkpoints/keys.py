"""Names of the weights: wrappers stripped, and compared with what a Wan 2.1 text-to-video model needs."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import ForcingError
from .config import ModelConfig

# Names that training and compilation wrap around a module. No Wan weight has one of them in its path, so
# they can be dropped wherever they stand.
WRAPPERS = frozenset({
    "model", "diffusion_model", "module", "base_model",
    "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod",
})
ATTENTIONS = ("self_attn", "cross_attn")
PATCH = (1, 2, 2)  # frames, height, width
SHOWN = 3  # names quoted in a message


def strip(name: str) -> str:
    """`name` without wrapper parts: model._fsdp_wrapped_module.blocks.0.norm3.bias -> blocks.0.norm3.bias."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def strip_all(tensors: Mapping) -> dict:
    """The same values under stripped names; raises ForcingError where two names become one."""
    stripped = {strip(name): value for name, value in tensors.items()}
    if len(stripped) != len(tensors):
        raise ForcingError(f"{len(tensors) - len(stripped)} weights occur twice in the file under different "
                           "wrappers. Choose one container, for example key generator_ema.")
    return stripped


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every weight of a Wan 2.1 text-to-video model (825 of them in the 1.3B)."""
    d = config.dim
    shapes = {"patch_embedding.weight": (d, config.in_dim, *PATCH), "patch_embedding.bias": (d,)}
    shapes |= _linear("text_embedding.0", d, config.text_dim) | _linear("text_embedding.2", d, d)
    shapes |= _linear("time_embedding.0", d, config.freq_dim) | _linear("time_embedding.2", d, d)
    shapes |= _linear("time_projection.1", 6 * d, d)
    for layer in range(config.num_layers):
        shapes |= _block(f"blocks.{layer}", d, config.ffn_dim)
    shapes |= _linear("head.head", config.out_dim * PATCH[1] * PATCH[2], d)
    shapes["head.modulation"] = (1, 2, d)
    return shapes


def _block(name: str, d: int, ffn: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.modulation": (1, 6, d)}
    for attention in ATTENTIONS:
        for x in "qkvo":
            shapes |= _linear(f"{name}.{attention}.{x}", d, d)
        shapes |= {f"{name}.{attention}.norm_{x}.weight": (d,) for x in "qk"}
    shapes |= {f"{name}.norm3.weight": (d,), f"{name}.norm3.bias": (d,)}
    return shapes | _linear(f"{name}.ffn.0", ffn, d) | _linear(f"{name}.ffn.2", d, ffn)


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


@dataclass(frozen=True)
class Difference:
    """How a state dict differs from what the model needs: names, sorted."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshaped: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.misshaped)

    @property
    def sentence(self) -> str:
        parts = [_quoted(names, word) for names, word in
                 ((self.missing, "missing"), (self.extra, "not expected"), (self.misshaped, "of another shape"))
                 if names]
        return f"Weights: {'; '.join(parts)}." if parts else "All weights are there."


def difference(tensors: Mapping, config: ModelConfig) -> Difference:
    """Compare stripped names and shapes with `expected_shapes(config)`."""
    expected = expected_shapes(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Difference(
        missing=tuple(sorted(expected.keys() - shapes.keys())),
        extra=tuple(sorted(shapes.keys() - expected.keys())),
        misshaped=tuple(sorted(n for n in expected.keys() & shapes.keys() if expected[n] != shapes[n])))


def _quoted(names: Iterable[str], word: str) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {word} ({', '.join(names[:SHOWN])}{more})"
