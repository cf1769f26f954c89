"""Files and texts that nobody vouches for: every one is read, or refused with a ForcingError. Nothing hangs, nothing else is
raised, nothing is written. FORCING_FUZZ sets the number of examples (10000 for a long run)."""
import json
import os
import struct

import pytest
import torch
from forcing_pack.forcing_core import snapshot, snapshot_file
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import DeepCompressOptions, WindowOptions
from forcing_pack.forcing_core.rollout import RolloutState, block_rollout
from forcing_pack.forcing_core.saved import Saved
from forcing_pack.forcing_core.steering import read_log, write_log
from forcing_pack.forcing_core.streaming.recorder import saved_log
from forcing_pack.forcing_core.track_files import read_track
from forcing_testkit import forcing_corekit as core
from forcing_testkit.policykit import LEVELS, SIZE, empty, network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = int(os.environ.get("FORCING_FUZZ", 300))
fuzz = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([1 << 70, -1, 1e308])
JSON = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
                    max_leaves=12)
ENTRY = st.fixed_dictionaries({}, optional={
    "number": st.integers(-1, 9) | LEAF, "block": st.integers(-1, 9) | LEAF, "at_frame": st.integers(-1, 99) | LEAF,
    "kind": st.sampled_from(["prompt", "seed", "lora", "pause", "resume", "stop"]) | LEAF, "text": st.text(max_size=9) | LEAF,
    "transition": st.sampled_from(["cut", "soft"]) | LEAF, "blocks": st.integers(0, 9) | LEAF, "seed": st.integers() | LEAF,
    "strength": st.floats() | LEAF, "name": LEAF, "client": LEAF})
WORDS = ["0", "5", "0:10", "40f", "soft 4", "cut", "a fox", "", "1e9", "-1", "nan", "0:99999999999", "١", "soft 9999999999999"]
LINE = st.builds(" | ".join, st.lists(st.sampled_from(WORDS) | st.text(max_size=9), min_size=1, max_size=4))
OPTIONS = {"window": WindowOptions(6, 2, 2, "relative"), "deep_compress": DeepCompressOptions(6, 1, 2, budget=5, recent=2)}


@fuzz
@given(st.lists(ENTRY, max_size=4).map(json.dumps) | JSON.map(json.dumps) | st.text(max_size=60))
def test_logs(text):
    try:
        entries = read_log(text)
    except ForcingError as error:
        assert str(error)
        return
    assert read_log(write_log(entries)) == entries
    assert saved_log(Saved({"log": [entry.plain() for entry in entries]}, {}), 1 << 50) == entries


@fuzz
@given(st.lists(LINE, max_size=5).map("\n".join) | st.text(max_size=80) | JSON.map(json.dumps))
def test_scripts_of_prompts(text):
    try:
        track = read_track(text, "recache", 4)
    except ForcingError as error:
        assert str(error)
        return
    assert track.segments and track.segments[0].seconds == 0


def denoiser(options):
    return NetworkDenoiser(network(), [Condition([core.prompts()], empty(options, 16))])


def identity(options):
    return snapshot.Identity("tiny", snapshot.settings(options), (1, core.CHANNELS, *SIZE))


@pytest.fixture(scope="module", params=OPTIONS.values(), ids=list(OPTIONS))
def saved(request, tmp_path_factory):
    """(options, path, bytes) of a good snapshot."""
    target, state = denoiser(request.param), RolloutState()
    for block, _ in block_rollout(target, layout(16, 2), LEVELS, BlockNoise(5, (1, core.CHANNELS), SIZE), block=2, window=6,
                                  resume=state):
        if block.index == 4:
            break
    path = tmp_path_factory.mktemp("saved") / "a"
    snapshot.save(path, identity(request.param), target, state, seed=5)
    return request.param, path, path.read_bytes()


def taken_up(options, path):
    """Whether a file was taken; refused ones say why."""
    try:
        snapshot.load(path).resume(identity(options), denoiser(options))
    except ForcingError as error:
        assert str(error)
        return False
    return True


@fuzz
@given(st.data())
def test_damaged_snapshot_files(saved, tmp_path_factory, data):
    """Bytes that are other ones, missing, or too many: the checksum says so."""
    options, path, good = saved
    at = data.draw(st.integers(0, len(good)) | st.integers(0, 400))
    more = data.draw(st.binary(max_size=12))
    bad = data.draw(st.sampled_from([good[:at], good[:at] + more + good[at + len(more):], good[:at] + more + good[at:], more]))
    place = path.with_name("bad")
    place.write_bytes(bad)
    assert taken_up(options, place) == (bad == good)
    assert sorted(p.name for p in path.parent.iterdir()) == ["a", "bad"]


def places(tree, path=()):
    yield path
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*path, key))


@fuzz
@given(st.data())
def test_snapshots_that_say_something_else(saved, data):
    """Well-formed files with a good checksum, whose contents are not ours."""
    options, path, _ = saved
    text, tensors = snapshot_file.read(path)
    tree = json.loads(text)
    where = data.draw(st.sampled_from([p for p in places(tree) if p]))
    part = tree
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = data.draw(JSON)
    if tensors and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(tensors)))
        shape = data.draw(st.lists(st.integers(1, 3), max_size=5))
        tensors[name] = torch.full(shape, data.draw(st.sampled_from([0.0, float("nan"), 3e38])))
    place = path.with_name("bad")
    snapshot_file.write(place, json.dumps(tree), tensors)
    taken_up(options, place)


def test_a_header_cannot_ask_for_memory(saved, tmp_path):
    options, _, good = saved
    for length in (1 << 62, (1 << 64) - 1, len(good)):
        (tmp_path / "a").write_bytes(struct.pack("<Q", length) + good[8:])
        assert not taken_up(options, tmp_path / "a")
