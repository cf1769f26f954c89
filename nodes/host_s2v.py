"""ComfyUI's S2V networks in a causal rollout: the sound of a forward's frames, and pictures that stay in view.

WanSoundImageToVideo leaves features of the sound for the whole video, four a latent frame, control latents, and the latents
of a reference and of motion frames. Here a forward gets the sound and the control of its frames; the pictures go through the
network once a run and condition. They are seen under the condition's own prompt, whatever prompt rules later, so that a
resumed run sees the same.
"""
from __future__ import annotations

from comfy.ldm.wan.model import WanModel_S2V
from torch import Tensor

from ..forcing_core.conditioning import Held
from ..forcing_core.errors import ForcingError
from ..forcing_core.options import RolloutOptions
from ..forcing_core.streaming import ENDLESS
from ..forcing_core.wan import S2V, Ops, Pictures, Stand, TextState, Voice, picture_tokens, seeing, show
from ..forcing_core.wan.s2v import FEATURES

SOUND, POSE, REFERENCE, MOTION = "audio_embed", "control_video", "reference_latent", "reference_motion"
EXTRAS = (SOUND, POSE, REFERENCE, MOTION)
NODE = "WanSoundImageToVideo"


def check_taken(net, cond: dict) -> None:
    """Raise ForcingError for a sound that the network would pass over in silence, or that another encoder heard."""
    sound = cond.get(SOUND)
    if sound is None:
        return
    if not isinstance(net, WanModel_S2V):
        raise ForcingError(f"The conditioning comes from {NODE}, and this checkpoint is no S2V model, so the voice would do "
                           "nothing. Load Wan 2.2 S2V 14B.")
    encoder = net.casual_audio_encoder
    wanted = encoder.weights.shape[1], encoder.encoder.conv1_local.conv.weight.shape[1]
    if tuple(sound.shape[1:3]) != wanted:
        raise ForcingError(f"The sound has {sound.shape[1]} layers of {sound.shape[2]} features and this model listens to "
                           f"{wanted[0]} of {wanted[1]}. Load wav2vec2_large_english in Load Audio Encoder.")


def by_frame(sound: Tensor) -> Held:
    """Features [B, L, channels, T] as a source of latent frames; a rest that fills none is left out."""
    frames = sound.shape[3] // FEATURES
    return Held(sound[..., :frames * FEATURES].unflatten(3, (frames, FEATURES)), 3)


def voice(source, frames: int) -> Voice:
    """The sound of a video of so many latent frames. Raises ForcingError where it ends before the video does, unless that
    never ends: then there is silence."""
    if source.frames < frames < ENDLESS:
        raise ForcingError(f"The sound of the conditioning lasts for {source.frames} latent frames and the video has {frames}. "
                           f"Set the length of {NODE} to {4 * frames - 3} frames of video; behind the end of a shorter sound "
                           "it puts silence.")
    return Voice(source)


class Speaker(S2V):
    """What an S2V network has beside its blocks for one condition. part(name): its share of a batched value. context: the
    condition's own prompt."""

    def __init__(self, net, part, extra: dict):
        found = {name: part(name) if extra.get(name) is not None else None for name in EXTRAS}
        if found[SOUND] is None and found[POSE] is None:
            raise ForcingError(f"An S2V model makes a video from a picture and a voice, and the conditioning has neither. Send "
                               f"the prompt through {NODE}, the negative one too where there is guidance.")
        super().__init__(net, found[SOUND], found[POSE])
        self.reference, self.motion, self.context = found[REFERENCE], found[MOTION], part("context")


class Views:
    """The pictures of all conditions of a run."""

    def __init__(self, options: RolloutOptions):
        self._stand, self._kept = stand_of(options.cache), {}

    def around(self, key, side, now, ops: Ops):
        """The pass with what its network has in view; as it is for other networks."""
        if not isinstance(side, Speaker):
            return now
        if key not in self._kept:
            self._kept[key] = show(side.net, side.reference, side.motion, TextState(side.context), ops)
        return seeing(now, self._kept[key], self._stand)

    def clear(self) -> None:
        self._kept.clear()

    @property
    def kept(self) -> tuple[Pictures, ...]:
        return tuple(pictures for pictures in self._kept.values() if pictures is not None)


def stand_of(cache) -> Stand:
    """Where the options of a memory have a reference stand, or where Wan S2V has it."""
    return Stand(cache.nearest, cache.farthest) if hasattr(cache, "farthest") else Stand()


def view_bytes(net, conds, shape, element_size: int) -> int:
    """Bytes of the device that the pictures of these conditions take in a run of this `Shape`."""
    if not isinstance(net, WanModel_S2V):
        return 0
    tokens = sum(picture_tokens(_frames(cond.get("reference_latents")), cond.get(MOTION) is not None, shape.height, shape.width)
                 for cond in conds)
    return 2 * len(net.blocks) * shape.batch * tokens * shape.dim * element_size


def _frames(references) -> int:
    """Latent frames of the newest of the references: the one that ComfyUI takes."""
    return references[-1].shape[2] if references else 0
