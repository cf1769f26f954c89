"""What the options of every cache policy have in common: how the store keeps its frames."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ForcingError
from ..store import PLAIN, Storage


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """store: "model" (the compute dtype), "int8" or "fp8" (half of it; see `codecs`). dense: newest latent frames that
    an int8 or fp8 store also keeps in the compute dtype and reads from there. offload: keep the store in host memory,
    two layers of it on the device; slower where the copies outlast the layers, the same numbers.
    rollout: key of `rollout.ROLLOUTS`, in which order forwards are made.

    Subclasses have a field `block` (latent frames a block) and call this `__post_init__` from their own. `variants`:
    whether the policy's store takes a `Storage`; one of its own kind may not. overlaps: whether its passes can attend to
    frames that are not stored, which a knot needs.
    """

    store: str = "model"
    offload: bool = False
    dense: int = 0
    rollout: ClassVar[str] = "block"
    variants: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True

    def __post_init__(self):
        if self.storage != PLAIN and not self.variants:
            raise ForcingError(f"{type(self).__name__} keeps tokens in a store of its own, which is neither quantised nor "
                               "offloaded. Use store 'model' without offload and dense, or another cache policy.")

    @property
    def storage(self) -> Storage:
        """The same three as the store wants them. Raises ForcingError for what does not exist."""
        return Storage(self.store, self.dense, self.offload)


def storage_of(options) -> Storage:
    """How the store of these options keeps its frames; options that cannot say so have a plain one."""
    return options.storage if isinstance(options, CacheOptions) else PLAIN
