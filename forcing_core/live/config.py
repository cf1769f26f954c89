"""Sizes of LIVE's network and autoencoder, and the data sets that it was trained on.

Source: arXiv 2602.03747, public repo Junchao-cs/LIVE @20c82a9 (configs/live_re10k.yaml). Only the RealEstate10K weights are
published; the other rows hold what the paper says of them, so that their files are told apart.
"""
from __future__ import annotations

from dataclasses import dataclass

from ..errors import ForcingError

PATCH = 2  # latent rows and columns of a token
DOWNSAMPLING = 16  # pixels of a latent cell, each way
FFN_MULTIPLE = 256
# kind of condition -> numbers a frame has of it (a camera: per pixel); actions have as many as their data set
CONDITIONS = {"camera": 6, "pose": 16, "action": 25}


@dataclass(frozen=True)
class LiveConfig:
    """The network. Defaults are the published 774 M one.

    latent: (rows, columns) of the latent, both even. window: frames of the longest sequence, positions 0..window-1.
    rope: channels of a head that turn with time, row and column; they add up to a head. condition: key of CONDITIONS.
    condition_dim: numbers a frame has of it. cell: pixels of a latent cell, each way. actions: names of those that occurred in
    training, one at a time; None for all, in any company. context: sigma of the noise that a context gets; None for that of the
    last step of sampling, as published. Raises ForcingError for sizes that do not divide.
    """

    dim: int = 1536
    layers: int = 18
    heads: int = 24
    channels: int = 16
    latent: tuple[int, int] = (16, 16)
    window: int = 32
    rope: tuple[int, int, int] = (8, 28, 28)
    theta: float = 256.0
    frequencies: int = 256
    condition: str = "camera"
    condition_dim: int = 6
    cell: int = DOWNSAMPLING
    actions: tuple[str, ...] | None = None
    context: float | None = None

    def __post_init__(self):
        if self.dim % self.heads or sum(self.rope) != self.dim // self.heads or any(d % 2 for d in self.rope):
            raise ForcingError(f"A width of {self.dim} in {self.heads} heads does not divide into rotary parts of {self.rope}. "
                               "Use parts that are even and add up to a head, such as 8, 28, 28 for 64 channels.")
        if any(side < PATCH or side % PATCH for side in self.latent):
            raise ForcingError(f"A latent of {self.latent[0]}x{self.latent[1]} does not divide into 2x2 patches. Use pictures "
                               "whose sides are divisible by 32 pixels.")
        if self.condition not in CONDITIONS:
            raise ForcingError(f"Condition {self.condition!r} is not known. Use one of {', '.join(CONDITIONS)}.")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a frame."""
        return self.latent[0] // PATCH, self.latent[1] // PATCH

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def ffn(self) -> int:
        """Hidden width: two thirds of four times the width, rounded up to a multiple of 256."""
        return -(-int(8 * self.dim / 3) // FFN_MULTIPLE) * FFN_MULTIPLE

    @property
    def picture(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.latent[0] * self.cell, self.latent[1] * self.cell


@dataclass(frozen=True)
class AutoencoderConfig:
    """The per-frame KL autoencoder. channels: width of the first level, a multiple of 32; multiples: of each level, one
    halving of the picture between two. scale: factor in front of latents as the network knows them."""

    channels: int = 128
    multiples: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 16
    scale: float = 0.2325


@dataclass(frozen=True)
class Dataset:
    """name: as users read it. published: whether its weights are. latent, window, condition, condition_dim: as in
    `LiveConfig`. fps: of the frames that are generated, None where unknown."""

    name: str
    latent: tuple[int, int]
    condition: str
    condition_dim: int
    window: int = 32
    fps: float | None = None
    published: bool = False

    @property
    def sequence(self) -> int:
        """Tokens of a whole window: the size of the masks that some files hold."""
        return self.window * self.latent[0] * self.latent[1] // PATCH ** 2


DATASETS = {
    "re10k": Dataset("RealEstate10K", (16, 16), "camera", 6, fps=15.0, published=True),
    "minecraft": Dataset("Minecraft", (14, 24), "action", 25),
    "ue": Dataset("UE Engine", (22, 40), "camera", 6),
}
RE10K = DATASETS["re10k"]
