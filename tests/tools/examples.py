"""The example workflows. Only what differs between them is written down; `Clip` holds what all of them share."""
from forcing_pack.forcing_core.micro.names import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES
from forcing_pack.forcing_core.micro.source import ENLARGED, PROMPT
from forcing_pack.forcing_core.policies import WindowOptions
from forcing_pack.forcing_core.presets import get
from graph import Graph
from notes import bullets, checkpoint, files, licence, lora, seconds, store, text, text_encoder, vae

# As in the colour menu of the page.
MODELS, PROMPTS, SAMPLING, VIDEO = "#3f789e", "#8A8", "#b06634", "#88A"
LONG = WindowOptions(window=12, sink=3, positions="relative")
SMALL = WindowOptions(window=9, sink=3, positions="relative", compact=True)

FOX = (
    "A red fox trots along a narrow forest trail in fresh snow at dawn. Its breath steams in the cold air, powder"
    " snow flies up from its paws, low golden light falls through the pine trunks. The camera glides beside the "
    "fox at eye level, shallow depth of field, realistic wildlife documentary.")
POTTER = (
    "Close-up of a potter's hands shaping a tall vase of wet clay on a spinning wheel. The fingers press inwards,"
    " the rim rises and opens smoothly, water glistens on the grey clay. Warm light from a workshop window, dust "
    "in the air, static camera, realistic.")
DRAWING = (
    "A child's drawing comes to life: a smiling girl with big yellow hair and a pink dress stands on a bright "
    "green hill under a blue sky. She waves both arms happily and her hair bounces, white clouds drift slowly to "
    "the right. Flat colours, hand-drawn 2D animation, static camera.")
HUMMINGBIRD = (
    "A green hummingbird hovers in front of a red hibiscus flower, wings a blur, and dips its beak into the "
    "blossom. It backs away, turns its head and its throat flashes violet in the sun. Soft green garden "
    "background, macro shot, slow camera drift to the left.")
CYCLIST = (
    "A woman in a yellow rain jacket rides a touring bicycle along a winding coastal road at golden hour. The sea"
    " glitters on the left, grassy cliffs pass on the right, her jacket flutters in the wind. The camera follows "
    "steadily behind her at the same distance, realistic, cinematic.")
HARBOUR = (
    "A small wooden sailboat with a cream-coloured sail glides out of a quiet fishing harbour at sunrise. Gentle "
    "ripples, pastel houses on the quay behind it, gulls overhead. The camera follows from the side at water "
    "level, cinematic, realistic.")
OPEN_SEA = (
    "The same small wooden sailboat with a cream-coloured sail heels in a fresh breeze on the open sea. Spray "
    "flies over the bow, the coast fades in the haze behind it, low morning sun on the waves. The camera follows "
    "from the side at water level, cinematic, realistic.")
TEA = (
    "Steam rises from a cup of tea on a wooden windowsill while rain runs down the window pane. Blurred city "
    "lights outside change from red to green, a hand enters from the right and turns the cup slowly. Cosy warm "
    "light, close shot, static camera, realistic.")

LANTERN = """0 | A paper lantern floats on a calm lake at dusk, warm light inside, pine forest on the shore, the camera drifts \
beside it at water level, realistic, cinematic.
15 | The same paper lantern with warm light inside floats on the lake at dusk, more and more lanterns come into view \
around it, pine forest on the shore, the camera drifts beside them, realistic, cinematic.
30 | The paper lanterns lift off the lake and rise slowly into the evening sky above the pine forest, warm light on the \
water, the camera tilts up with them, realistic, cinematic.
45 | soft 6 | Hundreds of paper lanterns with warm light drift among the stars of a clear night sky, the camera floats \
with them, realistic, cinematic."""
SCENES = (
    "An old lighthouse keeper with a white beard and a dark blue coat climbs a narrow spiral staircase with a lantern in "
    "his hand. Warm lantern light on rough stone walls, the camera follows from below, realistic, cinematic.",
    "The old lighthouse keeper with a white beard and a dark blue coat polishes the great lens of the lighthouse with a "
    "cloth. Warm lantern light, night behind the windows, close shot, realistic, cinematic.",
    "A small wooden fishing boat fights its way through high waves at night. Rain, spray over the bow, a beam of light "
    "sweeps across the dark sea, wide shot, realistic, cinematic.",
    "The small wooden fishing boat glides past the pier into a calm harbour at first light. The rain has stopped, the "
    "lighthouse stands behind it, wide shot, realistic, cinematic.")
CHANGES = ((5.0, "flush"), (10.0, "cut"), (15.0, "recache"))

MATCH = "**system** (loader and preset) and **block** (latent) belong to the checkpoint: leave them."


class Clip(Graph):
    """Note, loaders, prompts, sampling and video, in groups from left to right. Methods are called in that order."""

    enlarged = 1  # pictures, before they become a video

    def __init__(self, preset, note, tall, *prompts, dtype="default", lora_file=None):
        super().__init__()
        self.preset = preset
        self.group("", "")
        self.column(460)
        self.add("MarkdownNote", "Read me", tall, text=note)
        self._models(dtype, lora_file)
        self.group("2  Prompt and size", PROMPTS, below=True)
        self.column(400)
        titles = ["Prompt"] if len(prompts) == 1 else [f"Prompt {number}" for number in range(1, len(prompts) + 1)]
        self.prompts = [self.add("CLIPTextEncode", title, 200, clip=self.clip, text=text)
                        for title, text in zip(titles, prompts, strict=True)]

    def _models(self, dtype, lora_file):
        self.group("1  Models", MODELS)
        self.column(400)
        file, encoder, decoder = checkpoint(self.preset), text_encoder(), vae()
        self.model = self.add("ForcingLoadCheckpoint", models=[file, *([lora_file] if lora_file else [])],
                              checkpoint=file["name"], system=self.preset.name, weight_dtype=dtype,
                              lora=lora_file["name"] if lora_file else "none")
        self.vae = self.add("VAELoader", models=[decoder], vae_name=decoder["name"])
        self.clip = self.add("CLIPLoader", models=[encoder], clip_name=encoder["name"], type="wan")

    def empty(self, length=5.0, unit="seconds", width=832, height=480):
        self.latent = self.add("ForcingEmptyLatent", width=width, height=height, length=length, unit=unit,
                               block=self.preset.block, batch_size=1)
        return self

    def sampling(self, title="3  Sampling", below=False):
        self.group(title, SAMPLING, below)
        self.column(340)

    def by_preset(self, **values):
        node = self.add("ForcingPreset", system=self.preset.name, **values)
        self.sampler, self.sigmas = node[0], node[1]

    def guider(self, prompt=0):
        return self.add("ForcingGuider", model=self.model, positive=self.prompts[prompt], cfg=self.preset.cfg)

    def noise(self, seed, after="randomize"):
        return self.add("RandomNoise", noise_seed=seed, control_after_generate=after)

    def sample(self, guider, noise, latent=None, title=None):
        self.column(280)
        return self.add("SamplerCustomAdvanced", title, noise=noise, guider=guider, sampler=self.sampler,
                        sigmas=self.sigmas, latent_image=latent or self.latent)

    def video(self, samples, prefix, title="4  Video"):
        self.group(title, VIDEO)
        self.column(440)
        images = self.add("VAEDecode", samples=samples, vae=self.vae)
        if self.enlarged > 1:
            images = self.add("ImageScaleBy", image=images, upscale_method="nearest-exact", scale_by=self.enlarged)
        video = self.add("CreateVideo", images=images, fps=16)
        self.add("SaveVideo", tall=420, video=video, filename_prefix=f"forcing/{prefix}", format="mp4", codec="h264")
        return self

    def usual(self, prefix, seed, *titles):
        """The whole right half of a workflow that needs nothing special."""
        sampling, video = titles or ("3  Sampling", "4  Video")
        self.sampling(sampling)
        self.by_preset()
        return self.video(self.sample(self.guider(), self.noise(seed)), prefix, video)


class MicroClip(Clip):
    """The same with the model that comes with the pack."""

    enlarged = ENLARGED

    def _models(self, dtype, lora_file):
        self.group("1  Model", MODELS)
        self.column(400)
        node = self.add("ForcingMicroModel", model="student")
        self.model, self.clip, self.vae = node[0], node[1], node[2]


def window_cache(**fields):
    """Widgets of Forcing Cache for a sliding window: those given, a sink of 3, relative positions."""
    return {"policy": "window", **{f"policy.{name}": value
                                   for name, value in {"sink": 3, "positions": "relative", **fields}.items()}}


def files_of(preset, *more):
    return files(checkpoint(preset), *more, text_encoder(), vae())


def hello():
    preset = get("self-forcing")
    note = text(
        "Hello: a first video, with nothing to download",
        f"One clip of {seconds(21)}, 64x64 pixels, in seconds, on any machine: a tiny model comes with the pack. Press Run. "
        "Nodes and wires are those of the large models.",
        bullets("What to change", "**Prompt**: a colour, a shape, a motion and a background, in these words: "
                f"*{', '.join(COLOURS)}*; *{', '.join(SHAPES)}*; moving *{', '.join(DIRECTIONS)}*; on a "
                f"*{', '.join(BACKGROUNDS)}* background. Other words are refused.",
                "**Seed**: another clip of the same prompt.",
                "**Length**: up to 5 s as trained. For more, set *system* to `longlive-infinity`, which keeps a window "
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


def longlive_30s():
    preset = get("longlive")
    adapter = lora(preset)
    note = text(
        "LongLive: 30 seconds in one go",
        f"{seconds(120)}, in 40 blocks. Each block sees 12 latent frames: the first 3 of the video (the *sink*, "
        "which keeps the subject the same), the 6 before it, and itself. So time and memory a block stay constant.",
        files_of(preset, adapter),
        "Base and LoRA belong together. Both come from the folder `models` of one repository; `lora.pt` is a common "
        "name, so give it a subfolder if you have another one.",
        bullets("What to change", "**Prompt**: something that can go on for half a minute.",
                "**Length**: up to 4 min 15 s. Beyond, set *system* in both places to `longlive-infinity`.",
                "**Forcing Plan View** draws what every block sees, without sampling: select it and press the play "
                "button above it."),
        bullets("Memory", f"KV store {store(preset, 120)} for any length, besides about 2.8 GB of weights.",
                "The decoded video takes 2.3 GB of ordinary memory (4.8 MB a frame)."),
        licence(preset))
    clip = Clip(preset, note, 640, CYCLIST, lora_file=adapter).empty(30.0)
    clip.sampling()
    clip.by_preset()
    samples = clip.sample(clip.guider(), clip.noise(5))
    clip.group("5  What every block sees", SAMPLING, below=True)
    clip.column(680)
    clip.add("ForcingPlanView", tall=480, model=clip.model, sampler=clip.sampler, latent=clip.latent, conditions=1)
    return clip.video(samples, "longlive")


def longlive_60s_prompts():
    preset = get("longlive")
    adapter = lora(preset)
    note = text(
        "LongLive: one minute, four prompts",
        f"{seconds(240)} in one go. **Forcing Prompt Track** holds the script: one line a prompt, with the second at which "
        "it takes over. At each change the memory of 12 latent frames is replayed once under the new prompt "
        "(*recache*), so that the action follows at once and the subject stays.",
        files_of(preset, adapter),
        "Base and LoRA belong together. Both come from the folder `models` of one repository; `lora.pt` is a common "
        "name, so give it a subfolder if you have another one.",
        bullets("What to change", "**script**: `seconds | prompt`, or `seconds | transition | prompt`. The last line fades in "
                "over 6 blocks (*soft 6*).",
                "**Every prompt** says the whole picture again, subject and style included: the network knows only the one "
                "that rules.",
                "**Length**: up to 4 min 15 s. Times past the end are refused."),
        bullets("Memory", f"KV store {store(preset, 240)} for any length, besides about 2.8 GB of weights.",
                "The decoded video takes 4.6 GB of ordinary memory (4.8 MB a frame)."),
        licence(preset))
    clip = Clip(preset, note, 680, lora_file=adapter)
    clip.prompts = [clip.add("ForcingPromptTrack", "Prompts", 460, clip=clip.clip, script=LANTERN, transition="recache")]
    return clip.empty(60.0).usual("longlive_prompts", 9)


def multi_scene_story():
    preset = get("longlive")
    adapter = lora(preset)
    note = text(
        "A story in four scenes",
        f"{seconds(81)} in one go, with a different kind of change at each of three times.",
        files_of(preset, adapter),
        bullets("The changes", "5 s, *flush*: the same man does something else. Only the sink and the newest two latent "
                "frames stay in memory.",
                "10 s, *cut*: another place, nothing of the old scene is left. The boat's first frames become the sink of "
                "the new scene.",
                "15 s, *recache*: the same boat, and the memory rewritten under the new prompt."),
        bullets("What to change", "**Prompts**: each is one scene and says all of it.",
                "**More scenes**: copy a Forcing Prompt Segment, connect it to the last one, and the last one to the guider.",
                "*jump* keeps the subject but leaves the place. It needs relative positions: set *system* in both places to "
                "`longlive-infinity`."),
        bullets("Memory", f"KV store {store(preset, 81)} for any length, besides about 2.8 GB of weights."),
        licence(preset))
    clip = Clip(preset, note, 680, *SCENES, lora_file=adapter).empty(20.0)
    clip.group("3  Scenes", PROMPTS)
    clip.column(320)
    told = clip.prompts[0]
    for number, (start, transition) in enumerate(CHANGES, 1):
        told = clip.add("ForcingPromptSegment", f"Scene {number + 1}", previous=told, conditioning=clip.prompts[number],
                        start=start, transition=transition)
    clip.prompts = [told]
    return clip.usual("story", 10, "4  Sampling", "5  Video")


def extend_video():
    preset = get("self-forcing")
    note = text(
        "Extend a video",
        f"A first clip of 5 s, then 5 s more that go on from its latents with a second prompt: {seconds(42)}. "
        "Nothing is decoded and encoded again at the joint; the video is decoded once, at the end.",
        files_of(preset),
        bullets("How it works", "**Forcing Cache** lets each block see 12 latent frames, always with the first 3 of "
                "the video among them. Without it Self Forcing drifts after 5 s.",
                "**Forcing Extend** puts the finished latents in front of new empty ones. The second sampler fills the "
                "store from them under its own prompt."),
        bullets("What to change", "**Seeds**: the first is fixed, so that only the second part is made again while you "
                "try prompts. Keep the two seeds different.",
                "**Prompt 2**: repeat subject and style of prompt 1, change the action.",
                "**More parts**: copy group 4, and connect its Forcing Extend to the sampler before."),
        bullets("Memory", f"KV store {store(preset, 42, cache=LONG)} at this size, besides about 2.8 GB of weights. "
                "*compact* in Forcing Cache saves a third."),
        licence(preset))
    clip = Clip(preset, note, 680, HARBOUR, OPEN_SEA).empty()
    clip.sampling("3  First clip")
    cache = clip.add("ForcingCache", **window_cache(window=12))
    clip.by_preset(cache=cache)
    first = clip.sample(clip.guider(0), clip.noise(6, "fixed"), title="Sample the first clip")
    clip.sampling("4  Second clip", below=True)
    longer = clip.add("ForcingExtend", context=first, length=5.0, unit="seconds", block=preset.block)
    second = clip.sample(clip.guider(1), clip.noise(7), longer, "Sample the second clip")
    return clip.video(second, "extended", "5  Video")


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
    cache = clip.add("ForcingCache", **window_cache(window=9, compact=True))
    clip.sigmas = clip.add("ForcingSigmas", system="custom", steps="1000, 750, 500, 250", first_block_steps="",
                           shift=preset.shift)
    clip.column(340)
    clip.sampler = clip.add("ForcingSampler", block=preset.block, cache=cache)
    return clip.video(clip.sample(clip.guider(), clip.noise(8)), "low_vram")


EXAMPLES = {make.__name__: make for make in (
    hello, self_forcing_t2v, causal_forcing_framewise_t2v, causal_forcing_framewise_i2v, causal_forcing_pp_2step_t2v,
    longlive_30s, longlive_60s_prompts, multi_scene_story, extend_video, low_vram_fp8)}
