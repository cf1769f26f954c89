"""What an S2V network has beside Wan's own blocks, for the causal forward: a voice, a pose, and pictures it keeps in view.

The voice goes through an encoder that looks back only, four features a latent frame, and is added behind some of the
blocks, frame by frame. The pose is added to the tokens. The pictures - a reference, and motion frames before the video, the
older the coarser - are tokens beside those of the video. Here they go through the network once, by themselves at timestep 0,
and what their layers leave is attended to by every forward: a sink that no policy evicts. In time the reference stands behind
the newest frame, and moves along as the video comes near (`Stand`); the motion frames move with it.

Sources: public repos Wan-Video/Wan2.2 (S2V) and Alibaba-Quark/LiveAvatar (arXiv 2512.04677), which caches these tokens so;
module names as in ComfyUI's network. Axis legend: see `forward`; m tokens of pictures, L layers of the audio encoder.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Slices, Source
from ..errors import ForcingError
from ..noise import mix
from ..passes import Pass
from ..plan import REFERENCE, Call
from ..rope import angles, axis_dims, rotate
from .forward import Alone, Ops, remember
from .text import TextState

FEATURES = 4  # of sound, a latent frame
LEAD = 2  # latent frames of sound before the first one that its tokens depend on
START = 30  # position of the reference in a short video
VIDEO, PICTURE, MOTION = range(3)  # rows of `trainable_cond_mask`


@dataclass(frozen=True)
class Stand:
    """Where the reference stands: at START, and later so many frames behind the last frame of a forward, drawn from
    `nearest`..`farthest` anew for each. (9, 9) is the distance of Wan S2V, (1, 27) is what Live Avatar draws from with
    blocks of 3. The draws depend on nothing but the forward, so a resumed video has the same ones."""

    nearest: int = 9
    farthest: int = 9

    def __post_init__(self):
        if not 0 < self.nearest <= self.farthest:
            raise ForcingError(f"A reference {self.nearest} to {self.farthest} frames behind the video makes no sense. Use at "
                               "least 1, and not less than the first number for the second one.")

    def moved(self, call: Call) -> int:
        """How far it has moved on from START for this forward."""
        draw = mix(call.first, call.frames, round(call.sigma * 1e6), ("noisy", "clean", "recache").index(call.phase))
        ahead = self.nearest + draw % (self.farthest - self.nearest + 1)
        return max(0, call.first + call.frames + ahead - START)


@dataclass
class Pictures:
    """Keys as projected and values of all layers, [B, m, H, d] each, and the places [m, 3] of their tokens in time, height
    and width, float64."""

    places: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def turn(self, moved: int, head_dim: int, like: Tensor) -> Tensor:
        """complex64 [1, m, 1, head_dim / 2]: the rotation of all tokens, `moved` frames later; matrices where the device has
        no complex products."""
        places = self.places.cpu() + torch.tensor([float(moved), 0.0, 0.0], dtype=torch.float64)
        axes = [angles(axis.tolist(), dim) for axis, dim in zip(places.unbind(1), axis_dims(head_dim))]
        angle = torch.cat(axes, dim=1)[None, :, None]
        cos, sin = angle.cos().float(), angle.sin().float()
        if like.device.type in ("cpu", "cuda"):
            return torch.complex(cos, sin).to(like.device)
        return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)).to(like.device)


class _Places:
    """Stands for a network's `rope_encode`: gives places [1, n, 3] of tokens instead of their rotation."""

    def rope_encode(self, t, h, w, t_start=0, steps_h=None, steps_w=None, device=None, **_) -> Tensor:
        rows, columns = (h + 1) // 2, (w + 1) // 2
        axes = (torch.arange(t, dtype=torch.float64) + t_start,
                torch.linspace(0, rows - 1, rows if steps_h is None else steps_h, dtype=torch.float64),
                torch.linspace(0, columns - 1, columns if steps_w is None else steps_w, dtype=torch.float64))
        return torch.cartesian_prod(*axes)[None]


class _Writing:
    """The pass of pictures through the network: they see each other, and leave their keys and values."""

    silent = True

    def __init__(self, pictures: Pictures):
        self.pictures, self._turn = pictures, None

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        self.pictures.keys.append(k)
        self.pictures.values.append(v)
        if self._turn is None:
            self._turn = self.pictures.turn(0, k.shape[3], k)
        return None if q is None else rotate(q, self._turn), rotate(k, self._turn), v


def show(net: Any, reference: Tensor | None, motion: Tensor | None, text: TextState, ops: Ops) -> Pictures | None:
    """What the network keeps of a reference [B, 16, r, h, w] and of motion frames [B, 16, k, h, w], both latents in the compute
    dtype; None without either. text: the prompt that they are seen under."""
    tokens, places = [], []
    if reference is not None:
        embedded = net.patch_embedding(reference.float()).to(reference.dtype).flatten(2).transpose(1, 2)
        tokens.append(embedded + _mark(net, PICTURE, embedded))
        places.append(_Places().rope_encode(*reference.shape[2:], t_start=START))
    if motion is not None:
        packed, where = net.frame_packer(motion, _Places())
        tokens.append(packed + _mark(net, MOTION, packed))
        places.append(where)
    if not tokens:
        return None
    pictures = Pictures(torch.cat(places, dim=1)[0])
    remember(net, torch.cat(tokens, dim=1), text, _Writing(pictures), ops)
    return pictures


def picture_tokens(reference: int, motion: bool, height: int, width: int) -> int:
    """How many tokens that are, for latents of this size."""
    frame = height * width // 4
    return reference * frame + motion * (frame + (height // 4) * (width // 4) + 4 * (height // 8) * (width // 8))


class Seeing:
    """A pass that also attends to pictures. Raises ForcingError for a memory that attends in a way of its own."""

    def __init__(self, inner: Pass, pictures: Pictures, stand: Stand):
        if hasattr(inner, "attend") or hasattr(inner, "attend_prompt"):
            raise ForcingError("The pictures of an S2V model cannot be added to sparse attention, or to a memory that weighs "
                               "its frames. Remove Forcing Sparse, and choose the policy window in Forcing Cache.")
        self.inner, self.pictures, self.silent = inner, pictures, inner.silent
        self.observes, self.asks = getattr(inner, "observes", False), getattr(inner, "asks", False)
        # distances are those between frame numbers, whatever the window counts from
        self._moved = stand.moved(inner.call) + inner.plan.query[0] - inner.call.first
        self._turn = None

    def ask(self, layer: int, text: Tensor) -> None:
        self.inner.ask(layer, text)

    def exchange(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        q, keys, values = self.inner.exchange(layer, q, k, v)
        if q is None:
            return q, keys, values
        mine = self.pictures
        if self._turn is None:
            self._turn = mine.turn(self._moved, k.shape[3], k)
        return (q, torch.cat([keys, rotate(mine.keys[layer], self._turn)], dim=1),
                torch.cat([values, mine.values[layer]], dim=1))


def seeing(inner: Pass, pictures: Pictures | None, stand: Stand) -> Any:
    """The pass with the pictures in view; as it is without any, and for the pass of another reference."""
    return inner if pictures is None or inner.call.first >= REFERENCE else Seeing(inner, pictures, stand)


class Voice:
    """What every forward gets of a sound: its frames' features, and those of LEAD frames before them. source: features
    [B, L, channels, n, 4] by latent frame. Behind its end there is silence, which is all zeros."""

    def __init__(self, source: Source):
        self.frames, self._slices = source.frames, Slices(source, 3)

    def of(self, first: int, count: int) -> Tensor:
        lead = 0 if first >= REFERENCE else min(LEAD, first)
        part, silent = self._slices.of(first - lead, count + lead), first + count - self.frames
        if first >= REFERENCE or silent <= 0:
            return part
        part = part.clone()
        part[:, :, :, -silent:] = 0
        return part


class S2V(Alone):
    """sound: features [B, L, channels, F, 4] of the call's frames with up to LEAD frames before them, or None. pose:
    latents [B, 16, F, h, w] of the call's frames, or None. Both in the compute dtype."""

    def __init__(self, net: Any, sound: Tensor | None, pose: Tensor | None):
        super().__init__(net)
        self.net, self.sound, self.pose = net, sound, pose

    def begin(self, tokens: Tensor) -> Tensor:
        if self.pose is not None:
            tokens = tokens + self.net.cond_encoder(self.pose).to(tokens.dtype).flatten(2).transpose(1, 2)
        return tokens + _mark(self.net, VIDEO, tokens)

    def after(self, index: int, x: Tensor, run: Any) -> Tensor:
        if self.sound is None:
            return x
        frames = run.e.shape[1]
        if index == 0:
            both = self.net.casual_audio_encoder(self.sound.flatten(3))  # the name is the network's
            self._whole, self._tokens = (t[:, t.shape[1] - frames:] for t in both)
        return self.net.audio_injector(x, index, self._tokens, self._whole, x.shape[1])


def _mark(net: Any, row: int, like: Tensor) -> Tensor:
    """[D]: what is added to the tokens of a kind."""
    return net.trainable_cond_mask(torch.tensor(row, device=like.device)).to(like)
