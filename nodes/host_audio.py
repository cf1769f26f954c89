"""InfiniteTalk's audio in a causal rollout: ComfyUI's own patches of its MODEL, with the audio of a forward's frames.

WanInfiniteTalkToVideo leaves audio tokens for every latent frame of the video, and a wrapper that replaces the first
frames of whatever a forward gets. Here a forward finds the tokens of its frames, and first frames are those of the video.
"""
from __future__ import annotations

from typing import Callable

from comfy.ldm.wan.model_multitalk import MultiTalkGetAttnMapPatch
from comfy.patcher_extension import WrappersMP

from ..forcing_core.conditioning import Held, Slices
from ..forcing_core.errors import ForcingError

AUDIO, MOTION = "audio_embeds", "MultiTalk_apply_model"  # names of the tokens [1, F, n, D] and of the wrapper


class Audio:
    """What a run does with them. transformer_options: of the run; now: (first, frames) of the forward.

    Raises ForcingError for two speakers, who are told apart by attention to a frame that may have left the memory.
    """

    def __init__(self, transformer_options: dict, now: Callable[[], tuple[int, int]]):
        tokens, self.now = transformer_options.get(AUDIO), now
        self._slices = None if tokens is None else Slices(Held(tokens, 1), 1)
        patches = transformer_options.get("patches", {}).get("attn1_patch", ())
        if any(isinstance(patch, MultiTalkGetAttnMapPatch) for patch in patches):
            raise ForcingError("InfiniteTalk with two speakers looks for them in a frame that a causal rollout may have "
                               "forgotten. Set the mode of WanInfiniteTalkToVideo to single_speaker.")
        wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
        if MOTION in wrappers:
            wrappers[MOTION] = [self._start(wrapper.init_latents) for wrapper in wrappers[MOTION]]

    def lay(self, transformer_options: dict) -> None:
        """Give a forward, whose own options these are, the tokens of its frames."""
        if self._slices is not None:
            transformer_options[AUDIO] = self._slices.of(*self.now())

    def _start(self, latents):
        """As ComfyUI's wrapper, for frames by their number in the video."""
        def wrapper(executor, x, *args, **kwargs):
            part = latents[:, :, self.now()[0]:][:, :, :x.shape[2]]
            x[:, :, :part.shape[2]] = part.to(x)
            return executor(x, *args, **kwargs)
        return wrapper
