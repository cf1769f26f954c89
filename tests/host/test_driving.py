"""Pictures and videos that users have for a portrait: of another shape, rate and length, without a face, with several."""
import io
from fractions import Fraction

import av
import comfy.sd
import comfy.utils
import numpy
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.streaming import Audio, VideoSink
from forcing_pack.nodes.driving import ForcingDrivingVideo, ForcingPortraitReference, around, face_of
from forcing_testkit import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LATENT = {"samples": torch.zeros(1, 16, 6, 4, 6)}  # 21 frames of 48x32


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tiny.tiny_wan_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors", dim=4)
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


def video(tmp_path, fps, frames, rate=None, size=(32, 48), name="a"):
    """A file whose frame n is as light as its time; a click at every whole second."""
    audio = None
    if rate:
        wave = numpy.zeros((1, round(frames / fps * rate)), numpy.float32)
        for second in range(int(frames / fps)):
            wave[0, second * rate:second * rate + rate // 50] = 0.8
        audio = Audio(wave, rate)
    with VideoSink(tmp_path / name, fps, "mkv lossless", audio=audio) as sink:
        for number in range(frames):
            sink.write(numpy.full((1, *size, 3), round(50 * number / fps), numpy.uint8))
    return InputImpl.VideoFromFile(str(sink.path))


def driven(source, **inputs):
    return ForcingDrivingVideo.execute(source, LATENT, **inputs).result


@pytest.mark.parametrize("fps", [8, 16, 24000 / 1001, 25, 60])
def test_every_rate_keeps_its_speed_and_its_sound(tmp_path, fps):
    images, audio, frames = driven(video(tmp_path, fps, round(3 * fps), 22050))
    assert images.shape == (21, 32, 48, 3) and frames == 21
    shown = (images.mean((1, 2, 3)) * 255 / 50).numpy()  # seconds
    assert numpy.abs(shown - numpy.arange(21) / 16).max() <= 0.5 / fps + 0.011
    assert audio["sample_rate"] == 22050 and audio["waveform"].shape == (1, 1, round(21 / 16 * 22050))
    loud = torch.nonzero(audio["waveform"][0, 0] > 0.4).flatten()
    assert loud[0] == 0 and abs(loud[loud > 5000][0] - 22050) <= 1


@pytest.mark.parametrize("rate", [11025, 22050, 44100, 48000])
def test_every_sample_rate(tmp_path, rate):
    _, audio, _ = driven(video(tmp_path, 25, 50, rate))
    assert audio["sample_rate"] == rate and audio["waveform"].shape[-1] == round(21 / 16 * rate)


@pytest.mark.parametrize(("short", "wanted"), [
    ("last frame", [*range(8), *[7] * 13]), ("back and forth", [*range(8), *range(6, -1, -1), *range(1, 7)])])
def test_a_video_that_is_too_short(tmp_path, short, wanted):
    images, audio, _ = driven(video(tmp_path, 16, 8, 16000), short=short)
    shown = (images.mean((1, 2, 3)) * 255 / 50 * 16).round().int().tolist()
    assert shown == wanted and abs(audio["waveform"].shape[-1] - 8000) <= 16  # heard once; a file counts milliseconds


def test_a_short_video_may_be_refused(tmp_path):
    with pytest.raises(ForcingError, match="has 8 frames at the model's rate, and the latent needs 21. Use a longer"):
        driven(video(tmp_path, 16, 8), short="refuse")
    assert driven(video(tmp_path, 16, 21, name="b"), short="refuse")[0].shape[0] == 21


def test_a_video_without_sound_and_one_from_images(tmp_path):
    assert driven(video(tmp_path, 16, 30))[1] is None
    parts = Types.VideoComponents(images=torch.rand(40, 64, 48, 3), frame_rate=Fraction(32),
                                  audio={"waveform": torch.rand(1, 2, 64000), "sample_rate": 32000})
    images, audio, _ = driven(InputImpl.VideoFromComponents(parts))
    assert images.shape == (21, 32, 48, 3) and audio["waveform"].shape == (1, 2, 42000)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_another_shape_is_an_explicit_choice(tmp_path, fit):
    """A white square in a wide picture: cut off, squeezed, or small between black bars."""
    pictures = numpy.zeros((21, 32, 96, 3), numpy.uint8)
    pictures[:, :, :24] = 255
    with VideoSink(tmp_path / "w", 16, "mkv lossless") as sink:
        sink.write(pictures)
    images = driven(InputImpl.VideoFromFile(str(sink.path)), fit=fit)[0]
    assert images.shape == (21, 32, 48, 3)
    light = images[0].mean().item()
    assert light == pytest.approx({"crop": 0, "stretch": 0.25, "pad": 0.125}[fit], abs=0.02)


def test_sound_that_begins_later_than_the_pictures(tmp_path):
    """It is preceded by silence, so that it stays in its place."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as file:
        pictures = file.add_stream("ffv1", rate=16)
        pictures.height, pictures.width, pictures.pix_fmt = 32, 48, "bgr0"
        sound = file.add_stream("flac", rate=16000)
        sound.layout = "mono"
        for number in range(32):
            frame = av.VideoFrame.from_ndarray(numpy.zeros((32, 48, 3), numpy.uint8), format="rgb24")
            frame.pts = number
            file.mux(pictures.encode(frame))
        frame = av.AudioFrame.from_ndarray(numpy.full((1, 8000), 20000, numpy.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 8000, Fraction(1, 16000)
        file.mux(sound.encode(frame))
        file.mux(pictures.encode(None))
        file.mux(sound.encode(None))
    wave = driven(InputImpl.VideoFromFile(buffer))[1]["waveform"][0, 0]
    loud = torch.nonzero(wave.abs() > 0.1).flatten()
    assert abs(loud[0].item() - 8000) <= 16 and len(wave) == 21000


# -- the reference ----------------------------------------------------------------------------------------------------

def found(*boxes):
    """What Detect Face Landmarks gives of one picture; only the boxes are looked at."""
    faces = [{"bbox_xyxy": numpy.array(box, numpy.float32)} for box in boxes]
    return {"frames": [faces], "image_size": (64, 64), "connection_sets": {}}


def picture():
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(8))


def test_no_face_and_several_faces(vae):
    for boxes, match in (((), "no face in the reference picture.*min_confidence"),
                         (((1, 1, 9, 9), (20, 1, 30, 9)), "2 faces in the reference picture. Cut it")):
        with pytest.raises(ForcingError, match=match):
            ForcingPortraitReference.execute(vae, picture(), LATENT, "crop", found(*boxes))
    assert face_of(found((1, 2, 3, 4))) == (1, 2, 3, 4)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad", "face"])
def test_a_reference_has_the_size_of_the_video(vae, fit):
    reference, image = ForcingPortraitReference.execute(vae, picture(), LATENT, fit, found((10, 10, 30, 30))).result
    assert image.shape == (1, 32, 48, 3) and reference["samples"].shape == (1, 16, 1, 4, 6)


def test_a_cut_around_a_face_has_it_in_the_middle():
    image = torch.zeros(1, 3, 100, 200)
    image[:, :, 40:60, 150:170] = 1
    cut = around(image, (150, 40, 170, 60), 48, 32)
    rows, columns = torch.nonzero(cut[0, 0] > 0.5).unbind(1)
    assert abs(rows.float().mean() - 15.5) < 1.5 and abs(columns.float().mean() - 23.5) < 1.5
    assert 0.35 < (rows.max() - rows.min() + 1) / 32 < 0.55
    assert around(image, (0, 0, 90, 90), 48, 32).shape == (1, 3, 32, 48)  # as large as fits inside


def test_what_cannot_be_a_reference(vae):
    with pytest.raises(ForcingError, match="needs to know where it is. Connect Detect Face Landmarks"):
        ForcingPortraitReference.execute(vae, picture(), LATENT, "face")
    with pytest.raises(ForcingError, match="one picture, and 3 came"):
        ForcingPortraitReference.execute(vae, torch.rand(3, 64, 64, 3), LATENT)
    with pytest.raises(ForcingError, match="latent is no video"):
        ForcingPortraitReference.execute(vae, picture(), {"samples": torch.zeros(1, 4, 8, 8)})
