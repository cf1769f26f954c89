"""What a weights file is, and its state dict under plain Wan names."""
from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from .. import presets
from ..errors import ForcingError
from ..presets import FLAT
from .config import ModelConfig, infer, is_quantised
from .containers import Container, open_model
from .keys import difference, strip_all
from .lora import Lora, Merged, load_lora

log = logging.getLogger(__name__)

# Our keys in the metadata of files written by `convert`.
META_PRESET, META_SOURCE, META_KEY = "forcing.preset", "forcing.source", "forcing.key"
META_LORA = "forcing.lora"

WHY_NOT = {
    "i2v": "an image-to-video model",
    "vace": "a VACE model",
    "wan2.2-5b": "a Wan 2.2 5B model (48 latent channels)",
    "other": "a Wan model with extra input channels",
}


@dataclass(frozen=True)
class Identity:
    """What a file can tell about itself. candidates: names of presets it may belong to, the most usual first.

    sure: the first candidate is the only file of that name, or the file says so itself.
    """

    file: str
    key: str
    keys: tuple[str, ...]
    config: ModelConfig
    candidates: tuple[str, ...]
    sure: bool
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Loaded:
    """A model ready to be put into a network: state_dict under plain Wan names, in the file's dtype.

    report: sentences about every choice that was made, and every doubt, to be shown to the user.
    loras: names of the LoRA files merged in, now or when the file was made.
    """

    state_dict: Mapping[str, Tensor]
    config: ModelConfig
    preset_name: str | None
    key: str
    report: tuple[str, ...]
    loras: tuple[str, ...] = ()


def identify(path, key: str | None = None) -> Identity:
    """Look at a file without choosing anything; raises ForcingError where it is no model."""
    container = open_model(path, key=key)
    return _identity(container, _weights(container))


def load(path, preset: str | None = None, key: str | None = None, lora=None, strength: float = 1.0) -> Loaded:
    """Load a text-to-video checkpoint of the family.

    preset: name of a preset; by default the file's own name decides. key: container to take ("generator_ema",
    "generator", "model", "flat"); by default the preset's, else the usual one. lora: path of a LoRA to merge.
    Raises ForcingError for anything that is not a complete plain Wan text-to-video model.
    """
    loaded = open_lazily(path, preset, key, lora, strength)
    return replace(loaded, state_dict=dict(loaded.state_dict))


def open_lazily(path, preset: str | None = None, key: str | None = None, lora=None, strength: float = 1.0) -> Loaded:
    """As `load`, but a LoRA is merged weight by weight as they are asked for."""
    asked = presets.get(preset) if preset else None
    likely = asked or presets.guess(str(path))  # which container to take must be known before there is metadata
    container = open_model(path, prefer=likely.weights_key if likely else None, key=key)
    state = _weights(container)
    identity = _identity(container, state)
    chosen = asked or (presets.PRESETS[identity.candidates[0]] if identity.sure else None)
    _require_plain(identity, state)
    report = [*_about_file(identity, chosen, asked=key), *_about_preset(identity, chosen)]
    loras = tuple(json.loads(container.metadata.get(META_LORA, "[]")))
    if lora is not None:
        factors = load_lora(lora)
        state = Merged(state, factors, strength)
        report += _about_lora(factors, strength, loras)
        loras += (factors.name,)
    elif chosen and chosen.lora and not loras:
        report.append(f"{chosen.name} also needs its LoRA ({chosen.lora.path}): without it this is the base model.")
    return Loaded(state, identity.config, chosen.name if chosen else None, container.key, tuple(report), loras)


def _weights(container: Container) -> dict[str, Tensor]:
    state = strip_all(container.tensors)
    if any(".lora_" in name for name in state):
        raise ForcingError(f"{container.path.name} holds a LoRA, not a model. "
                           "Load the base model, and give this file as its LoRA.")
    if is_quantised(state):
        raise ForcingError(f"{container.path.name} is quantised with scales beside its weights. "
                           "Use the original file, and let ComfyUI's loader quantise it.")
    return state


def _identity(container: Container, state: Mapping[str, Tensor]) -> Identity:
    told = container.metadata.get(META_PRESET)
    by_name = [preset.name for preset in presets.for_file(str(container.path))]
    known = told in presets.PRESETS
    candidates = dict.fromkeys(([told] if known else []) + by_name)
    guess = presets.guess(str(container.path))
    return Identity(container.path.name, container.key, container.keys, infer(state, container.metadata),
                    tuple(candidates), known or guess is not None, container.metadata)


def _require_plain(identity: Identity, state: Mapping[str, Tensor]) -> None:
    config = identity.config
    if config.variant != "t2v":
        raise ForcingError(f"{identity.file} is {WHY_NOT[config.variant]}. "
                           "Use a Wan 2.1 text-to-video checkpoint of this family.")
    differs = difference(state, config)
    if differs:
        raise ForcingError(f"{identity.file} is not a complete Wan 2.1 text-to-video model. {differs.sentence} "
                           "Use the original file.")


def _about_file(identity: Identity, chosen, asked: str | None) -> list[str]:
    report = [f"{identity.file}: Wan 2.1 text-to-video, {identity.config.size}, container {identity.key}."]
    usual = chosen.weights_key if chosen else FLAT
    if FLAT not in (usual, identity.key) and identity.key != usual:
        why = "you asked for it" if asked else "the file has no other"
        report.append(f"The authors of {chosen.name} use {usual}; {identity.key} was taken because {why}.")
    return report


def _about_preset(identity: Identity, chosen) -> list[str]:
    if chosen is None:
        which = f"one of {', '.join(identity.candidates)}" if identity.candidates else "the preset it was made for"
        return [f"The file does not tell its step list. Choose {which}."]
    report = [f"Preset {chosen.name}: {chosen.title}."]
    if not chosen.base.endswith(identity.config.size):
        report.append(f"{chosen.name} belongs to {chosen.base}, but this model is {identity.config.size}.")
    if not chosen.available:
        report.append(f"This version does not run {chosen.name}: {chosen.runs.removeprefix('no: ')}.")
    return report


def _about_lora(factors: Lora, strength: float, earlier: tuple[str, ...]) -> list[str]:
    report = [f"{factors.name} merged: {len(factors.pairs)} layers, rank {factors.rank}, strength {strength:g}."]
    if earlier:
        report.append(f"The file already had {', '.join(earlier)} merged in; this one came on top.")
    if factors.is_speed_up:
        report.append(f"{factors.name} looks like a speed-up of a bidirectional model; the step-distilled checkpoints "
                      "of this family do not need one, and it may harm them.")
    return report
