"""Forcing Micro Portrait: a drawn face that moves and speaks, as MODEL, driving conditioning, reference and VAE."""
from __future__ import annotations

import comfy.latent_formats
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import torch
from comfy_api.latest import io

from ..forcing_core.conditioning import Held
from ..forcing_core.micro import face, portrait
from ..forcing_core.micro.code import LinearCode
from ..forcing_core.micro.code_stream import CodeStream
from ..forcing_core.micro.temporal import SECOND
from ..forcing_core.presets import get
from . import micro
from .common import CATEGORY
from .host_conditioning import SOURCES
from .loading import prepared

BLOCK, RATE = 3, 16000


class CodeVAE(torch.nn.Module):
    """The linear code in the place of a VAE's network, in the scale that ComfyUI's latent format takes off."""

    def __init__(self, code: LinearCode):
        super().__init__()
        self.code, self.format = code, comfy.latent_formats.Wan21()

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return self.format.process_out(self.code.to(video.device).encode(video.float())).to(video.dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.code.to(latents.device).decode(self.format.process_in(latents.float())).to(latents.dtype)


    def stream(self) -> CodeStream:
        """For Forcing Stream, which decodes block by block."""
        return CodeStream(self.decode)


def vae(code: LinearCode) -> comfy.sd.VAE:
    """A VAE that VAE Encode, VAE Decode and Forcing Stream take."""
    made = micro.vae()
    made.first_stage_model = CodeVAE(code)
    made.patcher = comfy.model_patcher.ModelPatcher(made.first_stage_model, load_device=made.device,
                                                    offload_device=mm.vae_offload_device())
    return made


def conditioning(latents: torch.Tensor) -> list:
    """CONDITIONING with driving latents [1, 16, F, 8, 8] in the network's scale, cut block by block as it is used."""
    return [[torch.zeros(1, portrait.ROWS, portrait.TEXT_DIM), {SOURCES: {"c_concat": Held(latents, 2)}}]]


class ForcingMicroPortrait(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingMicroPortrait",
            display_name="Forcing Micro Portrait",
            category=CATEGORY,
            description="A tiny portrait model that comes with the pack: a drawn face, 64x64 pixels, kept by a reference and "
                        "moved by a track of head pose and voice. Nothing has to be downloaded, and it runs on a CPU.",
            search_aliases=["knot forcing", "talking head", "audio driven", "no download"],
            inputs=[
                io.Int.Input("person", default=1, min=0, max=2**31 - 1, tooltip="Who it is: each number is another face."),
                io.Int.Input("motion", default=1, min=0, max=2**31 - 1, tooltip="How the head moves: another track for each."),
                io.Float.Input("length", default=10.0, min=1.0, max=600.0, step=0.5,
                               tooltip="Seconds of driving track, rounded up to whole blocks of 3 latent frames."),
                io.Audio.Input("audio", optional=True,
                               tooltip="A voice whose loudness opens the mouth. Without one the track hums for itself."),
            ],
            outputs=[io.Model.Output(tooltip="Connect to Forcing Guider."),
                     io.Conditioning.Output(tooltip="The driving track. Connect to positive of Forcing Guider."),
                     io.Latent.Output(display_name="reference", tooltip="Connect to reference of Forcing Knot."),
                     io.Latent.Output(display_name="latent", tooltip="The empty video. Connect to latent_image."),
                     io.Vae.Output(tooltip="Connect to VAE Decode."),
                     io.Audio.Output(tooltip="The voice. Connect to Create Video."),
                     io.Image.Output(display_name="puppet", tooltip="The track as a video.")],
        )

    @classmethod
    def execute(cls, person, motion, length, audio=None) -> io.NodeOutput:
        made = portrait.load()
        latents = BLOCK * -(-int(length * SECOND + 3) // (4 * BLOCK))
        who, drive = face.identities(person, 1), face.track(motion, 1, 4 * latents - 3)
        if audio is None:
            audio = {"waveform": portrait.voice(drive[0, 3], RATE)[None], "sample_rate": RATE}
        drive[0, 3] = portrait.loudness(audio["waveform"][0], audio["sample_rate"], drive.shape[2])
        puppet = face.driver(face.eased(drive))
        scale = comfy.latent_formats.Wan21().process_out
        reference = scale(made.code.encode(face.reference(who)[:, :, None]))
        model = comfy.sd.load_diffusion_model_state_dict(made.net.state_dict())
        empty = torch.zeros(1, 16, latents, 8, 8, device=mm.intermediate_device())
        return io.NodeOutput(prepared(model, get(micro.SYSTEM).shift), conditioning(made.code.encode(puppet)),
                             {"samples": reference}, {"samples": empty}, vae(made.code), audio,
                             puppet[0].movedim(0, -1).add(1).div(2))
