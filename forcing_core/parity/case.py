"""Reading a folder of golden cases.

A case is one safetensors file: inputs, every random draw and the final latents of an official pipeline, axes
[B, F, C, H, W], float32; its metadata key `settings` says what was run. `weights.safetensors` beside the cases
holds the network (official Wan 2.1 T2V names) and its config.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ForcingError
from ..plan import Block
from ..wan import WanConfig, WanModel
from ..wan.text import pad_rows

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Case:
    """name, `settings` and the renoise index of one file, with its tensors as recorded."""

    name: str
    settings: dict[str, Any]
    draws: list[dict[str, Any]]
    forwards: list[list[Any]]
    tensors: dict[str, Tensor]

    def to(self, device) -> "Case":
        """The same case with its tensors on another device."""
        return replace(self, tensors={key: value.to(device) for key, value in self.tensors.items()})

    @property
    def given(self) -> Tensor | None:
        """Given frames as [B, C, M, H, W]."""
        initial = self.tensors.get("initial_latent")
        return None if initial is None else initial.transpose(1, 2)

    def prompts(self, indices: list[int]) -> Tensor:
        """[len(indices), 512, 4096]: zero rows beyond a prompt's own length."""
        embeds = self.tensors["prompt_embeds"][indices].clone()
        for row, index in enumerate(indices):
            embeds[row, self.settings["prompt_rows"][index]:] = 0
        return pad_rows(embeds)


class RecordedNoise:
    """The noise of the recorded run, by block and step."""

    def __init__(self, case: Case):
        self._clip = case.tensors["noise"].transpose(1, 2)
        given = case.settings["initial_frames"]
        self._skip = 0 if case.settings["noise_covers_initial"] else given
        self._draws = {(d["block"], d["step"]): case.tensors[f"renoise.{d['k']}"] for d in case.draws}

    def initial(self, block: Block) -> Tensor:
        return self._clip[:, :, block.first - self._skip:block.end - self._skip]

    def renoise(self, block: Block, step: int) -> Tensor:
        return self._draws[block.index, step].transpose(1, 2)


def _open(path: Path):
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ForcingError(f"{path} cannot be read as safetensors ({error}). Copy the file again.") from error


def read_case(path: Path) -> Case:
    """Read one case. Raises ForcingError when the file is not one."""
    with _open(path) as file:
        meta = file.metadata() or {}
        if "settings" not in meta:
            raise ForcingError(f"{path.name} has no 'settings' in its metadata, so it is not a golden case. "
                               "Point parity at a folder of recorded cases.")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    return Case(path.stem, json.loads(meta["settings"]), json.loads(meta.get("renoise", "[]")),
                json.loads(meta.get("forwards", "[]")), tensors)


def load_network(folder: Path, device: str = "cpu") -> WanModel:
    """The float32 network of a folder of cases, from `weights.safetensors`."""
    with _open(folder / WEIGHTS) as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
        state = {key: file.get_tensor(key).float() for key in file.keys()}
    net = WanModel(_config(config, state))
    net.load_state_dict(state)
    return net.eval().requires_grad_(False).to(device)


def _config(stored: dict[str, Any], state: dict[str, Tensor]) -> WanConfig:
    layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    dim = state["head.modulation"].shape[-1]
    return WanConfig(dim=dim, ffn_dim=state["blocks.0.ffn.0.weight"].shape[0], heads=dim // 128, layers=layers,
                     in_channels=state["patch_embedding.weight"].shape[1],
                     out_channels=state["head.head.weight"].shape[0] // 4,
                     freq_dim=state["time_embedding.0.weight"].shape[1],
                     text_dim=state["text_embedding.0.weight"].shape[1], eps=stored.get("eps", 1e-6))
