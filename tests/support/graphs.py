"""API prompts that several tests need."""


def core_ar_video(unet="tiny_wan_causal.safetensors", length=9, size=128, block=1, steps=4, seed=7, batch=1,
                  text="a red ball rolls along a wooden floor"):
    """ComfyUI's own autoregressive sampler, from checkpoint to mp4: the baseline of host tests.

    Node ids are the short names used here ("sample", "latent_file", "video_file" ...), so tests can edit the dict.
    """
    return {
        "unet": _node("UNETLoader", unet_name=unet, weight_dtype="default"),
        "model": _node("ModelSamplingSD3", model=["unet", 0], shift=5.0),
        "text": _node("TestTextEncode", text=text),
        "guider": _node("BasicGuider", model=["model", 0], conditioning=["text", 0]),
        "noise": _node("RandomNoise", noise_seed=seed),
        "sampler": _node("SamplerARVideo", num_frame_per_block=block),
        "sigmas": _node("BasicScheduler", model=["model", 0], scheduler="simple", steps=steps, denoise=1.0),
        "latent": _node("EmptyARVideoLatent", width=size, height=size, length=length, batch_size=batch),
        "sample": _node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0],
                        sigmas=["sigmas", 0], latent_image=["latent", 0]),
        "latent_file": _node("SaveLatent", samples=["sample", 0], filename_prefix="latents/core_ar"),
        "vae": _node("VAELoader", vae_name="tiny_wan_vae.safetensors"),
        "decode": _node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "video": _node("CreateVideo", images=["decode", 0], fps=16.0),
        "video_file": _node("SaveVideo", video=["video", 0], filename_prefix="video/core_ar", format="mp4",
                            codec="h264"),
    }


def _node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}
