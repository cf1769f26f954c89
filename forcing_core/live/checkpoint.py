"""Files of LIVE: the published Lightning checkpoints, the separate autoencoder, and our own safetensors with both.

A published file has its weights under `state_dict`: the network as `model.*`, the autoencoder as `tokenizer.*`, either
perhaps with the `_orig_mod` of a compiled module; beside them masks, metrics and perceptual losses, which nothing here needs.
`vae-kl16.ckpt` has the autoencoder alone, under `model`. Converted files keep the names `model.*` and `tokenizer.*`.
Source: public repo Junchao-cs/LIVE @20c82a9 (DiffusionForcing.init_from_ckpt, AutoencodingLegacy.init_from_ckpt).
"""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints import write_safetensors
from ..checkpoints.containers import DAMAGED, DOWNLOAD_AGAIN
from ..checkpoints.convert import DTYPES
from ..checkpoints.identify import META_PRESET, META_SOURCE
from ..checkpoints.keys import Difference
from ..errors import ForcingError
from .autoencoder import Autoencoder
from .config import CONDITIONS, DATASETS, AutoencoderConfig, Dataset, LiveConfig
from .model import LiveModel
from .pickles import read_pickle

log = logging.getLogger(__name__)

CONTAINERS = ("state_dict", "model")
NETWORK, TOKENIZER = "model.", "tokenizer."
COMPILED = "_orig_mod."
# Parts of an autoencoder; whatever else a file has beside them judges pictures.
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
MASKS, CACHES = "attn_mask_", ".kv_cache."
ROPE_SHARES = (8, 28, 28)  # of a head of 64
HEAD = 64
META_SCALE = "forcing.live.scale"


@dataclass(frozen=True)
class Loaded:
    """network, autoencoder: state dicts under plain names, in the file's dtype; the autoencoder's is None where a file has
    none. report: sentences for the user."""

    network: Mapping[str, Tensor]
    config: LiveConfig
    autoencoder: Mapping[str, Tensor] | None
    autoencoder_config: AutoencoderConfig
    report: tuple[str, ...]

    def build(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[LiveModel, Autoencoder]:
        """The network in `dtype` and the autoencoder in float32. Raises ForcingError where the file had no autoencoder."""
        if self.autoencoder is None:
            raise ForcingError("This file has no autoencoder, without which there are no pictures. Give vae-kl16.ckpt too.")
        with torch.device("meta"):
            net, vae = LiveModel(self.config), Autoencoder(self.autoencoder_config)
        net.load_state_dict({name: t.to(device, dtype) for name, t in self.network.items()}, assign=True)
        vae.load_state_dict({name: t.to(device, torch.float32) for name, t in self.autoencoder.items()}, assign=True)
        return net.eval().requires_grad_(False), vae.eval().requires_grad_(False)


def load(path, vae=None, dataset: str = "re10k", heads: int | None = None) -> Loaded:
    """Read a checkpoint of LIVE, and the autoencoder from `vae` where that is given.

    dataset: key of DATASETS that the weights have to belong to. heads: of the network, by default as many as are 64 wide.
    Raises ForcingError for other files, missing or surplus weights, and weights of another data set.
    """
    path = Path(path)
    state, metadata = _read(path)
    names = {name.replace(COMPILED, ""): t for name, t in state.items()}
    network, sequence = _network(path, names)
    wanted = _dataset(dataset)
    _check_dataset(path, network, sequence, wanted)
    config = _config(path, network, wanted, heads)
    _check_names(path, network, LiveModel, config)
    autoencoder, where = _tokenizer(names), path
    if vae is not None:
        where = Path(vae)
        autoencoder = _autoencoder(where)
    made = _autoencoder_config(where, autoencoder, metadata)
    count = sum(t.numel() for t in network.values()) / 1e6
    size = f"{config.picture[1]}x{config.picture[0]}"
    report = (f"{path.name}: LIVE for {wanted.name}, {count:.0f} M weights, pictures of {size}.",
              "It has no autoencoder: give vae-kl16.ckpt too." if autoencoder is None else f"Autoencoder from {where.name}.")
    return Loaded(network, config, autoencoder, made, report)


def convert(source, target, *, vae=None, dtype: str = "bf16", dataset: str = "re10k", overwrite: bool = False) -> Loaded:
    """Write network and autoencoder as one safetensors file; the autoencoder stays float32, which costs 0.27 GB.

    dtype: "bf16", "fp16" or "fp32" of the network. `target` appears only when it is complete. Raises ForcingError.
    """
    source, target = Path(source), Path(target)
    if dtype not in DTYPES or target.suffix != ".safetensors":
        raise ForcingError(f"{target.name} in {dtype!r} cannot be written. Choose a name that ends with .safetensors and one "
                           f"of {', '.join(DTYPES)}.")
    if target.exists() and not overwrite:
        raise ForcingError(f"{target} exists already. Choose another name, or ask for it to be overwritten.")
    loaded = load(source, vae, dataset)
    if loaded.autoencoder is None:
        raise ForcingError(f"{source.name} has no autoencoder. Give vae-kl16.ckpt too (--vae), so that one file holds all.")
    parts = {f"{NETWORK}{name}": (t, DTYPES[dtype]) for name, t in loaded.network.items()}
    parts |= {f"{TOKENIZER}{name}": (t, torch.float32) for name, t in loaded.autoencoder.items()}
    metadata = {"format": "pt", META_SOURCE: source.name, META_PRESET: "live", META_SCALE: str(loaded.autoencoder_config.scale)}
    write_safetensors(_Cast(parts), target, metadata=metadata, overwrite=overwrite)
    log.info("wrote %s from %s", target, source)
    return loaded


class _Cast(Mapping):
    """Weights that get their dtype when they are asked for, one at a time."""

    def __init__(self, parts: dict[str, tuple[Tensor, torch.dtype]]):
        self._parts = parts

    def __getitem__(self, name: str) -> Tensor:
        tensor, dtype = self._parts[name]
        return tensor.to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All named tensors of a file's container, and its text metadata."""
    if not path.is_file():
        raise ForcingError(f"There is no file {path}. Check the folder and the spelling.")
    with path.open("rb") as stream:
        safe = stream.read(9)[8:] == b"{"
    if safe:
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
        except SafetensorError as error:
            raise ForcingError(f"{path.name} {DAMAGED}") from error
    raw = read_pickle(path)
    inner = next((raw[key] for key in CONTAINERS if isinstance(raw.get(key), Mapping)), raw)
    return {str(name): t for name, t in inner.items() if isinstance(t, Tensor)}, {}


def _network(path: Path, names: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
    """The network's weights, and how many tokens its masks were made for, where the file has some."""
    found = {name.removeprefix(NETWORK): t for name, t in names.items() if name.startswith(NETWORK)}
    found = found or {name: t for name, t in names.items() if not name.startswith(PARTS)}
    masks = [t.shape[-1] for name, t in found.items() if name.startswith(MASKS) and "cycle" not in name and t.ndim == 2]
    weights = {name: t for name, t in found.items() if not name.startswith(MASKS) and CACHES not in name}
    if "x_embedder.proj.weight" not in weights:
        alone = any(name.removeprefix(TOKENIZER).startswith(PARTS) for name in names)
        fix = ("Give it as the autoencoder, and live-re10k.ckpt as the checkpoint." if alone else
               f"Use live-re10k.ckpt. {DOWNLOAD_AGAIN}")
        raise ForcingError(f"{path.name} is {'an autoencoder' if alone else 'no checkpoint of LIVE'}. {fix}")
    return weights, masks[0] if masks else None


def _tokenizer(names: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The autoencoder beside a network; None for none."""
    found = {name.removeprefix(TOKENIZER): t for name, t in names.items() if name.startswith(TOKENIZER)}
    return {name: t for name, t in found.items() if name.startswith(PARTS)} or None


def _autoencoder(path: Path) -> dict[str, Tensor]:
    """The autoencoder of a file of its own."""
    state, _ = _read(path)
    names = {name.replace(COMPILED, "").removeprefix(TOKENIZER): t for name, t in state.items()}
    found = {name: t for name, t in names.items() if name.startswith(PARTS)}
    if not found:
        raise ForcingError(f"{path.name} is no autoencoder of LIVE. Use vae-kl16.ckpt of the same repository.")
    return found


def _dataset(name: str) -> Dataset:
    if name not in DATASETS:
        raise ForcingError(f"The data set {name!r} is not known. Use one of {', '.join(DATASETS)}.")
    return DATASETS[name]


def _kind(network: Mapping[str, Tensor]) -> tuple[str, int]:
    """What the weights of the condition are made for, and how many numbers of it a frame has."""
    if "c_embedder.proj.weight" in network:
        return "camera", network["c_embedder.proj.weight"].shape[1]
    size = network["c_embedder.mlp.0.weight"].shape[1] if "c_embedder.mlp.0.weight" in network else 0
    return next((kind for kind, count in CONDITIONS.items() if kind != "camera" and count == size), "nothing known"), size


def _check_dataset(path: Path, network: Mapping[str, Tensor], sequence: int | None, wanted: Dataset) -> None:
    kind, size = _kind(network)
    if (kind, size) == (wanted.condition, wanted.condition_dim) and sequence in (None, wanted.sequence):
        return
    same = [d.name for d in DATASETS.values()
            if (d.condition, d.condition_dim) == (kind, size) and sequence in (None, d.sequence)]
    belongs = f" ({' or '.join(same)})" if same else ""
    found, needed = _described(kind, size, sequence), _described(wanted.condition, wanted.condition_dim, wanted.sequence)
    raise ForcingError(f"{path.name} was trained on another data set{belongs}: it takes {found}, and {wanted.name} {needed}. "
                       "Use live-re10k.ckpt, or choose the data set that the file belongs to.")


def _described(kind: str, size: int, sequence: int | None) -> str:
    return f"{kind} conditions of {size} numbers" + ("" if sequence is None else f" for windows of {sequence} tokens")


def _config(path: Path, network: Mapping[str, Tensor], dataset: Dataset, heads: int | None) -> LiveConfig:
    patch = network["x_embedder.proj.weight"]
    dim = patch.shape[0]
    heads = heads or max(1, dim // HEAD)
    rope = tuple(share * (dim // heads) // HEAD for share in ROPE_SHARES)
    numbers = (name.split(".")[1] for name in network if name.startswith("blocks."))
    layers = 1 + max((int(number) for number in numbers if number.isdigit()), default=0)
    frequencies = network["t_embedder.mlp.0.weight"].shape[1] if "t_embedder.mlp.0.weight" in network else 256
    try:
        return LiveConfig(dim=dim, layers=layers, heads=heads, channels=patch.shape[1], latent=dataset.latent,
                          window=dataset.window, rope=rope, frequencies=frequencies, condition=dataset.condition,
                          condition_dim=dataset.condition_dim)
    except ForcingError as error:
        raise ForcingError(f"{path.name} is no checkpoint of LIVE: its width is {dim}. {error}") from error


def _autoencoder_config(path: Path, state: Mapping[str, Tensor] | None, metadata: Mapping[str, str]) -> AutoencoderConfig:
    default = AutoencoderConfig()
    if state is None:
        return default
    try:
        levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
        channels = state["encoder.conv_in.weight"].shape[0]
        blocks = 1 + max(int(name.split(".")[4]) for name in state if name.startswith("encoder.down.0.block."))
        widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
        config = replace(default, channels=channels, multiples=tuple(width // channels for width in widths), blocks=blocks,
                         latent_channels=state["post_quant_conv.weight"].shape[0],
                         scale=float(metadata.get(META_SCALE, default.scale)))
    except (KeyError, ValueError, IndexError) as error:
        raise ForcingError(f"{path.name} has no complete autoencoder. Use vae-kl16.ckpt.") from error
    _check_names(path, state, Autoencoder, config)
    return config


def _check_names(path: Path, state: Mapping[str, Tensor], kind: type, config) -> None:
    """Every weight that the module has, and no other, in its shape."""
    found = {name: tuple(t.shape) for name, t in state.items()}
    wanted = expected_shapes(kind, config)
    differs = Difference(missing=tuple(sorted(wanted.keys() - found.keys())), extra=tuple(sorted(found.keys() - wanted.keys())),
                         misshaped=tuple(sorted(n for n in wanted.keys() & found.keys() if wanted[n] != found[n])))
    if differs:
        what = "network" if kind is LiveModel else "autoencoder"
        raise ForcingError(f"{path.name} is not a complete {what} of LIVE. {differs.sentence} {DOWNLOAD_AGAIN}")


def expected_shapes(kind: type, config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a `LiveModel` or an `Autoencoder`; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in kind(config).state_dict().items()}
