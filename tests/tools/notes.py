"""The notes in the example workflows: files, licences and memory come from the presets, so they cannot drift."""
from urllib.parse import quote

import bench  # noqa: F401  (names the pack)
from forcing_pack.forcing_core import plan_view, presets
from forcing_pack.forcing_core.options import from_preset, pixel_frames

REPACKAGED = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
MATCH = "**system** (loader and preset) and **block** (latent) belong to the checkpoint: leave them."
ENCODER, VAE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"


def hub(file, folder):
    """Metadata of one published file as the missing-models dialog reads it."""
    return {"name": file.path.split("/")[-1], "directory": folder,
            "url": f"https://huggingface.co/{file.repo}/resolve/main/{quote(file.path)}"}


def checkpoint(preset):
    return hub(preset.files[0], "diffusion_models")


def lora(preset):
    return hub(preset.lora, "loras")


def text_encoder():
    return hub(presets.File(REPACKAGED, f"split_files/text_encoders/{ENCODER}"), "text_encoders")


def vae():
    return hub(presets.File(REPACKAGED, f"split_files/vae/{VAE}"), "vae")


def store(preset, frames, width=832, height=480, cache=None):
    """Gigabytes that the KV store takes in 16 bit, as Forcing Plan View would say."""
    options = from_preset(preset, cache).cache
    size = plan_view.announce(options, frames, plan_view.StoreShape(height=height // 8, width=width // 8)).bytes
    return f"{size / 1e9:.1f} GB"


def seconds(frames, fps=16):
    return f"{pixel_frames(frames)} frames, {pixel_frames(frames) / fps:.1f} s"


def files(*models):
    lines = [f"- `models/{model['directory']}/` [{model['name']}]({model['url']})" for model in models]
    return "\n".join(["## Files", *lines])


def files_of(preset, *more):
    """The files of a workflow: the preset's checkpoint, `more`, text encoder and VAE."""
    return files(checkpoint(preset), *more, text_encoder(), vae())


def licence(preset):
    limits = f" **{preset.restrictions[0].upper()}{preset.restrictions[1:]}.**" if preset.restrictions else ""
    return (f"## Licence\nWeights: {preset.licence}.{limits} Text encoder and VAE: Apache-2.0 (Wan 2.1). "
            "Cards change: read them before you publish anything.")


def text(title, summary, *sections):
    return "\n\n".join([f"# {title}", summary, *sections])


def bullets(title, *lines):
    return "\n".join([f"## {title}", *(f"- {line}" for line in lines)])
