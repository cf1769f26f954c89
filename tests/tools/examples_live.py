"""The example workflows of LIVE: a camera in a picture, and, where the micro LIVE was trained, keys that move a shape."""
from example_clip import MODELS, PROMPTS, VIDEO
from forcing_pack.forcing_core.micro.live import CHOICE, bundled
from forcing_pack.forcing_core.micro.steer import FPS
from forcing_pack.forcing_core.presets import get
from graph import Graph
from notes import bullets, files, hub, licence, seconds, text

SHAPE, SIDE, GRAY, RED = 16, 64, 0x7A7A7A, 0xE61F1F
KEYS = "0: right\n8: forward\n13: left\n30: back\n42: right\n52:\n60: forward\n68: left"
CAMERA_FPS = 15


def _graph(note, tall):
    graph = Graph()
    graph.group("", "")
    graph.column(460)
    graph.add("MarkdownNote", "Read me", tall, text=note)
    return graph


def _video(graph, live, track, image, prefix, fps, enlarged=1):
    graph.group("4  Video", VIDEO)
    graph.column(440)
    images = graph.add("ForcingLiveSampler", live=live, track=track, image=image, seed=1)
    if enlarged > 1:
        images = graph.add("ImageScaleBy", image=images, upscale_method="nearest-exact", scale_by=enlarged)
    video = graph.add("CreateVideo", images=images, fps=fps)
    graph.add("SaveVideo", tall=420, video=video, filename_prefix=f"forcing/{prefix}", format="mp4", codec="h264")
    return graph


def live_steer():
    note = text(
        "A world that keys steer, with nothing to download",
        f"One clip of {seconds(21, FPS)}, 64x64 pixels: the micro LIVE moves the shape of the start picture frame by frame, as "
        "the action track says. The pictures after the first one are all its own.",
        bullets("What to change", "**text** of Forcing Action Track: `left`, `right`, `forward` (up) or `back` (down), one at "
                "a time; an empty line lets go. The shape moves 4 pixels a frame and stops at the edge.",
                f"**frames**: any length; {FPS} are a second. Time and memory of a frame stay the same.",
                "**Start picture**: one plain shape of 16 pixels in red, green, blue, yellow, magenta or cyan on dark, light "
                "or gray. It knows nothing else."),
        bullets("Then", "*live_camera* drives a camera through a picture of the real world, by the same nodes."),
        "## Licence\nModel and pack: Apache-2.0. It was trained on generated clips only.")
    graph = _graph(note, 460)
    graph.group("1  Model", MODELS)
    graph.column(400)
    live = graph.add("ForcingLiveCheckpoint", checkpoint=CHOICE, autoencoder="inside the checkpoint", dtype="default")
    graph.group("2  Start picture", PROMPTS)
    graph.column(320)
    ground = graph.add("EmptyImage", "Background", width=SIDE, height=SIDE, batch_size=1, color=GRAY)
    shape = graph.add("EmptyImage", "Shape", width=SHAPE, height=SHAPE, batch_size=1, color=RED)
    middle = (SIDE - SHAPE) // 2
    image = graph.add("ImageCompositeMasked", destination=ground, source=shape, x=middle, y=middle, resize_source=False)
    graph.group("3  Keys", PROMPTS)
    graph.column(320)
    track = graph.add("ForcingActionTrack", tall=260, frames=81, text=KEYS)
    return _video(graph, live, track, image, "live_steer", FPS, 4)


def live_camera():
    preset = get("live")
    network, autoencoder = (hub(file, folder) for file, folder in zip(preset.files, ("diffusion_models", "vae")))
    note = text(
        "LIVE: a camera in a picture",
        f"One clip of {seconds(21, CAMERA_FPS)}, 256x256 pixels: the camera moves from the picture on, and every frame is made "
        "of the newest 31.",
        files(network, autoencoder),
        bullets("What to change", "**Picture**: a room or a street; it is cropped to a square.",
                "**move** and **amount** of Forcing Camera Path, or *keyframes* of your own in **text**.",
                f"**frames**: any length; {CAMERA_FPS} are a second."),
        "**Faster to load**: `python -m forcing_core convert` makes 1.8 GB of the 10 GB. Choose the new file as **checkpoint** "
        "and *inside the checkpoint* as **autoencoder**.",
        licence(preset))
    graph = _graph(note, 560)
    graph.group("1  Models", MODELS)
    graph.column(400)
    live = graph.add("ForcingLiveCheckpoint", models=[network, autoencoder], checkpoint=network["name"],
                     autoencoder=autoencoder["name"], dtype="default")
    graph.group("2  Start picture", PROMPTS)
    graph.column(320)
    image = graph.add("LoadImage", "Picture", 380, image="example.png")
    image = graph.add("ImageScale", "Square", image=image, upscale_method="bicubic", width=256, height=256, crop="center")
    graph.group("3  Camera", PROMPTS)
    graph.column(340)
    path = graph.add("ForcingCameraPath", frames=81, move="forward", amount=1.0)
    graph.add("PreviewImage", "The path", 260, images=path[1])
    return _video(graph, live, path, image, "live_camera", CAMERA_FPS)


EXAMPLES = (live_camera, *[live_steer] * bundled())
