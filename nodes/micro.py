"""The micro model that comes with the pack, as MODEL, CLIP and VAE: a graph that runs with nothing to download."""
from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import torch
from comfy.supported_models_base import ClipTarget
from comfy_api.latest import io

from ..forcing_core import checkpoints
from ..forcing_core.micro import bundle
from ..forcing_core.presets import get
from .common import CATEGORY
from .loading import plain_model, prepared

TEACHER = "causal-forcing-ar-teacher-chunkwise"
SYSTEM = "self-forcing"
CPU = torch.device("cpu")


class _Words:
    """Tokenizer of a CLIP: one number a word. Raises ForcingError, with the vocabulary, for unknown words."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        self.codec = bundle.codec()

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_) -> dict:
        ids = self.codec.tokens(bundle.known(text))[0].tolist()
        return {"micro": [[(number, 1.0, place) if return_word_ids else (number, 1.0) for place, number in enumerate(ids)]]}

    def state_dict(self) -> dict:
        return {}


class _Rows(torch.nn.Module):
    """Text encoder of a CLIP: the fixed rows of the words. There are no weights, and no layers to choose from."""

    dtypes = (torch.float32,)

    def __init__(self, device=None, dtype=None, model_options=None):
        super().__init__()
        self.codec = bundle.codec()

    def set_clip_options(self, options: dict) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: dict) -> tuple[torch.Tensor, None]:
        """([B, 24, 4096], no pooled output). Weights of words have no meaning here."""
        ids = torch.tensor([[entry[0] for entry in row] for row in tokens["micro"]])
        return self.codec.embed(ids).to(mm.intermediate_device()), None


def clip() -> comfy.sd.CLIP:
    """A CLIP as every text node takes it. It stays on the CPU, where looking words up takes no time."""
    devices = {"load_device": CPU, "offload_device": CPU, "initial_device": CPU}
    return comfy.sd.CLIP(ClipTarget(_Words, _Rows), model_options=devices)


def network(name: str, folder: Path = bundle.WEIGHTS):
    """MODEL of one of bundle.NETWORKS, prepared as Forcing Load Checkpoint does."""
    path = bundle.path(name, folder)
    return prepared(plain_model(checkpoints.load(path), path.name), get(SYSTEM).shift)


def vae(folder: Path = bundle.WEIGHTS) -> comfy.sd.VAE:
    """VAE of the bundled file, as Load VAE makes it."""
    state, metadata = comfy.utils.load_torch_file(str(bundle.path("vae", folder)), return_metadata=True)
    made = comfy.sd.VAE(sd=state, metadata=metadata)
    made.throw_exception_if_invalid()
    return made


class ForcingMicroModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        kinds = "; ".join(f"{name}: {what}" for name, what in bundle.NETWORKS.items())
        return io.Schema(
            node_id="ForcingMicroModel",
            display_name="Forcing Micro Model",
            category=CATEGORY,
            description="A tiny model that comes with the pack, so nothing has to be downloaded: 64x64 clips of coloured "
                        "shapes. For a first look, for tests, and for comparing ways of training.",
            search_aliases=["hello world", "self forcing", "demo", "no download"],
            inputs=[
                io.Combo.Input("model", options=list(bundle.NETWORKS), default="student",
                               tooltip=f"{kinds}. All run as system {SYSTEM}; only the teacher as {TEACHER} with cfg 3."),
            ],
            outputs=[io.Model.Output(tooltip="Connect to Forcing Guider."),
                     io.Clip.Output(tooltip="Connect to CLIP Text Encode. Knows only the words of its world, for example "
                                            "'a red circle moving left on a dark background'."),
                     io.Vae.Output(tooltip="Connect to VAE Decode.")],
        )

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        return io.NodeOutput(network(model), clip(), vae())
