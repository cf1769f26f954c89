"""The example workflow of Live Avatar: a picture and a voice become a video. Its function is in the table of `examples`."""
from example_clip import MODELS, PROMPTS, SAMPLING, VIDEO, widgets
from forcing_pack.forcing_core.options import pixel_frames
from forcing_pack.forcing_core.policies import PerStepOptions
from forcing_pack.forcing_core.presets import File, get
from graph import Graph
from notes import bullets, checkpoint, files, hub, licence, lora, seconds, text, text_encoder, vae

VOICE = hub(File("Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
                 "split_files/audio_encoders/wav2vec2_large_english_fp16.safetensors"), "audio_encoders")
SMALL = PerStepOptions(positions="rebased", store="int8", offload=True)
WIDTH, HEIGHT, LENGTH = 448, 640, 60  # LENGTH: latent frames
MOTION = 73  # frames of video that the model sees as its past
SPEAKER = ("A close-up portrait of a person who looks into the camera and speaks with a calm, friendly face. Soft daylight, "
           "plain background, steady camera.")


def portrait_s2v():
    preset = get("live-avatar")
    note = text(
        "Live Avatar: a picture that speaks",
        f"{seconds(LENGTH)} at {WIDTH}x{HEIGHT} from a picture and a voice, block by block in four steps: Wan 2.2 S2V 14B with "
        "the published LoRA.",
        files(checkpoint(preset), lora(preset), text_encoder(), VOICE, vae()),
        bullets("How it works", "**WanSoundImageToVideo** hears the whole voice once; every block gets its part of it.",
                "The picture stays in view of every block, ahead of it in time, so the face stays the same however long it "
                f"speaks. As its past the model sees the same picture, {MOTION} times.",
                "Every step remembers its own 12 latent frames: **Forcing Cache**, *per_step*."),
        bullets("What to change", "**The picture**: upright, face in the middle. **The voice**: of any rate and length.",
                f"**Longer**: *length* of WanSoundImageToVideo, {pixel_frames(LENGTH)} now: 9, 21, 33 and so on, in steps of "
                "12. A voice that is shorter is followed by silence.",
                "**Memory**: the store is kept in int8 in main memory. On a card with 80 GB switch *offload* off and "
                "*store* to model.",
                "**Size**: multiples of 64 suit the model best."),
        "**Mind**: the sound is cut for 16 frames a second, the LoRA was trained with 25. Not tried on a GPU yet.",
        licence(preset))
    clip = Graph()
    clip.group("", "")
    clip.column(460)
    clip.add("MarkdownNote", "Read me", 760, text=note)
    model, words, decoder, ear = _models(clip, preset)
    clip.group("2  Picture and voice", PROMPTS)
    clip.column(340)
    positive = clip.add("CLIPTextEncode", "Prompt", 160, clip=words, text=SPEAKER)
    negative = clip.add("ConditioningZeroOut", conditioning=positive)
    voice = clip.add("LoadAudio", "The voice", audio="voice.wav")
    heard = clip.add("AudioEncoderEncode", audio_encoder=ear, audio=voice)
    clip.column(340)
    picture = clip.add("LoadImage", "The picture", 380, image="example.png")
    past = clip.add("RepeatImageBatch", image=picture, amount=MOTION)
    made = clip.add("WanSoundImageToVideo", positive=positive, negative=negative, vae=decoder, width=WIDTH, height=HEIGHT,
                    length=pixel_frames(LENGTH), batch_size=1, audio_encoder_output=heard, ref_image=picture, ref_motion=past)
    clip.group("3  Sampling", SAMPLING)
    clip.column(340)
    given = clip.add("ForcingPreset", system=preset.name, cache=clip.add("ForcingCache", **widgets(SMALL)))
    guider = clip.add("ForcingGuider", model=model, positive=made, cfg=preset.cfg)
    noise = clip.add("RandomNoise", noise_seed=34, control_after_generate="randomize")
    samples = clip.add("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=given[0], sigmas=given[1],
                       latent_image=made[2])
    clip.group("4  Video", VIDEO)
    clip.column(440)
    video = clip.add("CreateVideo", images=clip.add("VAEDecode", samples=samples, vae=decoder), audio=voice, fps=16)
    clip.add("SaveVideo", tall=620, video=video, filename_prefix="forcing/portrait_s2v", format="mp4", codec="h264")
    return clip


def _models(clip, preset):
    """(MODEL, CLIP, VAE, AUDIO_ENCODER)"""
    clip.group("1  Models", MODELS)
    clip.column(400)
    file, factors, encoder, decoder = checkpoint(preset), lora(preset), text_encoder(), vae()
    base = clip.add("UNETLoader", models=[file], unet_name=file["name"], weight_dtype="default")
    model = clip.add("ForcingLiveAvatar", models=[factors], model=base, lora=factors["name"], strength=1.0)
    words = clip.add("CLIPLoader", models=[encoder], clip_name=encoder["name"], type="wan")
    return (model, words, clip.add("VAELoader", models=[decoder], vae_name=decoder["name"]),
            clip.add("AudioEncoderLoader", models=[VOICE], audio_encoder_name=VOICE["name"]))


EXAMPLES = (portrait_s2v,)
