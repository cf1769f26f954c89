"""LIVE: a camera or actions drive a world that goes on from a picture. A network of its own, so sockets of its own."""
from __future__ import annotations

from dataclasses import dataclass

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.live import ActionTrack, CameraPath, CameraTrack, LiveConfig, live_rollout, load
from ..forcing_core.live.camera_path import EASINGS, PRESETS, draw, keyed_path, parse_keyframes, preset_path
from ..forcing_core.micro import bundle
from ..forcing_core.micro import live as micro
from ..forcing_core.noise import BlockNoise
from .common import CATEGORY

Live = io.Custom("FORCING_LIVE")
Drive = io.Custom("FORCING_LIVE_TRACK")
INSIDE = "inside the checkpoint"
KEYFRAMES, POSES = "keyframes", "pose file"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SAME_ASPECT = 0.02


@dataclass(frozen=True)
class LiveModels:
    """What the socket FORCING_LIVE carries: network and autoencoder under ComfyUI's memory manager."""

    network: comfy.model_patcher.ModelPatcher
    autoencoder: comfy.model_patcher.ModelPatcher
    config: LiveConfig
    dtype: torch.dtype


def compute_dtype(name: str) -> torch.dtype:
    """As asked for; by default fp16 as in the public evaluation where the card has it, else fp32."""
    if name != "default":
        return DTYPES[name]
    return torch.float16 if mm.should_use_fp16(mm.get_torch_device()) else torch.float32


def models(path: str, vae: str | None, dtype: torch.dtype) -> LiveModels:
    """The models of a file. Raises ForcingError for files that are no complete LIVE."""
    loaded = load(path, vae)
    return managed(*loaded.build(dtype), loaded.config, dtype)


def micro_models(dtype: torch.dtype) -> LiveModels:
    """LIVE in small, with the micro VAE for its pictures."""
    net = micro.read(micro.path())
    return managed(net.to(dtype), micro.PictureVAE(bundle.vae()), net.config, dtype)


def checkpoints() -> list[str]:
    """What there is to load: files, and in front of them the micro LIVE where its weights are there."""
    return [*[micro.CHOICE] * micro.bundled(), *folder_paths.get_filename_list("diffusion_models")]


def managed(net: torch.nn.Module, autoencoder: torch.nn.Module, config: LiveConfig, dtype: torch.dtype) -> LiveModels:
    place, rest = mm.get_torch_device(), mm.unet_offload_device()
    patchers = [comfy.model_patcher.ModelPatcher(part, load_device=place, offload_device=rest) for part in (net, autoencoder)]
    return LiveModels(*patchers, config, dtype)


def start_pictures(image: Tensor, config: LiveConfig) -> Tensor:
    """IMAGE [N, H, W, 3] at the network's size. Raises ForcingError for another aspect."""
    (height, width), (rows, columns) = config.picture, image.shape[1:3]
    if abs(columns * height / (rows * width) - 1) > SAME_ASPECT:
        raise ForcingError(f"The start image is {columns}x{rows}, but this LIVE makes pictures of {width}x{height}. Crop it to "
                           f"that aspect first, for example by Upscale Image at {width}x{height} with crop center.")
    pixels = comfy.utils.common_upscale(image[..., :3].movedim(-1, 1), width, height, "bicubic", "disabled")
    return pixels.movedim(1, -1).clamp(0, 1)


@torch.inference_mode()
def sample(live: LiveModels, track: CameraPath | ActionTrack, image: Tensor, seed: int, steps: int, window: int,
           start_frames: int) -> Tensor:
    """IMAGE [F, H, W, 3] as long as the track: the start pictures, then the frames that are made."""
    if start_frames > image.shape[0]:
        raise ForcingError(f"{start_frames} start frames were asked for as context, but the image input has {image.shape[0]}. "
                           "Set start_frames to 0, or connect a longer clip.")
    pictures = start_pictures(image[-start_frames:] if start_frames else image, live.config)
    drive = CameraTrack(track, live.config.latent) if isinstance(track, CameraPath) else track
    frames = track.length - pictures.shape[0]
    if frames < 1:
        raise ForcingError(f"The track is {track.length} frames long and {pictures.shape[0]} frames are given, so there is "
                           "nothing to make. Make the track longer, or give fewer start frames.")
    mm.load_models_gpu([live.network, live.autoencoder])
    device, autoencoder = live.network.load_device, live.autoencoder.model
    given = autoencoder.encode((2 * pictures - 1).movedim(-1, 1).to(device)).float().movedim(0, 1)[None]
    noise = BlockNoise(seed, (1, live.config.channels), live.config.latent, device)
    progress, made, window = comfy.utils.ProgressBar(frames), [pictures], min(window, live.config.window)
    rollout = live_rollout(live.network.model, drive, given, frames, noise, window=window, steps=steps, dtype=live.dtype)
    for _, latents in rollout:
        mm.throw_exception_if_processing_interrupted()
        made.append(frames_of(autoencoder.decode(latents[0].movedim(0, 1))))
        progress.update(1)
    return torch.cat([part.to(mm.intermediate_device()) for part in made])


def frames_of(decoded: Tensor) -> Tensor:
    """[N, 3, H, W] of the autoencoder as IMAGE [N, H, W, 3]. Raises ForcingError for numbers that are none."""
    if not torch.isfinite(decoded).all():
        raise ForcingError("LIVE made a frame of NaN or infinite numbers. Load the checkpoint in bf16 or fp32.")
    return ((decoded.float() + 1) / 2).clamp(0, 1).movedim(1, -1)


class ForcingLiveCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingLiveCheckpoint",
            display_name="Forcing LIVE Checkpoint",
            category=CATEGORY,
            description="Loads LIVE, a world model of 774 M weights that a camera drives: the published live-re10k.ckpt with "
                        "its autoencoder, or the file that the convert command makes of both.",
            search_aliases=["world model", "camera control", "re10k", "interactive video"],
            inputs=[
                io.Combo.Input("checkpoint", options=checkpoints(),
                               tooltip="File in models/diffusion_models: live-re10k.ckpt, or a converted .safetensors. The "
                                       "micro LIVE, where its weights are: a shape on 64x64 pixels that keys move."),
                io.Combo.Input("autoencoder", options=[INSIDE, *folder_paths.get_filename_list("vae")], default=INSIDE,
                               tooltip="vae-kl16.ckpt in models/vae for the published checkpoint. Converted files hold it."),
                io.Combo.Input("dtype", options=["default", *DTYPES], default="default", advanced=True,
                               tooltip="Of the network. default is fp16, as the authors evaluate it, where the card has it."),
            ],
            outputs=[Live.Output(display_name="live", tooltip="Connect to Forcing LIVE Sampler or Forcing LIVE Stream.")],
        )

    @classmethod
    def execute(cls, checkpoint, autoencoder, dtype="default") -> io.NodeOutput:
        if checkpoint == micro.CHOICE:
            return io.NodeOutput(micro_models(compute_dtype(dtype)))
        vae = None if autoencoder == INSIDE else folder_paths.get_full_path_or_raise("vae", autoencoder)
        path = folder_paths.get_full_path_or_raise("diffusion_models", checkpoint)
        return io.NodeOutput(models(path, vae, compute_dtype(dtype)))


class ForcingCameraPath(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingCameraPath",
            display_name="Forcing Camera Path",
            category=CATEGORY,
            description="A camera to drive LIVE with: a move by name, keyframes of your own, or recorded poses. Draws it.",
            search_aliases=["camera control", "trajectory", "orbit", "dolly", "pan"],
            inputs=[
                io.Int.Input("frames", default=64, min=2, max=100000,
                             tooltip="Length of the video, start pictures included. LIVE was trained on every second frame of "
                                     "30 a second, so 15 are a second. A pose file brings its own length."),
                io.Combo.Input("move", options=[*PRESETS, KEYFRAMES, POSES], default="forward",
                               tooltip="A move over the whole video, or what the text below says."),
                io.Float.Input("amount", default=1.0, min=-100.0, max=100.0, step=0.05,
                               tooltip="Of a move by name: 1 is one scene unit (a few steps), or 45 degrees of a turn."),
                io.String.Input("text", default="0: 0 0 0\n63: 0 0 1 30", multiline=True,
                                tooltip="keyframes: a line each, 'frame: x y z yaw pitch roll', x to the right, y down, z "
                                        "ahead, angles in degrees. pose file: lines of 16 numbers, or of 18 or 19 as "
                                        "RealEstate10K has them."),
                io.Combo.Input("easing", options=list(EASINGS), default="smooth", advanced=True,
                               tooltip="Between keyframes: smooth starts and stops gently, linear keeps one speed."),
                io.Float.Input("field_of_view", default=60.0, min=1.0, max=170.0, step=1.0, advanced=True,
                               tooltip="Degrees from top to bottom; about 60 in the training data. Not used by a pose file."),
            ],
            outputs=[Drive.Output(display_name="track", tooltip="Connect to Forcing LIVE Sampler."),
                     io.Image.Output(display_name="picture", tooltip="The path from above and from the side.")],
        )

    @classmethod
    def execute(cls, frames, move, amount, text, easing="smooth", field_of_view=60.0) -> io.NodeOutput:
        kinds = {KEYFRAMES: lambda: keyed_path(parse_keyframes(text, frames), frames, easing, field_of_view),
                 POSES: lambda: CameraPath.parse(text)}
        path = kinds.get(move, lambda: preset_path(move, frames, amount, easing, field_of_view))()
        return io.NodeOutput(path, draw(path)[None])


class ForcingActionTrack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingActionTrack",
            display_name="Forcing Action Track",
            category=CATEGORY,
            description="Actions to drive a LIVE that was trained on a game: one of your own, such as the micro "
                        "LIVE of 'python -m forcing_core train live'. The authors' weights are not published yet.",
            search_aliases=["minecraft", "keyboard", "game actions"],
            inputs=[
                io.Int.Input("frames", default=64, min=2, max=100000, tooltip="Length of the video, start pictures included."),
                io.String.Input("text", default="0: forward\n32: forward jump cameraX=0.2", multiline=True,
                                tooltip="A line each, 'frame: action action'; it holds until the next line. cameraX and "
                                        "cameraY take a number from -1 to 1, such as cameraX=0.2. The micro LIVE knows left, "
                                     "right, forward (up) and back (down)."),
            ],
            outputs=[Drive.Output(display_name="track", tooltip="Connect to Forcing LIVE Sampler.")],
        )

    @classmethod
    def execute(cls, frames, text) -> io.NodeOutput:
        return io.NodeOutput(ActionTrack.parse(text, frames))


class ForcingLiveSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingLiveSampler",
            display_name="Forcing LIVE Sampler",
            category=CATEGORY,
            description="Goes on from a picture, frame by frame, as the track says, for as long as it is. Time and memory of a "
                        "frame stay the same.",
            search_aliases=["world model", "camera control", "image to video"],
            inputs=[
                Live.Input("live", tooltip="From Forcing LIVE Checkpoint."),
                Drive.Input("track", tooltip="From Forcing Camera Path, or Forcing Action Track for the micro LIVE. The video "
                                             "becomes as long as it."),
                io.Image.Input("image", tooltip="Start picture, or a clip to go on from; square for RealEstate10K, any size."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="The same seed and track give the same video; a longer one begins like a shorter one "
                                     "under the same camera."),
                io.Int.Input("steps", default=18, min=2, max=1000, advanced=True,
                             tooltip="18 as published, 3 for the micro LIVE."),
                io.Int.Input("window", default=32, min=2, max=32, advanced=True,
                             tooltip="Frames that are seen at once, the new one included; 32 as trained (the micro LIVE: 8). "
                                     "Less is faster and forgets sooner."),
                io.Int.Input("start_frames", default=0, min=0, max=100000, advanced=True,
                             tooltip="Use the last so many pictures of a clip as context. 0 uses all."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="Start pictures and new frames; 15 a second. Connect to "
                                                                    "Create Video.")],
        )

    @classmethod
    def execute(cls, live, track, image, seed, steps=18, window=32, start_frames=0) -> io.NodeOutput:
        return io.NodeOutput(sample(live, track, image, seed, steps, window, start_frames))
