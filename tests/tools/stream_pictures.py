"""Pictures for the cards of example_streams.py: what those workflows make, by the core alone."""
from dataclasses import dataclass

import torch
from example_streams import FIRST, OTHER_COLOUR, SECOND
from examples_knot import SHORT
from examples_long import LONG
from forcing_pack.forcing_core.live import ActionTrack, live_rollout
from forcing_pack.forcing_core.live.camera_path import PRESETS, draw, preset_path
from forcing_pack.forcing_core.micro import bundle, face, idle, live, portrait, steer
from forcing_pack.forcing_core.micro.source import MicroSource
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.options import levels_of
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies.reference import with_reference
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.rollout import Knot, Switch, block_rollout, knot_rollout
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


@torch.no_grad()
def live_steer():
    """Four worlds that keys move, line by line."""
    worlds, play = steer.draw(4, 4), torch.zeros(4, 33, dtype=torch.long)
    play[:, 1::8] = torch.tensor([1, 3, 2, 4])[:, None]
    net, autoencoder = live.read(live.path()), live.PictureVAE(bundle.vae())
    given = autoencoder.encode(steer.paint(worlds, worlds.start[:, None])[:, :, 0])[:, :, None]
    made = []
    for row in range(4):
        start, track = given[row:row + 1], ActionTrack(steer.rows(play[row]))
        clip = live_rollout(net, track, start, 32, BlockNoise(row, (1, 16), (8, 8)), steps=6)
        clip = autoencoder.decode(torch.cat([start, *(x0 for _, x0 in clip)], dim=2)[0].movedim(0, 1))
        made.append([*clip.add(1).mul(127.5).clamp(0, 255).byte().movedim(1, -1).numpy()])
    return made


def endless_stream():
    """One video, line after line."""
    made = pictures(latents([FIRST], 60, noise(15)))
    return [made[len(made) * row // 4:len(made) * (row + 1) // 4] for row in range(4)]


@torch.no_grad()
def portrait_idle():
    """One face that looks around, line after line."""
    made, words = portrait.load(), ("calm", "looks left", "nods", "looks right and speaks")
    options = with_reference(SHORT, 1, 8, 4)
    reader, frames = idle.Idle(made.code, 1).begin(), 15 * len(words)
    parts = [reader.of(first, 3, idle.prompt(words[first // 15])) for first in range(0, frames, 3)]
    parts.append(reader.of(frames, 1, idle.prompt(words[-1])))
    denoiser = portrait.driven(made, options, frames, portrait.Drive(torch.cat(parts, 2)), ahead=1)
    picture = made.code.encode(face.reference(face.identities(1, 1))[:, :, None])
    draws = BlockNoise(33, (1, 16), (8, 8))
    blocks = knot_rollout(denoiser, layout(frames, 3), levels_of(PRESET), draws, knot=Knot(1), reference=picture,
                          window=options.window)
    video = made.code.decode(torch.cat([x0 for _, x0 in blocks], 2))[0].clamp(-1, 1).add(1).mul(127.5).byte()
    shown = [*video.permute(1, 2, 3, 0).numpy()]
    return [shown[len(shown) * row // 4:len(shown) * (row + 1) // 4] for row in range(4)]


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
