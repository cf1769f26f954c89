"""The idle portrait's motion: without an end, changed by words, and the same however it is asked for."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.micro import face, idle
from forcing_pack.forcing_core.micro.code import LinearCode
from forcing_pack.forcing_core.micro.code_stream import CodeStream
from forcing_pack.forcing_core.plan import REFERENCE
from forcing_pack.forcing_core.saved import Saved
from forcing_pack.forcing_core.training.portrait import code_of_faces


@pytest.fixture(scope="module")
def code() -> LinearCode:
    return code_of_faces(8, 0)


def reader(code):
    return idle.Idle(code, seed=1).begin()


def test_any_split_gives_the_same_latents(code):
    """Blocks, single frames, blocks with a knot, and frames that are asked for again."""
    words = idle.prompt("lively")
    whole = reader(code).of(0, 9, words)
    for sizes in ((3, 3, 3), (1,) * 9):
        made, first, parts = reader(code), 0, []
        for size in sizes:
            parts.append(made.of(first, size, words))
            assert torch.allclose(made.of(first, size + 1, words)[:, :, :size], parts[-1], atol=1e-5)
            first += size
        assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-5)
    assert torch.allclose(made.of(2, 4, words), whole[:, :, 2:6], atol=1e-5)  # goes back


def test_it_begins_at_rest_and_the_reference_stays_there(code):
    rest = code.encode(face.driver(torch.zeros(1, 4, 1)))
    made = reader(code)
    assert torch.allclose(made.of(REFERENCE, 1, idle.prompt("left")), rest, atol=1e-6)
    assert torch.allclose(made.of(0, 1, idle.prompt("left")), rest, atol=1e-6)
    assert (made.of(9, 1, idle.prompt("left")) - rest).abs().mean() > 0.02


def moods(*words):
    """The drive [4, T] of 6 latent frames under each text."""
    made = idle.Idle(None, seed=1).begin()
    for number, text in enumerate(words):
        made.moods.change(max(0, 24 * number - 3), idle.mood(text))
    return made.drive(0, 24 * len(words))


def test_words_move_what_they_say():
    calm = moods("calm", "calm")
    shown = {word: (moods("calm", word) - calm)[:, 40:].mean(1) for word in ("left", "right", "up", "down", "tilts")}
    assert shown["left"][0] < -0.15 and shown["right"][0] > 0.15
    assert shown["up"][1] < -0.08 and shown["down"][1] > 0.08 and shown["tilts"][2] > 0.08
    assert calm[3].max() == 0 and moods("calm", "calm and speaks", "speaks")[3].max() > 0.3
    assert moods("calm", "still")[:, 40:].abs().max() == 0 < calm[:, 40:].abs().max()
    spread = {word: moods("calm", word)[axis, 24:].std() for word, axis in (("nods", 1), ("shakes", 0))}
    assert spread["nods"] > 2 * calm[1, 24:].std() and spread["shakes"] > 2 * calm[0, 24:].std()


def test_a_new_mood_changes_nothing_before_it_and_comes_smoothly():
    calm, turned = moods("calm", "calm"), moods("calm", "looks left")
    assert torch.equal(calm[:, :22], turned[:, :22])
    steps = turned.diff(dim=1).abs().max()
    assert steps < 0.06 and (turned - calm)[0, 40:].max() < -0.15


def test_what_was_made_stays_when_a_pass_goes_back(code):
    """A recache asks for old frames under the new prompt."""
    made = reader(code)
    before = made.of(0, 3, idle.prompt("calm"))
    made.of(3, 3, idle.prompt("left"))
    assert torch.allclose(made.of(0, 3, idle.prompt("left")), before, atol=1e-5)
    other = reader(code)
    other.of(0, 3, idle.prompt("calm"))
    calm = other.of(3, 3, idle.prompt("calm"))
    assert (made.of(3, 3, idle.prompt("left")) - calm).abs().mean() > 0.005


def test_it_goes_on_for_hours(code):
    """Closed forms: far frames cost as much as near ones, and stay within what the network was trained on."""
    made = reader(code)
    far = 16 * 3600 * 24 // 4
    assert torch.isfinite(made.of(far, 3, idle.prompt("lively, shakes and nods"))).all()
    drive = made.drive(4 * far + 100, 400)
    assert (drive[:3].abs() <= idle.REACH[:3, None] + 1e-6).all() and drive[0].std() > 0.02


def test_soft_transitions_are_between_both():
    half = (idle.prompt("left") + idle.prompt("right"))[0, 0, :len(idle.MOTIONS)] / 2
    assert half[0].abs() < 1e-6 and half[3] == 1


def test_a_voice_opens_the_mouth(code):
    made = idle.IdleReader(code, 1, lambda start, frames: torch.full((frames,), 0.7))
    made.moods.change(0, idle.mood("calm"))
    assert torch.allclose(made.drive(0, 30)[3], torch.tensor(0.7))


def test_unknown_words_are_refused_with_the_known_ones():
    with pytest.raises(ForcingError, match="does not know the word 'dances'.*looks left and nods"):
        idle.mood("dances")
    with pytest.raises(ForcingError, match="'dances'"):
        idle.mood("looks left, dances.")
    assert torch.equal(idle.mood("Looks LEFT, nods."), idle.mood("nods left"))


# -- the decoder ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [(3, 3, 3), (1,) * 9, (2, 7)])
def test_blocks_decode_to_the_whole_video(code, sizes):
    latents = torch.randn(1, 16, 9, 8, 8, generator=torch.Generator().manual_seed(5))
    stream = CodeStream(code.decode)
    parts = [stream.push(part) for part in latents.split(sizes, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
    assert torch.allclose(torch.cat(parts, 2), code.decode(latents), atol=1e-5)


def test_a_saved_decoder_goes_on(code):
    latents = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    stream = CodeStream(code.decode)
    stream.push(latents[:, :, :2])
    other = CodeStream(code.decode)
    other.load(Saved(stream.state(), {}), latents)
    assert torch.equal(other.push(latents[:, :, 2:]), stream.push(latents[:, :, 2:]))
