"""The steerable micro world: what is shown, what is measured from pixels, and the way back; the micro LIVE's pictures."""
import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.live.conditions import ACTIONS
from forcing_pack.forcing_core.micro import bundle, code, live, steer
from forcing_pack.forcing_core.micro.names import BACKGROUNDS, SHAPES
from forcing_pack.forcing_core.training import live_compare

pytestmark = pytest.mark.usefixtures("one_thread")
B, F = 9, 40
NONE, LEFT, RIGHT, UP, DOWN = range(5)


@pytest.fixture(scope="module")
def worlds():
    return steer.draw(3, B)


@pytest.fixture(scope="module")
def play():
    return steer.keys(4, B, F)


@pytest.fixture(scope="module")
def video(worlds, play):
    return steer.paint(worlds, steer.walk(worlds.start, play))


def test_a_seed_is_a_world_and_a_play(worlds, play):
    again = steer.draw(3, B)
    assert all(torch.equal(getattr(worlds, name), getattr(again, name)) for name in vars(worlds))
    assert torch.equal(play, steer.keys(4, B, F)) and not torch.equal(play, steer.keys(5, B, F))
    assert set(play.unique().tolist()) == set(range(5))
    runs = torch.unique_consecutive(play[0], return_counts=True)[1]
    assert int(runs.max()) > 1


def test_keys_move_by_a_place_up_to_the_edge():
    start, play = torch.tensor([[0, 0]]), torch.tensor([[UP, RIGHT, RIGHT, DOWN, NONE, LEFT, UP]])
    assert steer.walk(start, play).tolist() == [[[0, 0], [1, 0], [1, 0], [1, 1], [1, 1], [0, 1], [0, 0]]]
    assert steer.taken(steer.walk(start, play), play).tolist() == [[NONE, RIGHT, NONE, DOWN, NONE, LEFT, UP]]


def test_a_walk_is_taken_back_by_the_opposite_keys(worlds, play):
    places = steer.walk(worlds.start, play)
    back = steer.backwards(steer.taken(places, play))
    assert torch.equal(steer.walk(places[:, -1], back), places.flip(1))
    assert not torch.equal(steer.walk(places[:, -1], steer.backwards(play)), places.flip(1))  # the edges count


def test_shapes_stand_where_they_should(worlds, play, video):
    """The pixels alone say where, for every shape; nothing is cut off at the edges."""
    seen, places = steer.places_seen(video, worlds), steer.walk(worlds.start, play)
    assert float((seen - places).abs().max()) < 0.1 and int(places.abs().max()) == steer.REACH
    assert video.shape == (B, 3, F, 64, 64) and bool(steer.kept(video, worlds).all())
    assert set(worlds.shape.tolist()) == {0, 1} == {SHAPES.index(name) for name in steer.MOVED}
    assert {list(BACKGROUNDS)[index] for index in worlds.background.tolist()} == {"dark", "light"} == set(steer.GROUNDS)


def test_obedience_is_read_from_the_pixels(worlds, play, video):
    assert bool(steer.obedience(video, play, worlds).all())
    frozen = video[:, :, :1].expand_as(video)
    still = steer.obedience(frozen, play, worlds)
    start, moves = worlds.start[:, None], torch.tensor(list(steer.KEYS.values()))[play[:, 1:]]
    right = ((start + moves).clamp(-steer.REACH, steer.REACH) == start).all(-1)  # where no key moves it, at the edge too
    assert torch.equal(still, right) and 0 < int(right.sum()) < right.numel()
    opposite = torch.tensor(steer.OPPOSITE)[play]
    wrong = steer.obedience(steer.paint(worlds, steer.walk(worlds.start, opposite)), play, worlds)
    assert float(wrong.float().mean()) < 0.5
    gone = video.clone()
    gone[:, :, 20] = gone[:, :, 20, :1, :1]
    assert not steer.obedience(gone, play, worlds)[:, 19:21].any()


def test_changed_things_are_not_kept(worlds, video):
    other = steer.Worlds(worlds.shape, (worlds.colour + 1) % 6, worlds.background, worlds.start)
    assert not steer.kept(video, other).any()


def test_actions_are_those_of_live():
    track = steer.track(["none", "left", "up"])
    assert track.length == 3 and track.kind == "action"
    assert [[ACTIONS[i] for i in row.nonzero()[:, 0].tolist()] for row in track.window(0, 3)] == [[], ["left"], ["forward"]]
    with pytest.raises(ForcingError, match="jump cannot be pressed here"):
        steer.track(["jump"])


def test_every_frame_is_a_picture_of_its_own(video):
    """Linear code and VAE write a frame like a video of one frame; the VAE reads what the code wrote."""
    linear = code.of_world()
    latents = live.encode(linear, video[:3, :, :5])
    assert latents.shape == (3, 16, 5, 8, 8)
    assert torch.allclose(latents[1, :, 3], linear.encode(video[1:2, :, 3:4])[0, :, 0], atol=1e-5)
    shown = live_compare.decode(linear, latents)
    assert float((shown - video[:3, :, :5]).square().mean()) < 0.005
    vae = live.PictureVAE(bundle.vae())
    read = vae.decode(latents.transpose(1, 2).flatten(0, 1)).unflatten(0, (3, 5)).transpose(1, 2)
    assert float((read - video[:3, :, :5]).square().mean()) < 0.01
    pictures = video[0].transpose(0, 1)
    assert float((vae.decode(vae.encode(pictures)) - pictures).square().mean()) < 0.01


def test_figures_of_a_perfect_world(monkeypatch):
    """Where the network is the world itself, every figure is the best there is."""
    linear, options = code.of_world(16), live_compare.Options(seconds=6, worlds=2, back=2)
    worlds, pressed = steer.draw(options.seed, 2), steer.keys(options.seed, 2, 48)
    truth = live.encode(linear, steer.paint(worlds, steer.walk(worlds.start, pressed)))
    monkeypatch.setattr(live_compare, "live_rollout", lambda net, track, given, frames, noise, **_: [(None, truth[:, :, 1:])])
    monkeypatch.setattr(live_compare, "returned", lambda *_: 0.0)
    net = type("Net", (), {"config": live.live_config(32, 1)})()
    made = live_compare.play(net, linear, options)
    assert made["obeyed"] == made["kept"] == 1.0 and made["place"] < 0.5 and made["picture"] < 0.05
    assert [second for second, _ in made["curve"]] == [1, 2, 3, 4, 5, 6]
    assert "| 1.000 |" in live_compare.table({"live_cycle": made})[2]
