"""Measures of portraits: rendered truth scores perfectly, and each damage is seen by its measure and by no other."""
import math

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.micro import face
from forcing_pack.forcing_core.micro.face_metrics import Seen, correlation, measure, scores, seam_roughness, truth

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = [3] * 9
FRAMES = 4 * sum(BLOCKS) - 3  # 6.6 s
SEAMS = [9, 21, 33, 45, 57, 69, 81, 93]


@pytest.fixture(scope="module")
def clip():
    who, drive = face.identities(5, 2), face.eased(face.track(9, 2, FRAMES))
    return who, drive, face.paint(who, drive), truth(who, drive)


def figures(video, true):
    return scores(measure(video, true), BLOCKS)


def test_rendered_truth_is_perfect(clip):
    _, _, video, true = clip
    made = figures(video, true)
    assert max(made["curve"]) < 0.005 and made["mouth"] > 0.97 and made["seam_roughness"] == pytest.approx(1, abs=0.05)
    assert len(made["curve"]) == math.ceil(FRAMES / 16)


def test_another_person_is_another_identity(clip):
    _, drive, _, true = clip
    made = figures(face.paint(face.identities(6, 2), drive), true)
    assert made["identity_first"] > 0.15 and made["identity_ratio"] == pytest.approx(1, abs=0.2)


def test_colours_that_drift_are_seen_late(clip):
    """A shift that grows by 0.3 over the video is 0.15 in [0, 1] at its end, in one of three channels."""
    _, _, video, true = clip
    drifted = video.clone()
    drifted[:, 1] += torch.linspace(0, 0.3, FRAMES)[:, None, None] * -drifted[:, 1].sign()
    made = figures(drifted, true)
    assert made["identity_last"] > 0.1 > made["identity_first"] and made["identity_ratio"] > 1.5
    assert made["identity_worst"] == made["identity_last"] and made["mouth"] > 0.9


def test_a_mouth_that_stays_shut_or_moves_for_itself(clip):
    who, drive, video, true = clip
    late = drive.clone()
    late[:, 3] = drive[:, 3].roll(8, 1)
    assert figures(face.paint(who, late), true)["mouth"] < 0.5
    shut = drive.clone()
    shut[:, 3] = 0
    made = figures(face.paint(who, shut), true)
    assert made["mouth"] < 0.5 and made["identity_first"] < 0.02


def test_a_jump_at_every_seam(clip):
    _, _, video, true = clip
    jumps = video.clone()
    for number, frame in enumerate(SEAMS):
        jumps[:, :, frame:] += 0.05 * (-1) ** number
    made = figures(jumps, true)
    assert made["seam_roughness"] > 3 and made["mouth"] > 0.9
    flicker = video + 0.05 * (-1) ** torch.arange(FRAMES)[:, None, None]
    assert figures(flicker, true)["seam_roughness"] == pytest.approx(1, abs=0.05)


def test_seams_by_hand():
    """Two blocks of two latents: frames 1 and 9 begin latents inside a block, frame 5 begins the second block."""
    change = torch.zeros(1, 13)
    change[:, [1, 9]], change[:, 5] = 0.02, 0.06
    seen = Seen(change, change, change, change)
    assert seam_roughness(seen, [2, 2]) == pytest.approx(0.062 / 0.022, rel=1e-4)
    assert math.isnan(seam_roughness(seen, [4])) and math.isnan(seam_roughness(seen, [1] * 4))


def test_correlation_is_pearsons():
    a, b = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b)])
    assert torch.allclose(correlation(a, b), expected, atol=1e-5)
    assert torch.allclose(correlation(a, 3 * a + 1), torch.ones(3), atol=1e-5)
    holed = a.clone()
    holed[:, 5] = torch.nan
    kept = torch.arange(40) != 5
    assert torch.allclose(correlation(holed, b), correlation(a[:, kept], b[:, kept]), atol=1e-5)
    assert correlation(torch.ones(1, 9), a[:1, :9]).isnan().all()


def test_another_length_is_refused(clip):
    _, _, video, true = clip
    with pytest.raises(ForcingError, match="length and size"):
        measure(video[:, :, :9], true)


def test_tracks_begin_at_rest(clip):
    """As the reference picture does, in which the mouth is shut."""
    who, drive, video, _ = clip
    assert torch.equal(video[:, :, 0], face.reference(who))
    assert torch.equal(drive[:, :, 16:], face.track(9, 2, FRAMES)[:, :, 16:])


def test_labels_and_window(clip):
    """A label is where its colour is; the window holds the open mouth, and no more than skin, lips and mouth."""
    who, drive, video, _ = clip
    part = slice(0, 32)
    labels, window = face.labels(who, drive[:, :, part]), face.mouth_window(drive[:, :, part])
    shirt = torch.tensor(face.SHIRT)[who["shirt"]] * 2 - 1
    for clip_video, label, colour in zip(video[:, :, part], labels[:, 3], shirt):
        assert (clip_video[:, label] - colour[:, None]).abs().max() < 0.45  # at most a fifth of another colour
    assert not (window & labels[:, [1, 2, 3, 4]].any(1)).any()
    wide = drive[:, :, part].clone()
    wide[:, 3] = 1
    changed = (face.paint(who, wide) - face.paint(who, drive[:, :, part] * torch.tensor([1, 1, 1, 0])[:, None])).abs().amax(1)
    assert ((changed > 0.3) & ~window).sum() < 0.05 * ((changed > 0.3) & window).sum()
