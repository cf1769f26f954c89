"""The example workflows with videos that do not end, go on, branch off or come in from outside. All run on the micro model."""
from example_clip import PROMPTS, VIDEO, MicroClip, widgets
from examples_long import LONG
from forcing_pack.forcing_core.presets import get
from notes import bullets, seconds, text

SIDE = 64
LICENCE = "## Licence\nModel and pack: Apache-2.0. It was trained on generated clips only."
WORDS = "Other words than in the note of *hello* are refused."
FIRST, SECOND = "a red circle moving right on a dark background", "a blue square moving up on a dark background"
OTHER_COLOUR = "a blue circle moving right on a dark background"
BRANCH = "forcing_branch"


def _clip(note, tall, *prompts, length=5.0, unit="seconds"):
    """Micro model, prompts and a latent, and below them a preset with a window that any length fits into."""
    clip = MicroClip(get("micro"), note, tall, *prompts).empty(length, unit, SIDE, SIDE)
    clip.sampling()
    clip.by_preset(cache=clip.add("ForcingCache", **widgets(LONG)))
    return clip


def endless_stream():
    note = text(
        "A video without an end",
        "Every block is sampled, decoded and written as soon as it is there, in the memory of one block. The file plays while "
        "it grows. **Cancel** ends the video and keeps it. Nothing has to be downloaded.",
        bullets("What to change", "**length** of Forcing Stream: 0 is *until you press Cancel*. "
                f"With 10 it makes {seconds(42)}.",
                f"**Prompt**: {WORDS}",
                "**Forcing Cache**: a video without an end needs a window, and positions *relative* or *rebased*.",
                "**format**: *mkv lossless* keeps every bit."),
        bullets("Steering", "With **clip** connected, prompts can be changed while the stream runs."),
        bullets("With a model of the real world", "Put the loaders of *longlive_30s* in place of the micro model, set *system* "
                "of the preset to `longlive-infinity` and the size to 832x480."),
        LICENCE)
    clip = _clip(note, 460, FIRST)
    guider, noise = clip.guider(), clip.noise(15)
    clip.group("4  Stream", VIDEO)
    clip.column(440)
    clip.add("ForcingStream", tall=620, noise=noise, guider=guider, sampler=clip.sampler, sigmas=clip.sigmas,
             latent_image=clip.latent, vae=clip.vae, clip=clip.clip, length=0.0, filename_prefix="forcing/endless")
    return clip


def resume_and_branch():
    note = text(
        "Save the state, and branch off",
        f"A first run of {seconds(42)} writes a snapshot after 8 of its 14 blocks: latents, memory and place in the prompt "
        "track. Two more runs go on from there: one with another seed, one with another prompt. All three begin alike.",
        bullets("How it works", f"**Forcing Snapshot** writes `output/snapshots/{BRANCH}.safetensors`.",
                "**Forcing Resume** starts the same rollout with what the file holds. Its input **after** only makes it wait "
                "for the run that writes the file.",
                "With the seed and the prompt of the first run a resumed run gives the same video, bit for bit."),
        bullets("What to change", "**Longer**: connect a longer latent to a branch; the first run stays as it is.",
                "**Resume later**: take a snapshot of any day in Forcing Resume; **after** stays unconnected then.",
                "**on_stop** in Forcing Snapshot: a snapshot when you press Cancel.",
                f"**Prompts**: {WORDS}"),
        LICENCE)
    clip = _clip(note, 520, FIRST, SECOND, length=42.0, unit="latent frames")
    plain = clip.sampler
    clip.sampler = clip.add("ForcingSnapshot", sampler=plain, name=BRANCH, every=8, on_stop=False)
    guider, noise = clip.guider(), clip.noise(16, "fixed")
    first = clip.sample(guider, noise, title="First run")
    clip.video(first, "branch_first", "4  First run")
    clip.sampling("5  Branches", below=True)
    clip.sampler = clip.add("ForcingResume", sampler=plain, snapshot=f"{BRANCH}.safetensors", after=first)
    other, other_noise = clip.guider(1), clip.noise(17, "fixed")
    clip.column(280)
    by_seed = clip.sampled(guider, other_noise, title="Another seed")
    by_prompt = clip.sampled(other, noise, title="Another prompt")
    clip.video(by_seed, "branch_seed", "6a  Another seed")
    return clip.video(by_prompt, "branch_prompt", "6b  Another prompt")


def _source(clip, title, seed):
    """(latents, video) made in the graph, in place of Load Video."""
    samples = clip.sample(clip.guider(), clip.noise(seed, "fixed"), title=title)
    return samples, clip.add("CreateVideo", "A video, in place of Load Video",
                             images=clip.add("VAEDecode", samples=samples, vae=clip.vae), fps=16)


def video_continuation():
    note = text(
        "Go on with a video",
        f"The last seconds of a video become the start of a new one, which has another prompt: {seconds(33)}, of which "
        "12 latent frames are the old video's.",
        "The old video is made here by the micro model, so that nothing has to be downloaded. With a model of the real world "
        "take **Load Video** in its place.",
        bullets("How it works", "**Forcing Start Video** takes the video at 16 frames a second, also one of a variable rate, "
                "fits it to whole tokens and encodes the part that the model can look back at.",
                "**start** holds that part and empty frames; the sampler keeps the first and fills the second."),
        bullets("What to change", "**length**: how much of the old video stays. The window holds 12 latent frames.",
                "**add**: seconds of new video. With Forcing Stream in place of the sampler there is no end.",
                "**fit**, **width**, **height**: 0 keeps the size of the video.",
                f"**Prompts**: {WORDS}"),
        "*extend_video* goes on from latents, without decoding and encoding: better where you have them.",
        LICENCE)
    clip = _clip(note, 640, FIRST, SECOND)
    _, video = _source(clip, "The old video", 18)
    clip.group("4  Start", PROMPTS)
    clip.column(340)
    start = clip.add("ForcingStartVideo", vae=clip.vae, video=video, part="last", length=12.0, unit="latent frames",
                     block=clip.preset.block, add=5.25)
    clip.sampling("5  Going on")
    made = clip.sample(clip.guider(1), clip.noise(19), start)
    return clip.video(made, "continued", "6  Video")


def restyle_video():
    note = text(
        "Restyle a video",
        f"Video to video: {seconds(21)}. Every block starts from the source's own block, made noisy, and is denoised under the "
        "second prompt. What was made stays in memory, so the new look does too.",
        "The source is made here by the micro model, so that nothing has to be downloaded. With a model of the real world take "
        "**Load Video** in its place.",
        bullets("What to change", "**strength**: 1 takes nothing from the source, little keeps it as it is.",
                "**motion**: less noise where the source moves fast, 0.1 as in StreamDiffusionV2; 0 for the same everywhere.",
                "**length** of Forcing Start Video: 0 restyles all of the video. Forcing Stream in place of the sampler "
                "writes it while it is made.",
                f"**Prompt 2**: what the source shows, and how it is to look. {WORDS}"),
        LICENCE)
    clip = _clip(note, 560, FIRST, OTHER_COLOUR)
    original, video = _source(clip, "The source", 20)
    clip.group("4  Restyle", PROMPTS)
    clip.column(340)
    source = clip.add("ForcingStartVideo", vae=clip.vae, video=video, part="first", length=0.0, unit="seconds",
                      block=clip.preset.block, add=0.0)[1]
    clip.sampler = clip.add("ForcingRestyle", sampler=clip.sampler, source=source, strength=0.94, motion=0.1)
    clip.sampling("5  Sampling")
    made = clip.sample(clip.guider(1), clip.noise(21), source)
    clip.video(original, "restyle_source", "6  The source")
    return clip.video(made, "restyled", "7  Restyled")


EXAMPLES = (endless_stream, resume_and_branch, video_continuation, restyle_video)
