"""Clips: which frames are made, handed over, fused and given out, and what each clip gets of conditioning."""
import importlib
import json
from pathlib import Path

import pytest
import torch
from forcing_pack.forcing_core.conditioning import Held, Streamed
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.rollout.clips import Clip, Clips, Cuts, Lane, clip_rollout, latents_of, lay, pixels

LAYOUTS = [(21, Clips(21, 2, 1)), (9, Clips(5, 1)), (23, Clips(6, 3, 2)), (24, Clips(6, 3, 3)), (10, Clips(4, 0)),
           (7, Clips(5, 4, 1)), (11, Clips(3, 2, 2)), (13, Clips(5, 0, 0, history=7)), (3, Clips(21, 2))]


def numbered(clip):
    """A clip whose latents say which frame they are and which clip made them."""
    frames = torch.arange(clip.first, clip.first + clip.frames, dtype=torch.float64)
    return (frames + 1024 * clip.index).view(1, 1, -1, 1, 1)


def rolled(frames, options, make=None):
    handed = []

    def made(clip, given):
        handed.append(given)
        return numbered(clip) if make is None else make(clip, given)
    out = list(clip_rollout(made, lay(frames, options), options))
    return out, handed


@pytest.mark.parametrize(("frames", "options"), LAYOUTS)
def test_every_frame_is_given_out_once_and_in_order(frames, options):
    out, _ = rolled(frames, options)
    video = torch.cat([latents for _, latents in out], dim=2).flatten()
    # fused frames are the mean of versions that are a multiple of 1024 apart, at most two times
    assert video.remainder(256).tolist() == list(range(frames))
    assert [latents.shape[2] for _, latents in out] == [clip.final.stop - clip.final.start for clip, _ in out]


def test_by_hand():
    """Two clips of 5 with an overlap of 3, of which 1 is a knot: frames 2, 3 stay, 4 is the mean, 5 and 6 are new."""
    (first, one), (second, two) = rolled(7, Clips(5, 3, 1))[0]
    assert (first, second) == (Clip(0, 0, 5, 0, 0, 1), Clip(1, 2, 5, 3, 1, 0))
    assert one.flatten().tolist() == [0, 1, 2, 3] and two.flatten().tolist() == [4 + 1024 / 2, 5 + 1024, 6 + 1024]


@pytest.mark.parametrize(("frames", "options"), LAYOUTS)
def test_a_clip_gets_the_newest_latents(frames, options):
    out, handed = rolled(frames, options)
    assert handed[0] is None
    for (clip, _), given in zip(out[1:], handed[1:]):
        if not options.overlap and not options.history:
            assert given is None
            continue
        count = min(options.history, clip.first) or options.overlap
        end = clip.first + clip.given
        assert given.flatten().remainder(256).tolist() == list(range(end - count, end))


def test_what_is_handed_over_is_what_was_given_out():
    """Also where an overlap is longer than what a clip adds, so that it goes through several of them."""
    options = Clips(5, 4, 1)
    out, handed = rolled(9, options, lambda clip, given: torch.randn(1, 2, clip.frames, 1, 1, dtype=torch.float64))
    video = torch.cat([latents for _, latents in out], dim=2)
    for (clip, _), given in zip(out[1:], handed[1:]):
        settled = clip.given - clip.closing
        assert torch.equal(given[:, :, :settled], video[:, :, clip.first:clip.first + settled])
        assert not torch.equal(given[:, :, settled], video[:, :, clip.first + settled])


def test_the_newest_clip_is_all_that_is_kept():
    storages = []

    def make(clip, given):
        storages.append(None if given is None else given.untyped_storage().nbytes() // given.element_size())
        return torch.zeros(1, 1, clip.frames, 4, 4)
    list(clip_rollout(make, lay(50, Clips(10, 2)), Clips(10, 2)))
    assert storages == [None] + [2 * 16] * 5


def test_the_last_clip_is_as_long_as_what_is_left():
    assert [clip.frames for clip in lay(12, Clips(6, 2))] == [6, 6, 4]
    assert [clip.frames for clip in lay(14, Clips(6, 2))] == [6, 6, 6]
    assert [Clips(6, 2).fitting(frames) for frames in (1, 6, 7, 12, 13)] == [6, 6, 6, 14, 14]


@pytest.mark.parametrize(("settings", "words"), [
    ((0, 0, 0), "make no sense"), ((5, -1, 0), "make no sense"), ((5, 5, 0), r"\(17 frames of video\).*at most 4"),
    ((5, 2, 3), "longer than the overlap of 2"), ((5, 2, 0, 19), "Set the overlap to 0")])
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ForcingError, match=words):
        Clips(*settings)


@pytest.mark.parametrize(("frames", "nearest"), [(80, "77 or 81"), (82, "81 or 85"), (0, "1 or 5"), (-3, "1 or 5")])
def test_a_clip_off_the_grid_is_refused(frames, nearest):
    with pytest.raises(ForcingError, match=f"4n \\+ 1 frames. Use {nearest}"):
        latents_of(frames)


def test_frames_and_latents():
    assert [latents_of(pixels(latents)) for latents in (1, 2, 20, 21)] == [1, 2, 20, 21] and pixels(21) == 81


# -- conditioning ------------------------------------------------------------------------------------------------

CLIPS = list(lay(12, Clips(5, 2)))  # first frames 0, 3, 6, 9, of 5, 5, 5, 3


def entries(count):
    return torch.arange(count).view(1, 1, -1)


def cut(count, lane, clips=CLIPS):
    cuts = Cuts(Held(entries(count), 2), lane)
    return [None if part is None else part.flatten().tolist() for part in map(cuts.of, clips)]


def test_a_value_for_every_latent_frame():
    assert cut(12, Lane(2)) == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [6, 7, 8, 9, 10], [9, 10, 11]]


def test_a_reference_goes_with_every_clip():
    assert cut(13, Lane(2, lead=1)) == [[0, *range(first + 1, first + 1 + n)] for first, n in ((0, 5), (3, 5), (6, 5), (9, 3))]


def test_a_start_image_goes_with_every_clip():
    assert cut(12, Lane(2, still=True)) == [[0, 1, 2, 3, 4]] * 3 + [[0, 1, 2]]


def test_frames_of_video():
    """As a video from frame 4 * first on, whose first latent frame is one frame: what a node with that offset would read."""
    assert cut(45, Lane(2, rate=4, single=True)) == [[*range(4 * c.first, 4 * c.first + pixels(c.frames))] for c in CLIPS]


def test_four_entries_a_latent_frame():
    assert cut(48, Lane(2, rate=4)) == [[*range(4 * c.first, 4 * (c.first + c.frames))] for c in CLIPS]


def test_where_the_conditioning_ends():
    assert cut(5, Lane(2)) == [[0, 1, 2, 3, 4], [3, 4, 4, 4, 4], [4] * 5, [4] * 3]
    assert cut(5, Lane(2, ends=True)) == [[0, 1, 2, 3, 4], [3, 4, 4, 4, 4], None, None]
    assert cut(5, Lane(2, fill="zeros")) == [[0, 1, 2, 3, 4], [3, 4, 0, 0, 0], [0] * 5, [0] * 3]
    assert cut(18, Lane(2, rate=4, single=True, fill="short", ends=True)) == [[*range(17)], [*range(12, 18)], None, None]
    assert cut(4, Lane(2, lead=1, fill="zeros")) == [[0, 1, 2, 3, 0, 0], [0] * 6, [0] * 6, [0] * 4]


def test_a_streamed_source_is_read_once_and_in_order():
    asked = []

    def make(first, count):
        asked.extend(range(first, first + count))
        return entries(200)[:, :, first:first + count]
    cuts = Cuts(Streamed(make, 13), Lane(2, lead=1))
    streamed = [cuts.of(clip).flatten().tolist() for clip in CLIPS]
    assert streamed == cut(13, Lane(2, lead=1)) and asked == list(range(13))


def test_conditioning_without_frames_is_refused():
    with pytest.raises(ForcingError, match="1 frames, 1 of them a reference"):
        Cuts(Held(entries(1), 2), Lane(2, lead=1))


# -- the workflow ------------------------------------------------------------------------------------------------

def test_the_workflow_is_what_its_function_describes(monkeypatch):
    """And its stream, its conditioning and its clips are of one length."""
    pack = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(str(pack / "tests" / "tools"))
    described = importlib.import_module("examples_clips").portrait_animate().as_dict()
    saved = json.loads((pack / "workflows" / "portrait_animate.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in saved["nodes"]}
    assert {key: node["type"] for key, node in nodes.items()} == {node["id"]: node["type"] for node in described["nodes"]}
    named = [[*link[1:4], nodes[link[3]]["inputs"][link[4]]["name"]] for link in saved["links"]]
    assert sorted(named) == sorted(described["links"])
    widgets = {node["type"]: node["widgets"] for node in described["nodes"]}
    text = next(node for node in saved["nodes"] if node["type"] == "MarkdownNote")["widgets_values"][0]
    assert text == widgets["MarkdownNote"]["text"]
    length, clip = latents_of(widgets["WanAnimateToVideo"]["length"]), widgets["ForcingClips"]
    options = Clips(latents_of(clip["clip_frames"]), clip["overlap"], clip["knot"])
    assert options.fitting(length) == length == widgets["ForcingEmptyLatent"]["length"]
    assert options.fitting(round((widgets["ForcingStream"]["length"] * 16 + 3) / 4)) == length
