"""What a portrait is made of, fitted to the latent: one picture of a face, and a video that moves it, with its sound."""
from __future__ import annotations

from fractions import Fraction
from typing import Callable, Iterable

import comfy.model_management as mm
import torch
from comfy_api.latest import InputImpl, io
from torch import Tensor

from ..forcing_core.errors import ForcingError
from ..forcing_core.options import pixel_frames
from ..forcing_core.streaming.sound import sound_of
from .common import CATEGORY
from .latents import FIT, FITS
from .video import Source, fitted, of_video

AROUND = "face"  # the fit that cuts around a detected face
FACE_SHARE = 0.45  # of the height of such a cut
TURN = ["last frame", "back and forth", "refuse"]
Landmarks = io.Custom("FACE_LANDMARKS")


def face_of(landmarks: dict) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the only face, in pixels; ForcingError for none and for several."""
    found = landmarks["frames"][0] if landmarks["frames"] else []
    if not found:
        raise ForcingError("There is no face in the reference picture. Take one that shows a face from the front, or lower "
                           "min_confidence of Detect Face Landmarks.")
    if len(found) > 1:
        raise ForcingError(f"There are {len(found)} faces in the reference picture. Cut it so that only one is seen.")
    return tuple(float(side) for side in found[0]["bbox_xyxy"])


def around(image: Tensor, face: tuple[float, float, float, float], width: int, height: int) -> Tensor:
    """The part of an image [1, C, H, W] of the shape width : height around a face, as large as fits inside, in that size."""
    left, top, right, bottom = face
    tall = min((bottom - top) / FACE_SHARE, image.shape[-2], image.shape[-1] * height / width)
    size = max(1, round(tall * width / height)), max(1, round(tall))
    x, y = (min(max(0, round((a + b) / 2 - side / 2)), whole - side)
            for a, b, side, whole in ((left, right, size[0], image.shape[-1]), (top, bottom, size[1], image.shape[-2])))
    return FIT["stretch"](image[..., y:y + size[1], x:x + size[0]], width, height)


def size_of(latent: dict) -> tuple[int, int, int]:
    """(width, height, frames of video) of a LATENT. Raises ForcingError for one without frames."""
    samples = latent["samples"]
    if samples.ndim != 5:
        raise ForcingError(f"The latent is no video: its shape is {list(samples.shape)}. Connect Forcing Empty Latent.")
    return samples.shape[4] * 8, samples.shape[3] * 8, pixel_frames(samples.shape[2])


class ForcingPortraitReference(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingPortraitReference",
            display_name="Forcing Portrait Reference",
            category=CATEGORY,
            description="The picture of a face as the reference of Forcing Knot: cut to the size of the video, checked to show "
                        "one face where a face detector is connected, and encoded.",
            search_aliases=["portrait", "face crop", "reference image", "knot forcing"],
            inputs=[
                io.Vae.Input("vae", tooltip="Wan 2.1 VAE."),
                io.Image.Input("image", tooltip="One picture of one person."),
                io.Latent.Input("latent", tooltip="From Forcing Empty Latent: the size."),
                io.Combo.Input("fit", options=[*FITS, AROUND], default="crop",
                               tooltip="Where the shape differs: crop the edges, stretch, pad with black, or cut around the "
                                       "face, which needs face_landmarks."),
                Landmarks.Input("face_landmarks", optional=True,
                                tooltip="From Detect Face Landmarks (MediaPipe) of the same image, with num_faces 0: then a "
                                        "picture with no face or with several is refused."),
            ],
            outputs=[io.Latent.Output(display_name="reference", tooltip="Connect to reference of Forcing Knot."),
                     io.Image.Output(display_name="image", tooltip="The picture as it was cut.")],
        )

    @classmethod
    def execute(cls, vae, image, latent, fit="crop", face_landmarks=None) -> io.NodeOutput:
        if image.shape[0] != 1:
            raise ForcingError(f"A reference is one picture, and {image.shape[0]} came. Take one with Get Image from Batch.")
        if fit == AROUND and face_landmarks is None:
            raise ForcingError("Cutting around the face needs to know where it is. Connect Detect Face Landmarks (MediaPipe) "
                               "to face_landmarks, or choose another fit.")
        face = None if face_landmarks is None else face_of(face_landmarks)
        width, height, _ = size_of(latent)
        picture = image[:, :, :, :3].movedim(-1, 1)
        cut = around(picture, face, width, height) if fit == AROUND else FIT[fit](picture, width, height)
        cut = cut.movedim(1, -1).clamp(0, 1)
        return io.NodeOutput({"samples": vae.encode(cut)}, cut)


def _held(count: int, wanted: int) -> Iterable[int]:
    return (min(number, count - 1) for number in range(wanted))


def _turning(count: int, wanted: int) -> Iterable[int]:
    period = max(1, 2 * count - 2)
    return (min(number % period, period - number % period) for number in range(wanted))


def _refused(count: int, wanted: int) -> Iterable[int]:
    raise ForcingError(f"The driving video has {count} frames at the model's rate, and the latent needs {wanted}. Use a longer "
                       "video, a shorter latent, or another choice for short.")


SHORT: dict[str, Callable[[int, int], Iterable[int]]] = dict(zip(TURN, (_held, _turning, _refused)))


def _in_order(source: Source, wanted: list[int], size: tuple[int, int], fit: str) -> Tensor:
    """[T, H, W, 3] of frames of a source in any order; each is read and fitted once."""
    once = sorted({*wanted})
    images = torch.stack([*fitted(source.read(once), size, fit)])
    place = {number: at for at, number in enumerate(once)}
    return images if once == wanted else images[[place[number] for number in wanted]]


def _sound(video, source: Source, seconds: Fraction) -> dict | None:
    """AUDIO of so many seconds from the first frame on."""
    times = source.shown.times
    if isinstance(video, InputImpl.VideoFromComponents) or not hasattr(video, "get_active_trim_window"):
        audio = video.get_components().audio
        return audio and {**audio, "waveform": audio["waveform"][..., :round(seconds * audio["sample_rate"])]}
    sound = sound_of(video.get_stream_source(), times[0], min(seconds, source.shown.end - times[0]))
    return sound and {"waveform": torch.from_numpy(sound.samples)[None], "sample_rate": sound.rate}


class ForcingDrivingVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingDrivingVideo",
            display_name="Forcing Driving Video",
            category=CATEGORY,
            description="A video that moves a portrait: at the model's frame rate whatever its own, in the size and length of "
                        "the latent, with the sound that belongs to it.",
            search_aliases=["portrait", "driving video", "control video", "vace", "frame rate"],
            inputs=[
                io.Video.Input("video", tooltip="From Load Video. Variable frame rates keep their speed."),
                io.Latent.Input("latent", tooltip="From Forcing Empty Latent: size and length."),
                io.Combo.Input("fit", options=FITS, default="crop",
                               tooltip="Where the shape differs: crop the edges, stretch, or pad with black."),
                io.Combo.Input("short", options=TURN, default="last frame",
                               tooltip="Where the video ends before the latent does: its last frame goes on, it is played back "
                                       "and forth, or it is refused. The sound is heard once."),
                io.Float.Input("fps", default=16.0, min=1.0, max=120.0, step=1.0, advanced=True,
                               tooltip="Frames a second that the model makes; 16 for Wan 2.1."),
            ],
            outputs=[io.Image.Output(display_name="images",
                                     tooltip="For a preprocessor (Canny, pose, depth) and WanVaceToVideo."),
                     io.Audio.Output(display_name="audio", tooltip="Its sound from the beginning, for Forcing Stream. Nothing "
                                                                   "where it has none."),
                     io.Int.Output(display_name="frames", tooltip="How many images: for length of WanVaceToVideo.")],
        )

    @classmethod
    def execute(cls, video, latent, fit="crop", short="last frame", fps=16.0) -> io.NodeOutput:
        width, height, frames = size_of(latent)
        source = of_video(video)
        indices = source.shown.at(fps)
        order = range(frames) if len(indices) >= frames else SHORT[short](len(indices), frames)
        wanted = [indices[number] for number in order]
        images = _in_order(source, wanted, (width, height), fit)
        audio = _sound(video, source, frames / Fraction(fps))
        return io.NodeOutput(images.to(mm.intermediate_device()), audio, frames)
