"""Prompts over time: several prompts with start times as one CONDITIONING, which any guider hands to our sampler.

The first prompt is the conditioning itself; the whole track lies in its dictionary, which ComfyUI copies unseen.
"""
from __future__ import annotations

from comfy_api.latest import io

from ..forcing_core.errors import ForcingError
from ..forcing_core.track import KINDS, SOFT_BLOCKS, Segment, Track
from ..forcing_core.track_files import read_track
from .common import CATEGORY
from .host_memory import TRACK

TRANSITION_TIP = ("What happens to memory where this prompt takes over. recache: rewritten under the new prompt, as LongLive "
                  "does it. keep: nothing but the text changes. soft: the text fades over some blocks. flush: only the sink "
                  "and the last two latent frames stay. jump: a flush, and the new scene stands far away in time (needs "
                  "relative positions). cut: everything is forgotten.")
SCRIPT = """0 | A red fox trots along a snowy forest trail at dawn, the camera follows at its side.
5 | The red fox stops on the snowy forest trail, lifts its head and listens.
10 | soft 4 | The red fox leaps into the deep snow, powder flies up around it."""
# what a text encoder leaves in the dictionary of a prompt; more would be dropped without a word
PLAIN = {"pooled_output", "attention_mask"}


def _only(conditioning, what: str) -> list:
    """The one [embedding, dictionary] of a prompt; raises ForcingError where there are several."""
    if len(conditioning) != 1:
        raise ForcingError(f"{what} consists of {len(conditioning)} combined prompts, and a track has one at a time. Connect "
                           "a single text encode node.")
    return conditioning[0]


def embedding_of(conditioning, what: str):
    """The embedding [1, n, text_dim] of a plain prompt."""
    embedding, more = _only(conditioning, what)
    if TRACK in more:
        raise ForcingError(f"{what} is a prompt track already. Connect a plain prompt there, and the track to previous.")
    extra = sorted(name for name, value in more.items() if value is not None and name not in PLAIN)
    if extra:
        raise ForcingError(f"{what} carries {', '.join(extra)}, which a prompt of a track cannot do. Connect a plain text "
                           "encode node.")
    return embedding


def _carrying(track: Track, conditioning) -> list:
    """The conditioning of the first prompt with a track in it."""
    embedding, more = conditioning[0]
    return [[embedding, {**more, TRACK: track}]]


class ForcingPromptTrack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingPromptTrack",
            display_name="Forcing Prompt Track",
            category=CATEGORY,
            description="Several prompts with start times for one video, written as a script. The output goes where a prompt "
                        "goes; Forcing Preset and Forcing Sampler change the prompt while they run.",
            search_aliases=["prompt schedule", "prompt travel", "multi prompt", "storyboard"],
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoder, as for Text Encode."),
                io.String.Input("script", multiline=True, default=SCRIPT,
                                tooltip="One line a prompt: time | prompt, or time | transition | prompt. Times are seconds, "
                                        "0:10, or latent frames as 40f; the first is 0. LongLive's JSON lines with "
                                        "switch_frame_indices work too."),
                io.Combo.Input("transition", options=list(KINDS), default="recache",
                               tooltip="For lines that name none. " + TRANSITION_TIP),
                io.Int.Input("soft_blocks", default=SOFT_BLOCKS, min=2, max=1000, advanced=True,
                             tooltip="Blocks that a soft transition takes where its line names no number."),
            ],
            outputs=[io.Conditioning.Output(tooltip="For positive or negative of any guider.")],
        )

    @classmethod
    def execute(cls, clip, script, transition, soft_blocks=SOFT_BLOCKS) -> io.NodeOutput:
        if clip is None:
            raise ForcingError("There is no text encoder: the loader's file has none. Use Load CLIP with type wan.")
        plain = read_track(script, transition, soft_blocks)
        conds = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in plain.prompts]
        segments = tuple(Segment(s.start, embedding_of(cond, f"Prompt {number}"), s.transition, s.blocks, s.frames, s.prompt)
                         for number, (s, cond) in enumerate(zip(plain.segments, conds, strict=True), 1))
        return io.NodeOutput(_carrying(Track(segments), conds[0]))


class ForcingPromptSegment(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ForcingPromptSegment",
            display_name="Forcing Prompt Segment",
            category=CATEGORY,
            description="Adds one prompt at a time of the video to the prompts before it. Chain as many as you like; the last "
                        "one's output goes where a prompt goes.",
            search_aliases=["prompt schedule", "prompt travel", "scene"],
            inputs=[
                io.Conditioning.Input("previous", tooltip="The prompts so far: a plain prompt, which starts at 0, or another "
                                                          "Forcing Prompt Segment or Forcing Prompt Track."),
                io.Conditioning.Input("conditioning", tooltip="The prompt that takes over."),
                io.Float.Input("start", default=5.0, min=0.0, max=100000.0, step=0.25,
                               tooltip="Second of the video at which it takes over, rounded up to the next block. Counted "
                                       "from the start of the whole video."),
                io.Combo.Input("transition", options=list(KINDS), default="recache", tooltip=TRANSITION_TIP),
                io.Int.Input("soft_blocks", default=SOFT_BLOCKS, min=2, max=1000, advanced=True,
                             tooltip="Blocks that a soft transition takes. A block of 3 latent frames is 0.75 s."),
            ],
            outputs=[io.Conditioning.Output(tooltip="For positive or negative of any guider, or previous of the next one.")],
        )

    @classmethod
    def execute(cls, previous, conditioning, start, transition, soft_blocks=SOFT_BLOCKS) -> io.NodeOutput:
        track = _only(previous, "previous")[1].get(TRACK)
        if track is None:
            track = Track((Segment(0, embedding_of(previous, "previous")),))
        track = track.then(Segment(start, embedding_of(conditioning, "conditioning"), transition, soft_blocks))
        return io.NodeOutput(_carrying(track, previous))
