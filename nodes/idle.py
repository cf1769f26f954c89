"""Forcing Idle Portrait: the drawn face without an end, whose motion follows the prompt."""
from __future__ import annotations

import comfy.latent_formats
import comfy.model_management as mm
import comfy.sd
import torch
from comfy.supported_models_base import ClipTarget
from comfy_api.latest import io

from ..forcing_core.micro import face, idle, portrait
from ..forcing_core.presets import get
from . import micro
from .common import CATEGORY
from .host_conditioning import SOURCES
from .loading import prepared
from .portrait import BLOCK, vae


class _Moods:
    """Tokenizer of a CLIP: the weights of the motions that a text asks for. Raises ForcingError for unknown words."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_) -> dict:
        return {"idle": [[(weight, 1.0) for weight in idle.mood(text).tolist()]]}

    def state_dict(self) -> dict:
        return {}


class _Weights(torch.nn.Module):
    """Text encoder of a CLIP: a prompt that holds them. There are no weights of its own."""

    dtypes = (torch.float32,)

    def __init__(self, device=None, dtype=None, model_options=None):
        super().__init__()

    def set_clip_options(self, options: dict) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: dict) -> tuple[torch.Tensor, None]:
        rows = torch.tensor([[weight for weight, _ in row] for row in tokens["idle"]])
        return idle.embedded(rows).to(mm.intermediate_device()), None


def clip() -> comfy.sd.CLIP:
    """A CLIP for Forcing Stream, so that the motion can be steered. It stays on the CPU."""
    devices = {"load_device": micro.CPU, "offload_device": micro.CPU, "initial_device": micro.CPU}
    return comfy.sd.CLIP(ClipTarget(_Moods, _Weights), model_options=devices)


class ForcingIdlePortrait(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingIdlePortrait",
            display_name="Forcing Idle Portrait",
            category=CATEGORY,
            description="The tiny portrait model that comes with the pack, idling without an end: a drawn face that breathes, "
                        "sways and does what its prompt says. For Forcing Stream, whose panel changes the prompt.",
            search_aliases=["knot forcing", "talking head", "endless", "live portrait", "no download"],
            inputs=[
                io.Int.Input("person", default=1, min=0, max=2**31 - 1, tooltip="Who it is: each number is another face."),
                io.Int.Input("motion", default=1, min=0, max=2**31 - 1, tooltip="How the head sways: another way for each."),
                io.String.Input("text", default="calm",
                                tooltip=f"What it does at first, in these words: {', '.join(idle.WORDS)}. Left and right are "
                                        "those of the viewer."),
                io.Boolean.Input("listen", default=False, advanced=True,
                                 tooltip="Take a voice in pieces while Forcing Stream runs (POST /forcing/streams/ID/sound): "
                                         "it opens the mouth and is heard in the file."),
            ],
            outputs=[io.Model.Output(tooltip="Connect to Forcing Guider."),
                     io.Conditioning.Output(tooltip="The motion, made while it is needed. Connect to positive of Forcing "
                                                    "Guider."),
                     io.Clip.Output(tooltip="Connect to clip of Forcing Stream, to change the motion while it runs."),
                     io.Latent.Output(display_name="reference", tooltip="Connect to reference of Forcing Knot."),
                     io.Latent.Output(display_name="latent", tooltip="The size. Connect to latent_image of Forcing Stream."),
                     io.Vae.Output(tooltip="Connect to vae of Forcing Stream.")],
        )

    @classmethod
    def execute(cls, person, motion, text="calm", listen=False) -> io.NodeOutput:
        made = portrait.load()
        picture = made.code.encode(face.reference(face.identities(person, 1))[:, :, None])
        reference = comfy.latent_formats.Wan21().process_out(picture)
        model = prepared(comfy.sd.load_diffusion_model_state_dict(made.net.state_dict()), get(micro.SYSTEM).shift)
        conditioning = [[idle.prompt(text), {SOURCES: {"c_concat": idle.Idle(made.code, motion, listen)}}]]
        empty = torch.zeros(1, 16, BLOCK, 8, 8, device=mm.intermediate_device())
        return io.NodeOutput(model, conditioning, clip(), {"samples": reference}, {"samples": empty}, vae(made.code))
