"""The example workflow of Knot Forcing: a picture that a video keeps to. Its function is in the table of `examples`."""
from example_clip import PROMPTS, Clip, widgets
from example_prompts import DRAWING
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.presets import get
from notes import MATCH, bullets, files_of, licence, seconds, text

SHORT = WindowOptions(window=9, sink=0, positions="relative")


def knot_reference():
    preset = get("self-forcing")
    note = text(
        "Knot Forcing: stay close to a picture",
        f"{seconds(81)} with knots between the blocks and a picture in memory that stands ahead in time, so that the video "
        "keeps moving towards it. Made for portraits.",
        files_of(preset),
        "**Mind**: no weights of Knot Forcing are public. Its two mechanisms run here on Self Forcing weights, which were not "
        "trained for them: expect less than the paper shows.",
        bullets("How it works", "**Forcing Knot**, *knot* 1: every block makes one latent frame for the next block, which "
                "starts from it. That hides seams and costs a third more time.",
                "**reference**: the picture's latent. It costs one latent frame of memory."),
        bullets("What to change", "**Image**: a portrait. **Prompt**: describe it, then what happens.",
                "**knot** 0 keeps only the reference; unconnect **reference** to keep only the knots.",
                "**lookahead**: nearer holds the picture more tightly.",
                "**Size**: change it in both places, the latent and *Size of the reference*.", MATCH),
        licence(preset))
    clip = Clip(preset, note, 700, DRAWING).empty(81, "latent frames", 624, 624)
    clip.group("3  Reference", PROMPTS)
    clip.column(320)
    image = clip.add("LoadImage", "Picture", 380, image="example.png")
    scaled = clip.add("ImageScale", "Size of the reference", image=image, upscale_method="bicubic", width=624, height=624,
                      crop="center")
    reference = clip.add("VAEEncode", pixels=scaled, vae=clip.vae)
    clip.sampling("4  Sampling")
    clip.by_preset(cache=clip.add("ForcingCache", **widgets(SHORT)))
    clip.sampler = clip.add("ForcingKnot", sampler=clip.sampler, knot=1, lookahead=8, stride=4, reference=reference)
    return clip.video(clip.sample(clip.guider(), clip.noise(30)), "knot", "5  Video")
