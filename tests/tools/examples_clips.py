"""The example workflow of clips: a bidirectional portrait model, a long video. Its function is in the table of `examples`."""
from example_clip import MODELS, PROMPTS, SAMPLING, VIDEO
from forcing_pack.forcing_core.presets import File
from forcing_pack.forcing_core.rollout.clips import Clips, pixels
from graph import Graph
from notes import REPACKAGED, bullets, files, hub, seconds, text, text_encoder, vae

ANIMATE = hub(File("Comfy-Org/Wan_2.2_ComfyUI_Repackaged", "split_files/diffusion_models/wan2.2_animate_14B_bf16.safetensors"),
              "diffusion_models")
VISION = hub(File(REPACKAGED, "split_files/clip_vision/clip_vision_h.safetensors"), "clip_vision")
POSES = hub(File("Comfy-Org/SDPose", "checkpoints/sdpose_wholebody_fp16.safetensors"), "checkpoints")
CLIPS = Clips(20, 2)
WIDTH, HEIGHT, LENGTH = 480, 624, CLIPS.fitting(75)  # LENGTH: latent frames
PERSON = "A close-up portrait of a person who looks into the camera and speaks. Soft daylight, plain background, steady camera."


def portrait_animate():
    note = text(
        "Wan Animate without an end",
        f"{seconds(LENGTH)} at {WIDTH}x{HEIGHT}: a picture moved by a video, pose and expression, by a model that makes "
        f"{pixels(CLIPS.length)} frames at a time. Each clip goes on from the last latents of the one before, which are never "
        "decoded and encoded again, and the stream writes it as soon as it is finished.",
        files(ANIMATE, text_encoder(), VISION, vae(), POSES),
        bullets("How it works", "**WanAnimateToVideo** makes the conditioning of the whole video once; **Forcing Clips** gives "
                "every clip its part, and its beginning.",
                f"**overlap** {CLIPS.overlap}: latent frames that are handed over. **knot** 1: the newest of them is made by "
                "both clips and becomes their mean.",
                "**SDPose** draws the pose of the person in the video and cuts out the face."),
        bullets("What to change", "**The picture** and **the motion**: one person each, about as large in both.",
                f"**Longer**: *length* of the latent and of WanAnimateToVideo ({pixels(LENGTH)} frames now), and of Forcing "
                "Stream in seconds. VRAM does not grow; the face takes 3 MB of RAM a frame.",
                "**Faster**: a 4-step LoRA for Wan I2V 14B, with 4 to 6 *steps*.",
                "**Size**: in the latent and in WanAnimateToVideo, multiples of 16."),
        "## Licence\nWan 2.2 Animate, text encoder and VAE: Apache-2.0. Cards change: read them before you publish anything.")
    graph = Graph()
    graph.group("", "")
    graph.column(460)
    graph.add("MarkdownNote", "Read me", 760, text=note)
    model, clip, decoder, vision, poses = _models(graph)
    graph.group("2  Person and motion", PROMPTS)
    graph.column(340)
    positive = graph.add("CLIPTextEncode", "Prompt", 160, clip=clip, text=PERSON)
    negative = graph.add("ConditioningZeroOut", conditioning=positive)
    picture = graph.add("LoadImage", "The picture", 380, image="example.png")
    seen = graph.add("CLIPVisionEncode", clip_vision=vision, image=picture, crop="none")
    size = graph.add("ForcingEmptyLatent", width=WIDTH, height=HEIGHT, length=LENGTH, unit="latent frames", block=1,
                     batch_size=1)
    graph.column(340)
    driving = graph.add("ForcingDrivingVideo", video=graph.add("LoadVideo", "The motion", 300), latent=size)
    keypoints = graph.add("SDPoseKeypointExtractor", model=poses[0], vae=poses[2], image=driving[0])
    pose = graph.add("SDPoseDrawKeypoints", keypoints=keypoints, draw_face=False)
    face = graph.add("CropByBBoxes", image=driving[0], bboxes=graph.add("SDPoseFaceBBoxes", keypoints=keypoints))
    graph.column(340)
    made = graph.add("WanAnimateToVideo", positive=positive, negative=negative, vae=decoder, width=WIDTH, height=HEIGHT,
                     length=pixels(LENGTH), batch_size=1, clip_vision_output=seen, reference_image=picture, face_video=face,
                     pose_video=pose)
    graph.group("3  Sampling", SAMPLING)
    graph.column(320)
    shifted = graph.add("ModelSamplingSD3", model=model, shift=5.0)
    sigmas = graph.add("BasicScheduler", model=shifted, scheduler="simple", steps=20, denoise=1.0)
    sampler = graph.add("ForcingClips", sampler=graph.add("KSamplerSelect", sampler_name="euler"),
                        clip_frames=pixels(CLIPS.length), overlap=CLIPS.overlap, knot=1)
    guider = graph.add("BasicGuider", model=shifted, conditioning=made[0])
    noise = graph.add("RandomNoise", noise_seed=32, control_after_generate="randomize")
    graph.group("4  Video", VIDEO)
    graph.column(440)
    graph.add("ForcingStream", tall=620, noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=made[2],
              vae=decoder, audio=driving[1], length=round(pixels(LENGTH) / 8) / 2, filename_prefix="forcing/portrait_animate")
    return graph


def _models(graph):
    """Model, text encoder, VAE, image encoder, and the checkpoint of the pose detector."""
    graph.group("1  Models", MODELS)
    graph.column(400)
    encoder, decoder = text_encoder(), vae()
    return (graph.add("UNETLoader", models=[ANIMATE], unet_name=ANIMATE["name"], weight_dtype="default"),
            graph.add("CLIPLoader", models=[encoder], clip_name=encoder["name"], type="wan"),
            graph.add("VAELoader", models=[decoder], vae_name=decoder["name"]),
            graph.add("CLIPVisionLoader", models=[VISION], clip_name=VISION["name"]),
            graph.add("CheckpointLoaderSimple", models=[POSES], ckpt_name=POSES["name"]))


EXAMPLES = (portrait_animate,)
