"""What all example workflows share: a note, loaders, prompts, sampling and video, in groups from left to right."""
from dataclasses import fields

from forcing_pack.forcing_core.micro.source import ENLARGED
from forcing_pack.forcing_core.policies import KINDS
from forcing_pack.forcing_core.policies.base import CacheOptions
from graph import Graph
from notes import checkpoint, text_encoder, vae

# As in the colour menu of the page.
MODELS, PROMPTS, SAMPLING, VIDEO = "#3f789e", "#8A8", "#b06634", "#88A"
TALLEST_CACHE = 300  # so that the same nodes of all columns stand in a row


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
        return self.sampled(guider, noise, latent, title)

    def sampled(self, guider, noise, latent=None, title=None):
        return self.add("SamplerCustomAdvanced", title, noise=noise, guider=guider, sampler=self.sampler,
                        sigmas=self.sigmas, latent_image=latent or self.latent)

    def plan_view(self, title):
        self.group(title, SAMPLING, below=True)
        self.column(680)
        self.add("ForcingPlanView", tall=480, model=self.model, sampler=self.sampler, latent=self.latent, conditions=1)

    def video(self, samples, prefix, title="4  Video"):
        self.group(title, VIDEO)
        self.column(440)
        return self.saved(samples, prefix)

    def saved(self, samples, prefix):
        images = self.add("VAEDecode", samples=samples, vae=self.vae)
        if self.enlarged > 1:
            images = self.add("ImageScaleBy", image=images, upscale_method="nearest-exact", scale_by=self.enlarged)
        video = self.add("CreateVideo", images=images, fps=16)
        self.add("SaveVideo", tall=420, video=video, filename_prefix=f"forcing/{prefix}", format="mp4", codec="h264")
        return self

    def compared(self, caches, prefix, seed):
        """The right half with one column a cache policy, {label: options}: same noise, same prompt, a file each."""
        self.sampling("3  The same for all")
        guider, noise = self.guider(), self.noise(seed, "fixed")
        for letter, (label, options) in zip("abcdef", caches.items()):
            self.group(f"4{letter}  {label}", VIDEO)
            self.column(400)
            cache = self.add("ForcingCache", f"Forcing Cache: {label}", TALLEST_CACHE, **widgets(options))
            self.by_preset(cache=cache)
            self.saved(self.sampled(guider, noise), f"{prefix}_{label.lower().replace(' ', '_')}")
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


def widgets(options):
    """Widgets of Forcing Cache that make these options."""
    kind, = (kind for kind, (known, _) in KINDS.items() if known is type(options))
    hidden = {"block"} if options.variants else {"block", *(field.name for field in fields(CacheOptions))}
    values = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in hidden}
    return {"policy": kind, **{f"policy.{name}": 0 if value is None else value for name, value in values.items()}}
