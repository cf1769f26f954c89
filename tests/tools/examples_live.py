"""The example workflows of LIVE: a camera in a picture, and keys that move a shape."""
from example_clip import MODELS, PROMPTS, VIDEO
from forcing_pack.forcing_core.micro.live import CHOICE
from forcing_pack.forcing_core.micro.steer import FPS
from forcing_pack.forcing_core.presets import get
from graph import Graph
from notes import bullets, files, hub, licence, seconds, text

INSIDE = "inside the checkpoint"
KEYS = "2: right\n4: forward\n6: left\n10: back\n14: right\n18: forward\n20: left\n22:"
CAMERA_FPS = 15


def _graph(note, tall):
    graph = Graph()
    graph.group("", "")
    graph.column(460)
    graph.add("MarkdownNote", "Read me", tall, text=note)
    return graph


def _video(graph, live, track, image, prefix, fps):
    graph.group("4  Video", VIDEO)
    graph.column(440)
    images = graph.add("ForcingLiveSampler", live=live, track=track, image=image, seed=1)
    video = graph.add("CreateVideo", images=images, fps=fps)
    graph.add("SaveVideo", tall=420, video=video, filename_prefix=f"forcing/{prefix}", format="mp4", codec="h264")
    return graph


def live_steer():
    note = text(
        "A world that you steer, with nothing to download",
        "Press **Run**, click the panel of Forcing LIVE Stream, and hold arrow keys or W, A, S, D. Buttons and a gamepad do "
        "the same. Every frame is made by the micro LIVE, 64x64 pixels, from the newest seven and from what you hold; the file "
        "grows until you press *Stop and keep*.",
        bullets("What to change",
                f"**length** of Forcing LIVE Stream: 0 is *until you stop*. With 10 it makes {seconds(21, FPS)}.",
                "**Start picture**: another shape, colour or background. It knows nothing else.",
                "**Demonstration**: drives until the first key is pressed. `left`, `right`, `forward` (up) or `back` (down), "
                "one at a time; an empty line lets go.",
                "**window**: how many frames it sees; with 2 it forgets where it came from."),
        bullets("Replay", "*Copy* in the panel takes what you pressed. Paste it into **replay**, keep the **seed** (set it to "
                "*fixed*), and the same video is made again."),
        bullets("Then", "*live_camera* drives a camera through a picture of the real world."),
        "## Licence\nModel and pack: Apache-2.0. It was trained on generated clips only.")
    graph = _graph(note, 520)
    graph.group("1  Model", MODELS)
    graph.column(400)
    live = graph.add("ForcingLiveCheckpoint", checkpoint=CHOICE, autoencoder=INSIDE, dtype="default")
    graph.group("2  World", PROMPTS)
    graph.column(320)
    image = graph.add("ForcingMicroWorld", "Start picture", shape="circle", colour="red", background="light")
    track = graph.add("ForcingActionTrack", "Demonstration", 240, frames=81, text=KEYS)
    graph.group("3  Play", VIDEO)
    graph.column(440)
    graph.add("ForcingLiveStream", tall=760, live=live, image=image, track=track, seed=1, length=0.0, fps=float(FPS),
              filename_prefix="forcing/live_steer")
    return graph


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


EXAMPLES = (live_camera, live_steer)
