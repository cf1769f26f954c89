"""Cameras: rays against a direct computation, poses relative to a frame, paths through keyframes, and bad paths."""
import math

import pytest
import torch
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.live import ActionTrack, CameraPath, CameraTrack, LiveConfig, PoseTrack
from forcing_pack.forcing_core.live.camera import MOST_STEP, homogeneous, lens, plucker, relative
from forcing_pack.forcing_core.live.camera_path import (
    EASINGS,
    PRESETS,
    Keyframe,
    draw,
    keyed_path,
    parse_keyframes,
    preset_path,
)
from forcing_pack.forcing_core.live.conditions import ACTIONS, check_track

KEYS = [Keyframe(0, 0.1, -0.2, 0.3, 10, 5, -3), Keyframe(6, 0.5, 0.1, 0.9, 50, -20, 15), Keyframe(11, -0.2, 0.2, 1.4, -5, 8, 0)]


@pytest.fixture
def path():
    return keyed_path(KEYS, 12, field_of_view=70)


def rigid(seed):
    """A random rotation and translation, [4, 4]."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    q = q * torch.sign(r.diagonal())
    q[:, 0] *= torch.sign(torch.linalg.det(q))
    moved = torch.eye(4, dtype=torch.float64)
    moved[:3, :3], moved[:3, 3] = q, 5 * torch.randn(3, generator=generator, dtype=torch.float64)
    return moved


def direct_rays(intrinsics, pose, rows, columns):
    """Pixel by pixel: two points of a ray, carried into the world by the inverse of [R | t]."""
    fx, fy, cx, cy = intrinsics.tolist()
    to_world = torch.linalg.inv(homogeneous(pose[None])[0])
    rays = torch.empty(6, rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            seen = [((column + 0.5) / columns - cx) / fx, ((row + 0.5) / rows - cy) / fy, 1.0, 1.0]
            far = (to_world @ torch.tensor(seen, dtype=torch.float64))[:3]
            eye = to_world[:3, 3]
            d = (far - eye) / math.dist(far.tolist(), eye.tolist())
            x, y, z = eye.tolist()
            a, b, c = d.tolist()
            rays[:, row, column] = torch.tensor([a, b, c, y * c - z * b, z * a - x * c, x * b - y * a], dtype=torch.float64)
    return rays


def test_rays_equal_a_direct_computation(path):
    """At a size that is not square, of a camera that is neither at the origin nor upright."""
    rays = plucker(path.intrinsics, path.poses, (6, 10))
    for frame in (0, 4, 11):
        assert float((rays[frame] - direct_rays(path.intrinsics[frame], path.poses[frame], 6, 10)).abs().max()) <= 1e-6
    assert torch.allclose(rays[:, :3].norm(dim=1), torch.ones(()).double())
    assert float((rays[:, :3] * rays[:, 3:]).sum(1).abs().max()) < 1e-12  # a moment is orthogonal to its ray


def test_any_point_of_a_ray_gives_its_moment(path):
    rays = plucker(path.intrinsics, path.poses, (4, 4))[5]
    point = path.centres[5][:, None, None] + 3.7 * rays[:3]
    assert torch.allclose(torch.linalg.cross(point, rays[:3], dim=0), rays[3:])


@pytest.mark.parametrize("seed", range(3))
def test_a_rigid_motion_of_the_whole_path_changes_nothing(path, seed):
    moved = CameraPath(path.intrinsics, (homogeneous(path.poses) @ rigid(seed))[:, :3])
    assert not torch.allclose(moved.poses, path.poses, atol=0.1)
    assert torch.allclose(relative(moved.poses), relative(path.poses), atol=1e-12)
    for first in (0, 5):
        windows = [CameraTrack(p, (8, 8)).window(first, 6) for p in (path, moved)]
        assert float((windows[0] - windows[1]).abs().max()) <= 1e-6


def test_relative_poses_by_matrices(path):
    """pose * inverse(first pose); the first one becomes the identity."""
    wanted = homogeneous(path.poses) @ torch.linalg.inv(homogeneous(path.poses[:1]))
    assert torch.allclose(homogeneous(relative(path.poses)), wanted, atol=1e-12)
    assert torch.allclose(relative(path.poses)[0], torch.eye(4, dtype=torch.float64)[:3], atol=1e-12)


def test_windows_begin_where_they_are_asked_to(path):
    track = CameraTrack(path, (4, 4))
    assert torch.equal(track.window(3, 5)[:4], track.window(3, 4))
    identity = plucker(lens(1, 70), torch.eye(4, dtype=torch.float64)[None, :3], (4, 4)).float()
    assert torch.allclose(track.window(3, 5)[:1], identity, atol=1e-6)
    assert not torch.allclose(track.window(3, 5)[1:], track.window(0, 8)[4:], atol=1e-2)


def test_keyframes_are_met_and_angles_mean_what_they_say():
    path = keyed_path(KEYS, 12)
    for key in KEYS:
        assert torch.allclose(path.centres[key.frame], torch.tensor([key.x, key.y, key.z], dtype=torch.float64))
    right = keyed_path([Keyframe(0), Keyframe(9, yaw=90)], 10).poses[9, 2, :3]
    up = keyed_path([Keyframe(0), Keyframe(9, pitch=90)], 10).poses[9, 2, :3]
    assert torch.allclose(right, torch.tensor([1.0, 0, 0]).double(), atol=1e-12)
    assert torch.allclose(up, torch.tensor([0, -1.0, 0]).double(), atol=1e-12)
    down = keyed_path([Keyframe(0), Keyframe(9, roll=90)], 10).poses[9, 0, :3]  # x of a camera rolled clockwise points down
    assert torch.allclose(down, torch.tensor([0, 1.0, 0]).double(), atol=1e-12)


def test_easings():
    ways = {name: keyed_path([Keyframe(0), Keyframe(8, z=1)], 9, name).centres[:, 2] for name in EASINGS}
    assert torch.allclose(ways["linear"], torch.arange(9).double() / 8)
    assert float(ways["smooth"][1]) < 1 / 8 and torch.allclose(ways["smooth"] + ways["smooth"].flip(0), torch.ones(9).double())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_where_their_names_say(name):
    path = preset_path(name, 17)
    assert path.length == 17 and torch.allclose(path.centres[0], torch.zeros(3).double())
    end, ahead = path.centres[-1], path.poses[-1, 2, :3]
    moves = {"forward": end[2], "back": -end[2], "left": -end[0], "right": end[0], "up": -end[1], "down": end[1],
             "turn left": -ahead[0], "turn right": ahead[0], "look up": -ahead[1], "look down": ahead[1],
             "orbit left": -end[0], "orbit right": end[0], "roll": path.poses[-1, 0, 1], "still": torch.ones(())}
    assert float(moves[name]) > 0.5
    assert torch.equal(preset_path(name, 1).poses[0], path.poses[0])


def test_an_orbit_looks_at_its_middle():
    path = preset_path("orbit right", 17)
    middle = torch.tensor([0, 0, 1.0, 1.0], dtype=torch.float64)
    seen = path.poses @ middle
    assert torch.allclose(seen, torch.tensor([0, 0, 1.0], dtype=torch.float64).expand(17, 3), atol=1e-12)


def test_text_of_keyframes():
    keys = parse_keyframes("0: 0 0 0\n# a comment\n8: 0, 0, 1, 30 # turn\n", 9)
    assert keys == [Keyframe(0), Keyframe(8, 0, 0, 1, 30)]


@pytest.mark.parametrize("columns", [16, 18, 19])
def test_pose_files(path, columns):
    rows = {16: lambda v: v, 18: lambda v: [*v[:4], 0, 0, *v[4:]], 19: lambda v: [123456, *v[:4], 0, 0, *v[4:]]}
    lines = ["https://example.org/watch?v=x"] * (columns == 19) + [
        " ".join(repr(float(x)) for x in rows[columns](v)) for v in path.vectors().tolist()]
    read = CameraPath.parse("\n".join(lines))
    assert torch.equal(read.poses, path.poses) and torch.equal(read.intrinsics, path.intrinsics)


def test_a_picture_of_a_path(path):
    image = draw(path, 400, 200)
    assert image.shape == (200, 400, 3) and image.dtype == torch.float32 and 0 <= float(image.min()) < float(image.max()) <= 1
    assert not torch.equal(image, draw(preset_path("still", 12), 400, 200))


BAD = {
    "a step": (lambda: preset_path("forward", 9, 100), "Scale the path by 0.0"),
    "a turn": (lambda: preset_path("turn right", 3, 2), "Give the turn more frames"),
    "no move": (lambda: preset_path("sideways", 9), "Use one of forward"),
    "no frames": (lambda: preset_path("forward", 0), "at least 1"),
    "no keyframes": (lambda: keyed_path([], 9), "needs a keyframe"),
    "easing": (lambda: keyed_path(KEYS, 12, "bouncy"), "smooth, linear"),
    "lens": (lambda: lens(4, 200), "1 to 170"),
    "scaled rotation": (lambda: CameraPath(lens(1), 2 * torch.eye(4, dtype=torch.float64)[None, :3]), "orthonormal"),
    "mirror": (lambda: CameraPath(lens(1), torch.diag(torch.tensor([1.0, 1, -1, 1]).double())[None, :3]), "orthonormal"),
    "shape": (lambda: CameraPath(lens(3), torch.eye(4, dtype=torch.float64)[None, :3]), "for every frame"),
    "NaN": (lambda: CameraPath(lens(1), torch.full((1, 3, 4), math.nan).double()), "finite pose"),
    "focal length": (lambda: CameraPath(-lens(1), torch.eye(4, dtype=torch.float64)[None, :3]), "focal length"),
    "text of poses": (lambda: CameraPath.parse("1 2 3\n4 5 6"), "16, 18 or 19 numbers"),
    "keyframe": (lambda: parse_keyframes("0: 1 2", 9), "x y z yaw"),
    "keyframe order": (lambda: parse_keyframes("4: 0 0 0\n2: 0 0 0", 9), "in the order"),
    "keyframe behind the end": (lambda: parse_keyframes("9: 0 0 0", 9), "Use 0 to 8"),
    "no frame number": (lambda: parse_keyframes("start: 0 0 0", 9), "does not begin with a frame"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_paths_are_refused_with_a_fix(name):
    make, fix = BAD[name]
    with pytest.raises(ForcingError, match=fix):
        make()


def test_the_named_scale_is_enough():
    with pytest.raises(ForcingError) as error:
        preset_path("forward", 9, 100)
    scale = float(str(error.value).split("Scale the path by ")[1].split()[0])
    assert preset_path("forward", 9, 100 * scale * 0.97).length == 9 and MOST_STEP == 0.5


def test_actions():
    track = ActionTrack.parse("0: forward\n2: forward jump cameraX=-0.5\n4:", 6)
    rows = track.window(1, 4)
    assert rows.shape == (4, 25) and rows[0].nonzero().flatten().tolist() == [ACTIONS.index("forward")]
    assert float(rows[1, ACTIONS.index("cameraX")]) == -0.5 and float(rows[2, ACTIONS.index("jump")]) == 1
    assert not rows[3].any()


@pytest.mark.parametrize(("make", "fix"), [
    (lambda: ActionTrack.parse("0: fly", 4), "Use one of inventory"),
    (lambda: ActionTrack.parse("0: cameraX=fast", 4), "no number"),
    (lambda: ActionTrack.parse("0: cameraX=3", 4), "between -1 and 1"),
    (lambda: ActionTrack(torch.zeros(4, 24)), "25 numbers a frame"),
    (lambda: ActionTrack(torch.full((4, 25), math.nan)), "between -1 and 1")])
def test_actions_outside_the_trained_set_are_refused(make, fix):
    with pytest.raises(ForcingError, match=fix):
        make()


def test_tracks_that_do_not_fit_are_refused(path):
    with pytest.raises(ForcingError, match="Make the track 20 frames long"):
        check_track(CameraTrack(path, (16, 16)), LiveConfig(), 20)
    with pytest.raises(ForcingError, match="Connect a track of the kind camera"):
        check_track(ActionTrack(torch.zeros(12, 25)), LiveConfig(), 12)
    with pytest.raises(ForcingError, match="kind camera, not pose"):
        check_track(PoseTrack(path), LiveConfig(), 12)
    check_track(CameraTrack(path, (16, 16)), LiveConfig(), 12)
