"""The example workflows. Only what differs between them is written down; `Clip` holds what all of them share."""
import example_streams
import examples_clips
import examples_knot
import examples_live
import examples_long
import examples_portrait
import examples_s2v
import examples_sparse
from example_clip import PROMPTS, Clip, MicroClip, widgets
from example_prompts import DRAWING, FOX, HUMMINGBIRD, POTTER, TEA
from examples_long import LONG
from forcing_pack.forcing_core.micro.names import COLOURS, DIRECTIONS, SHAPES
from forcing_pack.forcing_core.micro.source import PROMPT
from forcing_pack.forcing_core.micro.world import LEVELS
from forcing_pack.forcing_core.policies import DeepCompressOptions, WindowOptions
from forcing_pack.forcing_core.presets import get
from notes import MATCH, bullets, files_of, licence, seconds, store, text

SMALL = WindowOptions(window=9, sink=3, positions="relative", compact=True)
# label -> cache policy, for videos side by side
COMPARED_MICRO = {"Everything": WindowOptions(), "Window and sink": LONG,
                  "Deep Forcing": DeepCompressOptions(positions="rebased")}


def hello():
    preset = get("micro")
    note = text(
        "Hello: a first video, with nothing to download",
        f"One clip of {seconds(21)}, 64x64 pixels, in seconds, on any machine: a tiny model comes with the pack. Press Run. "
        "Nodes and wires are those of the large models.",
        bullets("What to change", "**Prompt**: a colour, a shape, a motion and a background, in these words: "
                f"*{', '.join(COLOURS)}*; *{', '.join(SHAPES)}*; moving *{', '.join(DIRECTIONS)}*; on a "
                f"*{' or '.join(LEVELS['plain'].backgrounds)}* background. Other words are refused.",
                "**Seed**: another clip of the same prompt.",
                "**Length**: up to 5 s as trained. For more, set *system* to `micro-endless`, which keeps a window "
                "of 12 latent frames.",
                "**model**: the same task trained in other ways; the help page of Forcing Micro Model says what each is. "
                "The *teacher* takes another system and guidance."),
        bullets("Then", "Open *self_forcing_t2v* for a model of the real world. Its note lists the files it needs."),
        "## Licence\nModel and pack: Apache-2.0. It was trained on generated clips only.")
    return MicroClip(preset, note, 460, PROMPT).empty(width=64, height=64).usual("hello", 1)


def self_forcing_t2v():
    preset = get("self-forcing")
    note = text(
        "Self Forcing: text to video",
        f"One clip of {seconds(21)}, made block by block: 7 blocks of 3 latent frames, 4 steps each. "
        "The shortest way to see the pack work.",
        files_of(preset),
        bullets("What to change", "**Prompt**: one paragraph that says subject, motion, light and camera.",
                "**Length**: up to 5 s with this checkpoint. For more, open *extend_video* or *longlive_30s*.",
                "**Size**: any multiple of 16; trained at 832x480.", MATCH),
        bullets("Memory", f"KV store {store(preset, 21)} at this size, besides about 2.8 GB of weights.",
                "Less: a smaller size, or the workflow *low_vram_fp8*."),
        licence(preset))
    return Clip(preset, note, 560, FOX).empty().usual("self_forcing", 1)


def causal_forcing_framewise_t2v():
    preset = get("causal-forcing-framewise")
    note = text(
        "Causal Forcing, single frames: text to video",
        f"One clip of {seconds(21)}. Every block is a single latent frame, so motion follows the prompt more closely "
        "than with blocks of three, and the first picture is there sooner.",
        files_of(preset),
        "**Mind the name**: the file with blocks of 3 (folder `chunkwise`) is called `causal_forcing.pt` too. This one "
        "is from the folder `framewise`. If you have both, rename one; *system* then tells the loader which it is.",
        bullets("What to change", "**Prompt**, **size**, and **length** up to 5 s.",
                "**block** stays 1 and **system** as it is: they belong to the checkpoint."),
        bullets("Memory", f"KV store {store(preset, 21)} at this size, besides about 2.8 GB of weights."),
        licence(preset))
    return Clip(preset, note, 600, POTTER).empty().usual("causal_forcing_framewise", 2)


def causal_forcing_framewise_i2v():
    preset = get("causal-forcing-framewise")
    note = text(
        "Causal Forcing, single frames: image to video",
        f"Your image becomes the first latent frame, 20 more are generated behind it: {seconds(21)}.",
        files_of(preset),
        "**Mind the name**: take the file from the folder `framewise`; the one from `chunkwise` has the same name and "
        "was not trained to go on from a single image.",
        bullets("What to change", "**Image**: any. **fit** says what happens where its shape differs from the size.",
                "**Prompt**: describe your image first, then what happens. The text here belongs to `example.png`.",
                "**Size**: close to the image's shape, and about 400,000 pixels in all, as trained.",
                "**Length**: 20 latent frames and the image make 21, the training length."),
        bullets("Memory", f"KV store {store(preset, 21, 624, 624)} at this size, besides about 2.8 GB of weights."),
        licence(preset))
    clip = Clip(preset, note, 660, DRAWING).empty(20, "latent frames", 624, 624)
    clip.group("3  Start image", PROMPTS)
    clip.column(320)
    image = clip.add("LoadImage", "Start image", 380, image="example.png")
    clip.latent = clip.add("ForcingStartImage", vae=clip.vae, image=image, latent=clip.latent, fit="crop")
    return clip.usual("causal_forcing_i2v", 3, "4  Sampling", "5  Video")


def causal_forcing_pp_2step_t2v():
    preset = get("causal-forcing++-2step")
    note = text(
        "Causal Forcing++, 2 steps: text to video",
        f"One clip of {seconds(21)} in about half the time: two steps a frame. Only the first frame takes four, which "
        "Forcing Preset does by itself.",
        files_of(preset),
        bullets("What to change", "**Prompt**, **size**, and **length** up to 5 s.",
                "For one step a frame, take `framewise-1step.pt` from the same folder and set both *system* widgets to "
                "`causal-forcing++-1step`.",
                "A start image works too: see *causal_forcing_framewise_i2v*.",
                "**block** stays 1. The SIGMAS of another system are refused: keep both outputs of Forcing Preset."),
        bullets("Memory", f"KV store {store(preset, 21)} at this size, besides about 2.8 GB of weights."),
        licence(preset))
    return Clip(preset, note, 580, HUMMINGBIRD).empty().usual("causal_forcing_pp", 4)


def compare_micro():
    preset = get("micro")
    note = text(
        "Three memories, with nothing to download",
        f"Three times {seconds(42)}, 64x64 pixels, with the tiny model that comes with the pack: same prompt, same noise, "
        "another memory. It runs on any machine.",
        bullets("The columns", "*Everything*: each block sees the whole past. Memory and time grow with the length, and this "
                "model has seen 5 s in training.",
                "*Window and sink*: 12 latent frames, the first 3 of the video always among them.",
                "*Deep Forcing*: a moving sink of 10, and of the rest the tokens that are looked at most."),
        bullets("What to change", "**Prompt**: see the note of *hello* for the words it knows.",
                "**policy** in a Forcing Cache; the others are explained on its help page.",
                "**Seed** is fixed, so a change in one column runs that column only."),
        "*compare_long_self_forcing* is the same with a model of the real world.",
        "## Licence\nModel and pack: Apache-2.0. It was trained on generated clips only.")
    clip = MicroClip(preset, note, 560, PROMPT).empty(10.0, width=64, height=64)
    return clip.compared(COMPARED_MICRO, "compare_micro", 1)


def low_vram_fp8():
    preset = get("self-forcing")
    note = text(
        "Self Forcing in little memory",
        f"One clip of {seconds(21)} at 576x320 with fp8 weights and a small, compact cache. It is also the workflow to "
        "copy for checkpoints and step lists that no preset covers: everything a preset sets is a widget here.",
        files_of(preset),
        bullets("What saves memory", "**weight_dtype** `fp8_e4m3fn`: weights 1.4 GB instead of 2.8 GB.",
                f"**Forcing Cache**: window 9, sink 3, *compact*: store {store(preset, 21, 576, 320, SMALL)} instead "
                f"of {store(preset, 21, 576, 320)}.",
                f"**Size**: 720 tokens a frame instead of 1560; at 832x480 the same cache takes "
                f"{store(preset, 21, cache=SMALL)}.",
                "The text encoder (6.7 GB) is moved out before sampling; set *device* of Load CLIP to `cpu` if loading "
                "it fails."),
        bullets("What to change", "More detail: raise the size first, the model was trained at 832x480. Steadier: window 12.",
                "**steps** of Forcing Sigmas and **block** of Forcing Sampler belong to the checkpoint; **block** of "
                "the latent has to be the same.",
                "*FIRST BLOCK* is for checkpoints whose first block has its own list (Causal Forcing++)."),
        licence(preset))
    clip = Clip(preset, note, 640, TEA, dtype="fp8_e4m3fn").empty(width=576, height=320)
    clip.sampling()
    cache = clip.add("ForcingCache", **widgets(SMALL))
    clip.sigmas = clip.add("ForcingSigmas", system="custom", steps="1000, 750, 500, 250", first_block_steps="",
                           shift=preset.shift)
    clip.column(340)
    clip.sampler = clip.add("ForcingSampler", block=preset.block, cache=cache)
    return clip.video(clip.sample(clip.guider(), clip.noise(8)), "low_vram")


EXAMPLES = {make.__name__: make for make in (
    hello, compare_micro, self_forcing_t2v, causal_forcing_framewise_t2v, causal_forcing_framewise_i2v,
    causal_forcing_pp_2step_t2v, low_vram_fp8, *examples_long.EXAMPLES, *example_streams.EXAMPLES,
    examples_knot.knot_reference, *examples_portrait.EXAMPLES, *examples_clips.EXAMPLES, *examples_live.EXAMPLES,
    *examples_s2v.EXAMPLES, *examples_sparse.EXAMPLES)}
