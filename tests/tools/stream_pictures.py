"""Pictures for the cards of example_streams.py: what those workflows make, by the core alone."""
from dataclasses import dataclass

import torch
from example_streams import FIRST, OTHER_COLOUR, SECOND
from examples_long import LONG
from forcing_pack.forcing_core.live.camera_path import PRESETS, draw, preset_path
from forcing_pack.forcing_core.micro import bundle
from forcing_pack.forcing_core.micro.source import MicroSource
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.options import levels_of
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.rollout import Switch, block_rollout
from forcing_pack.forcing_core.rollout.restyle import Restyle, Restyling
from forcing_pack.forcing_core.standalone import make_denoiser

PRESET, SHARED = get("self-forcing"), 24


@dataclass
class Branch:
    """Noise of one seed up to a frame and of another one from there."""

    before: BlockNoise
    after: BlockNoise
    at: int = SHARED

    def initial(self, block):
        return (self.before if block.first < self.at else self.after).initial(block)

    def renoise(self, block, step):
        return (self.before if block.first < self.at else self.after).renoise(block, step)


def noise(seed):
    return BlockNoise(seed, (1, MicroSource().channels), MicroSource().latent_size(*bundle.SIZE))


@torch.no_grad()
def latents(captions, frames, draws, given=None, **more):
    """Clean latents of a video, given frames included."""
    size, before = MicroSource().latent_size(*bundle.SIZE), 0 if given is None else given.shape[2]
    denoiser = make_denoiser(bundle.network("student"), LONG, before + frames, size, [bundle.prompt([captions[0]])])
    denoiser.conditions[0].prompts = [bundle.prompt([caption]) for caption in captions]
    made = block_rollout(denoiser, layout(frames, PRESET.block, given=before), levels_of(PRESET), draws, context=given,
                         window=LONG.window, **more)
    return torch.cat([*([] if given is None else [given]), *(x0 for _, x0 in made)], dim=2)


def pictures(made):
    return [*MicroSource().decoder()(made)]


def live_camera():
    """Twelve ways of a camera, from above."""
    drawn = [(draw(preset_path(move, 32), 256, 128)[:, :128] * 255).byte().numpy() for move in list(PRESETS)[:12]]
    return [drawn[row:row + 4] for row in range(0, 12, 4)]


def endless_stream():
    """One video, line after line."""
    made = pictures(latents([FIRST], 60, noise(15)))
    return [made[len(made) * row // 4:len(made) * (row + 1) // 4] for row in range(4)]


def resume_and_branch():
    by_seed = latents([FIRST], 42, Branch(noise(16), noise(17)))
    by_prompt = latents([FIRST, SECOND], 42, noise(16), switches=[Switch(SHARED, 1, transition="keep")])
    return [pictures(made) for made in (latents([FIRST], 42, noise(16)), by_seed, by_prompt)]


def video_continuation():
    old = latents([FIRST], 21, noise(18))
    return [pictures(old), pictures(latents([SECOND], 21, noise(19), old[:, :, -12:]))]


def restyle_video():
    source = latents([FIRST], 21, noise(20))
    how = Restyling(Restyle(0.94, 0.1), source, layout(21, PRESET.block))
    return [pictures(source), pictures(latents([OTHER_COLOUR], 21, noise(21), make=how.make))]
