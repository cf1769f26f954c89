"""The example workflows of portraits. Their functions are in the table of `examples`."""
from example_clip import MODELS, PROMPTS, SAMPLING, VIDEO, Clip, widgets
from forcing_pack.forcing_core.micro.idle import WORDS
from forcing_pack.forcing_core.micro.source import ENLARGED
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.presets import File, get
from graph import Graph
from notes import MATCH, REPACKAGED, bullets, checkpoint, files_of, hub, licence, seconds, text, text_encoder, vae

SHORT = WindowOptions(window=9, sink=0, positions="relative")
VACE = hub(File(REPACKAGED, "split_files/diffusion_models/wan2.1_vace_1.3B_fp16.safetensors"), "diffusion_models")
WIDTH, HEIGHT, LENGTH = 480, 624, 81  # LENGTH: latent frames
SPEAKER = ("A close-up portrait of a person who looks into the camera and speaks calmly. Soft daylight from a window, plain "
           "background, steady camera.")


def portrait_micro():
    preset = get("self-forcing")
    note = text(
        "A portrait that speaks, with nothing to download",
        f"{seconds(42)}, 64x64 pixels: a drawn face, kept by one picture, with a mouth that a voice opens. A tiny model that "
        "comes with the pack, on any machine.",
        bullets("How it works", "**Forcing Micro Portrait** makes a driving track of head pose and voice, and a hum that "
                "sounds as the mouth moves. Per block the model gets the part of the track that it draws.",
                "**Forcing Knot** keeps the face: its picture stays in memory, ahead in time, and neighbouring blocks share a "
                "latent frame.",
                "The large models take the same place: see *portrait_vace*."),
        bullets("What to change", "**person**: another face. **motion**: another track.",
                "**audio**: connect Load Audio with a slow voice; its loudness opens the mouth.",
                "**length**: in seconds; the video gets as long.",
                "Without Forcing Knot (connect the preset's SAMPLER) nothing says whose face it is."),
        "## Licence\nModel and pack: Apache-2.0. It was trained on drawn faces only.")
    clip = Graph()
    clip.group("", "")
    clip.column(460)
    clip.add("MarkdownNote", "Read me", 560, text=note)
    clip.group("1  Model, face and voice", MODELS)
    clip.column(360)
    made = clip.add("ForcingMicroPortrait", person=1, motion=1, length=10.0)
    model, driving, reference, latent, decoder, audio = (made[n] for n in range(6))
    clip.group("2  Sampling", SAMPLING)
    clip.column(340)
    given = clip.add("ForcingPreset", system=preset.name, cache=clip.add("ForcingCache", **widgets(SHORT)))
    knot = clip.add("ForcingKnot", sampler=given[0], knot=1, lookahead=8, stride=4, reference=reference)
    clip.column(280)
    guider = clip.add("ForcingGuider", model=model, positive=driving, cfg=1.0)
    noise = clip.add("RandomNoise", noise_seed=32, control_after_generate="randomize")
    samples = clip.add("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=knot, sigmas=given[1], latent_image=latent)
    clip.group("3  Video", VIDEO)
    clip.column(440)
    images = clip.add("ImageScaleBy", image=clip.add("VAEDecode", samples=samples, vae=decoder),
                      upscale_method="nearest-exact", scale_by=ENLARGED)
    video = clip.add("CreateVideo", images=images, audio=audio, fps=16)
    clip.add("SaveVideo", tall=420, video=video, filename_prefix="forcing/portrait_micro", format="mp4", codec="h264")
    return clip


def portrait_idle():
    preset = get("self-forcing")
    note = text(
        "An idle portrait without an end",
        "A drawn face that breathes, sways and looks around until you press **Cancel**, and does what you write while it runs. "
        "Nothing has to be downloaded.",
        bullets("Steering", "Write another prompt into the panel of Forcing Stream: *looks left and nods*, *speaks*, *lively*, "
                f"*still*. It knows {', '.join(WORDS)}; other words are refused.",
                "The transition *soft* goes over in several blocks, *keep* within a second.",
                "*Pause*, *Stop* and the seed act as in *endless_stream*; the log in the file replays all of it."),
        bullets("What to change", "**person**: another face. **motion**: another way to sway. **text**: what it does at first.",
                f"**length** of Forcing Stream: 0 is *until you press Cancel*. With 10 it makes {seconds(42)}.",
                "**Forcing Knot** keeps the face: its picture stays in memory, ahead in time."),
        bullets("Mind", "The drawn face has no eyelids, so it does not blink.",
                "A large model is driven by a video that ends: see *portrait_vace*."),
        "## Licence\nModel and pack: Apache-2.0. It was trained on drawn faces only.")
    clip = Graph()
    clip.group("", "")
    clip.column(460)
    clip.add("MarkdownNote", "Read me", 560, text=note)
    clip.group("1  Model, face and motion", MODELS)
    clip.column(360)
    made = clip.add("ForcingIdlePortrait", person=1, motion=1, text="calm")
    model, moving, words, reference, latent, decoder = (made[n] for n in range(6))
    clip.group("2  Sampling", SAMPLING)
    clip.column(340)
    given = clip.add("ForcingPreset", system=preset.name, cache=clip.add("ForcingCache", **widgets(SHORT)))
    knot = clip.add("ForcingKnot", sampler=given[0], knot=1, lookahead=8, stride=4, reference=reference)
    clip.column(280)
    guider = clip.add("ForcingGuider", model=model, positive=moving, cfg=1.0)
    noise = clip.add("RandomNoise", noise_seed=33, control_after_generate="randomize")
    clip.group("3  Stream", VIDEO)
    clip.column(440)
    clip.add("ForcingStream", tall=620, noise=noise, guider=guider, sampler=knot, sigmas=given[1], latent_image=latent,
             vae=decoder, clip=words, length=0.0, filename_prefix="forcing/portrait_idle")
    return clip


class VaceClip(Clip):
    """The same with VACE's control blocks beside the checkpoint."""

    def _models(self, dtype, lora_file):
        self.group("1  Models", MODELS)
        self.column(400)
        file, encoder, decoder = checkpoint(self.preset), text_encoder(), vae()
        self.model = self.add("ForcingLoadCheckpoint", models=[file, VACE], checkpoint=file["name"], system=self.preset.name,
                              weight_dtype=dtype, lora="none", vace=VACE["name"])
        self.vae = self.add("VAELoader", models=[decoder], vae_name=decoder["name"])
        self.clip = self.add("CLIPLoader", models=[encoder], clip_name=encoder["name"], type="wan")


def portrait_vace():
    preset = get("self-forcing")
    note = text(
        "A portrait that moves as a video does, with its sound",
        f"{seconds(LENGTH)} at {WIDTH}x{HEIGHT}: face from a picture, motion and voice from a video. VACE follows the video's "
        "outlines, Knot Forcing keeps the face and hides the seams, and the stream writes picture and sound as they come.",
        files_of(preset, VACE),
        "**Mind**: the control blocks are VACE's, the causal weights Self Forcing's; nobody trained the two together. The "
        "voice is heard, but only the video's outlines move the lips.",
        bullets("What to change", "**The face**: a picture, upright. **fit** says how it is cut; with *Detect Face Landmarks "
                "(MediaPipe)* connected, a picture without a face or with several is refused.",
                "**The motion**: a video of any rate and size. **short** says what comes behind its end.",
                "**Outlines** show the other person's face, too. A pose video (DWPose or the like) in their place moves the "
                "head and leaves the face alone.",
                "**Longer**: *length* of the latent and of Forcing Stream. "
                "VRAM does not grow; the control takes 0.4 GB of RAM a minute, and the decoded driving video 3.5 GB.",
                "**strength** of WanVaceToVideo: lower it where the outlines are followed too closely.",
                "**Prompt 2** is the negative one, which this system does not use.",
                f"**Size**: in the latent and in WanVaceToVideo. {MATCH}"),
        licence(preset))
    clip = VaceClip(preset, note, 900, SPEAKER, "").empty(LENGTH, "latent frames", WIDTH, HEIGHT)
    clip.group("3  Face and motion", PROMPTS)
    clip.column(320)
    picture = clip.add("LoadImage", "The face", 380, image="example.png")
    reference = clip.add("ForcingPortraitReference", vae=clip.vae, image=picture, latent=clip.latent)
    clip.column(320)
    motion = clip.add("ForcingDrivingVideo", video=clip.add("LoadVideo", "The motion", 300), latent=clip.latent)
    outlines = clip.add("Canny", "Outlines", image=motion, low_threshold=0.1, high_threshold=0.3)
    control = clip.add("WanVaceToVideo", positive=clip.prompts[0], negative=clip.prompts[1], vae=clip.vae, width=WIDTH,
                       height=HEIGHT, length=motion[2], strength=0.8, control_video=outlines)
    clip.sampling("4  Sampling")
    clip.by_preset(cache=clip.add("ForcingCache", **widgets(SHORT)))
    clip.sampler = clip.add("ForcingKnot", sampler=clip.sampler, knot=1, lookahead=8, stride=4, reference=reference)
    clip.column(280)
    guider = clip.add("ForcingGuider", model=clip.model, positive=control, cfg=preset.cfg)
    noise = clip.noise(31)
    clip.group("5  Video", VIDEO)
    clip.column(440)
    clip.add("ForcingStream", tall=620, noise=noise, guider=guider, sampler=clip.sampler, sigmas=clip.sigmas,
             latent_image=clip.latent, vae=clip.vae, audio=motion[1], length=20.0, filename_prefix="forcing/portrait")
    return clip


EXAMPLES = (portrait_micro, portrait_idle, portrait_vace)
