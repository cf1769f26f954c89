"""A rollout that was saved and gone on with equals one that was not; what is no such snapshot is refused."""
import json
import random
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core import files, snapshot, snapshot_file
from forcing_pack.forcing_core.denoiser import Condition, NetworkDenoiser
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.memory import make_memory
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import (
    KINDS,
    BoundedOptions,
    DeepCompressOptions,
    DeepSinkOptions,
    EmaSinkOptions,
    MemFlowOptions,
    MergingOptions,
    PerStepOptions,
    RecencyOptions,
    RecomputeOptions,
    ReferenceOptions,
    RelaxOptions,
    RollingOptions,
    RollingSinkOptions,
    RoutingOptions,
    WindowOptions,
    build,
)
from forcing_pack.forcing_core.rollout import ROLLOUTS, RolloutState, Switch
from forcing_pack.forcing_core.saved import split
from forcing_pack.forcing_core.schedule import levels
from forcing_testkit import forcing_corekit as core
from forcing_testkit.policykit import GRID, SIZE, network
from safetensors import safe_open

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = levels([1000, 500], 5.0)
FRAMES, HALF = 16, 4  # eight blocks of two
WINDOW = WindowOptions(6, 2, 2, "relative")
OPTIONS = {
    "window": WindowOptions(6, 2, 2),
    "window, everything": WindowOptions(block=2),
    "window, relative": WINDOW,
    "window, compact": replace(WINDOW, compact=True),
    "window, rebased": WindowOptions(6, 2, 2, "rebased", 7),
    "window, int8": replace(WINDOW, store="int8"),
    "window, fp8, dense": replace(WINDOW, store="fp8", dense=3),
    "window, offload": replace(WINDOW, offload=True),
    "window, int8, dense, offload": replace(WINDOW, store="int8", dense=2, offload=True),
    "rolling": RollingOptions(8, 2, 2),
    "rolling, rebased": RollingOptions(8, 2, 2, "rebased", 8),
    "ema_sink": EmaSinkOptions(6, 2, 2, alpha=0.5),
    "ema_sink, float32, int8": EmaSinkOptions(6, 2, 2, alpha=0.9, sink_dtype="float32", store="int8"),
    "deep_sink": DeepSinkOptions(8, 4, 2, store="fp8"),
    "deep_sink, rebased": DeepSinkOptions(6, 2, 2, positions="rebased", limit=8),
    "deep_compress": DeepCompressOptions(6, 1, 2, budget=5, recent=2, reuse_cap=2),
    "deep_compress, aligned": DeepCompressOptions(6, 1, 2, budget=5, recent=2, aligned=True, compact=True),
    "deep_compress, short": DeepCompressOptions(16, 1, 2, budget=5, recent=2),
    "bounded": BoundedOptions(2, 3, 2, 2, tau=1.1),
    "bounded, released": BoundedOptions(2, 3, 2, 2, tau=0.99, released=True),
    "routing": RoutingOptions(top_k=1, sink=1, recent=1, block=2),
    "routing, window": RoutingOptions(top_k=1, sink=1, recent=1, block=2, window=6),
    "merging": MergingOptions(tau=0.7, recent=1, block=2, budget=2),
    "recency": RecencyOptions(6, 1, 1, 2),
    "recompute": RecomputeOptions(5, 2, weight=0.3),
    "rolling_sink": RollingSinkOptions(6, 2),
    "reference": ReferenceOptions(6, 2, 2, "rebased", 7),
    "relax": RelaxOptions(1, 1, 1, 2, 7, block=2),
    "relax, int8, offload": RelaxOptions(1, 1, 1, 2, 7, block=2, store="int8", offload=True),
    "memflow": MemFlowOptions(6, 1, 2),
    "memflow, active, int8": MemFlowOptions(7, 2, 2, active=1, store="int8"),
    "per_step": PerStepOptions(6, 2, 2, steps=2),
    "per_step, int8, offload": PerStepOptions(6, 2, 2, steps=2, store="int8", offload=True),
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def denoiser(options, frames=FRAMES, *, batch=1, texts=(0,), prompts=1):
    """With an empty memory for each of `texts`, which are numbers of lists of prompts."""
    net = network()

    def condition(text):
        memory = make_memory(options, frames, layers=net.config.layers, grid=GRID, head_dim=core.HEAD_DIM, device="cpu")
        return Condition([core.prompts(batch, 10 * text + i) for i in range(prompts)], memory)

    return NetworkDenoiser(net, [condition(text) for text in texts], 1.5)


def blocks(options, target, state=None, *, frames=FRAMES, stop=FRAMES, seed=5, batch=1, switches=(), given=None):
    """Latents of the blocks up to latent frame `stop`, made one after the other as a rollout is asked for them."""
    made, before = [], 0 if given is None else given.shape[2]
    rollout = ROLLOUTS[options.rollout](
        target, layout(frames - before, options.block, given=before), LEVELS, BlockNoise(seed, (batch, core.CHANNELS), SIZE),
        block=options.block, window=build(options, frames).capacity, switches=switches, context=given, resume=state)
    for block, x0 in rollout:
        made.append(x0)
        if block.end >= stop:
            break
    return torch.cat(made, dim=2)


def identity(options, batch=1, model="tiny"):
    return snapshot.Identity(model, snapshot.settings(options), (batch, core.CHANNELS, *SIZE))


def saved(path, options, *, at=HALF, batch=1, texts=(0,), prompts=1, **more):
    """Write a snapshot after `at` blocks; returns the latents until then."""
    target, state = denoiser(options, more.get("frames", FRAMES), batch=batch, texts=texts, prompts=prompts), RolloutState()
    latents = blocks(options, target, state, stop=at * options.block, batch=batch, **more)
    snapshot.save(path, identity(options, batch), target, state, seed=5, latents=latents)
    return latents


def resumed(path, options, *, batch=1, texts=(0,), prompts=1, **more):
    """The latents behind it, made by objects that know only the file."""
    target = denoiser(options, more.get("frames", FRAMES), batch=batch, texts=texts, prompts=prompts)
    state = snapshot.load(path).resume(identity(options, batch), target)
    return blocks(options, target, state, batch=batch, **more)


def both(path, options, *, at=HALF, **more):
    """(latents with a stop in the middle, latents without)"""
    parts = [saved(path, options, at=at, **more), resumed(path, options, **more)]
    kept = {name: more.pop(name) for name in ("batch", "texts", "prompts") if name in more}
    whole = blocks(options, denoiser(options, more.get("frames", FRAMES), **kept), batch=kept.get("batch", 1), **more)
    return torch.cat(parts, dim=2), whole


def test_every_kind_of_memory_is_tested():
    assert {type(options) for options in OPTIONS.values()} == {kind for kind, _ in KINDS.values()}


@by_options
def test_resumed_equals_uninterrupted(options, tmp_path):
    """Bit for bit, and the memory is at work by then: without it the second half would be another."""
    joined, whole = both(tmp_path / "a", options)
    assert torch.equal(joined, whole)
    target = denoiser(options)
    state = snapshot.load(tmp_path / "a").resume(identity(options), target)
    for condition in target.conditions:
        condition.memory.forget()
    state.in_work = {block: torch.zeros_like(x) for block, x in state.in_work.items()}
    state.first = None if state.first is None else torch.zeros_like(state.first)
    assert not torch.equal(blocks(options, target, state), whole[:, :, HALF * options.block:])


@pytest.mark.parametrize("name", ["deep_compress", "ema_sink", "bounded", "rolling", "rolling_sink", "merging"])
def test_a_snapshot_can_be_taken_anywhere_and_more_than_once(name, tmp_path):
    """After every block, by one rollout that goes on: neither the place nor the taking changes anything."""
    options = OPTIONS[name]
    target, state, made = denoiser(options), RolloutState(), []
    rollout = ROLLOUTS[options.rollout](target, layout(FRAMES, 2), LEVELS, BlockNoise(5, (1, core.CHANNELS), SIZE), block=2,
                                        window=build(options, FRAMES).capacity, resume=state)
    for block, x0 in rollout:
        made.append(x0)
        snapshot.save(tmp_path / str(block.index), identity(options), target, state, seed=5)
    whole = torch.cat(made, dim=2)
    assert torch.equal(whole, blocks(options, denoiser(options)))
    for at in (0, 2, 6):
        assert torch.equal(resumed(tmp_path / str(at), options), whole[:, :, 2 * at + 2:])


@pytest.mark.parametrize("name", ["window, relative", "deep_compress", "bounded", "merging", "rolling"])
def test_batches_and_guidance(name, tmp_path):
    """Two samples that remember different things, under two conditions with memories of their own."""
    joined, whole = both(tmp_path / "a", OPTIONS[name], batch=2, texts=(0, 1))
    assert torch.equal(joined, whole) and not torch.equal(whole[:1], whole[1:])


def test_given_frames_are_not_written_twice(tmp_path):
    given = core.latents(2)
    joined, whole = both(tmp_path / "a", WINDOW, given=given)
    assert torch.equal(joined, whole)


@pytest.mark.parametrize("transition", ["recache", "keep", "soft", "flush", "jump", "cut"])
@pytest.mark.parametrize("place", [6, 8, 12])
def test_changes_of_prompt_before_at_and_after_the_snapshot(transition, place, tmp_path):
    """Guards the text that rules, what is left of the track, and the latents that a later recache replays."""
    switches = (Switch(place, 1, transition=transition, previous=0, weight=0.4), Switch(14, 0))
    joined, whole = both(tmp_path / "a", WINDOW, switches=switches, prompts=2)
    assert torch.equal(joined, whole)
    assert not torch.equal(joined, blocks(WINDOW, denoiser(WINDOW)))


@pytest.mark.parametrize("place, transition", [(6, "recache"), (8, "keep"), (12, "keep")])
def test_a_bank_is_chosen_once_for_a_prompt(place, transition, tmp_path):
    """What was chosen before the snapshot is saved, and not chosen again when its prompt is brought back."""
    options, switches = OPTIONS["memflow"], (Switch(place, 1, transition=transition),)
    joined, whole = both(tmp_path / "a", options, switches=switches, prompts=2, batch=2)
    assert torch.equal(joined, whole)
    other = blocks(WINDOW, denoiser(WINDOW, prompts=2, batch=2), switches=switches, batch=2)  # nothing is chosen
    assert torch.equal(whole[:, :, :place], other[:, :, :place]) and not torch.equal(whole[:, :, place:], other[:, :, place:])


@pytest.mark.parametrize("name", ["rolling", "recompute"])
def test_changes_of_prompt_in_other_rollouts(name, tmp_path):
    for place in (6, 8, 10, 12):
        joined, whole = both(tmp_path / "a", OPTIONS[name], switches=(Switch(place, 1, transition="keep"),), prompts=2)
        assert torch.equal(joined, whole)


def test_a_branch_shares_the_past_and_not_the_future(tmp_path):
    before = saved(tmp_path / "a", WINDOW)
    same, other = resumed(tmp_path / "a", WINDOW), resumed(tmp_path / "a", WINDOW, seed=6)
    prompt = resumed(tmp_path / "a", WINDOW, texts=(3,))
    recached = resumed(tmp_path / "a", WINDOW, prompts=2, switches=(Switch(8, 1),))
    assert same.shape == other.shape
    assert not any(torch.equal(same[:, :, :2], branch[:, :, :2]) for branch in (other, prompt, recached))
    file = snapshot.load(tmp_path / "a")
    assert torch.equal(file.latents(identity(WINDOW), 8), before) and (file.seed, file.block.end) == (5, 8)


@pytest.mark.parametrize("name", ["window", "window, everything", "window, relative", "ema_sink", "routing", "deep_sink",
                                  "recompute", "merging"])
def test_a_video_may_become_longer(name, tmp_path):
    """Than it was meant to be when the snapshot was taken, after its last block."""
    options = OPTIONS[name]
    before = saved(tmp_path / "a", options, at=5, frames=10)
    whole = blocks(options, denoiser(options))
    assert torch.equal(torch.cat([before, resumed(tmp_path / "a", options)], dim=2), whole)


@pytest.mark.parametrize("name", ["deep_compress", "window, relative", "rolling"])
def test_a_length_that_needs_another_memory_is_refused(name, tmp_path):
    """The first two fit into the window, so nothing was kept that would move; the third had begun to end."""
    options = OPTIONS[name]
    saved(tmp_path / "a", options, at=3, frames=6)
    with pytest.raises(ForcingError, match="Videos of other lengths|from before its last 2 blocks"):
        resumed(tmp_path / "a", options)


def test_other_block_grids_and_finished_videos(tmp_path):
    saved(tmp_path / "a", WINDOW)
    target = denoiser(WINDOW)
    state = snapshot.load(tmp_path / "a").resume(identity(WINDOW), target)
    with pytest.raises(ForcingError, match="ends with latent frames 6-7, where this video has a block of 9-11"):
        list(state.left(layout(12, 3)))
    assert [b.index for b in state.left(layout(10, 2))] == [4] and list(state.left(layout(6, 2))) == []


def refused(path, match, who=None, target=None):
    with pytest.raises(ForcingError, match=match):
        snapshot.load(path).resume(who or identity(WINDOW), target or denoiser(WINDOW))


def test_what_does_not_fit_is_named(tmp_path):
    path = tmp_path / "a"
    saved(path, WINDOW)
    refused(path, "another model", identity(WINDOW, model="other"))
    refused(path, r"size \[1, 4, 4, 6\], but this run has \[2, 4, 4, 6\]", identity(WINDOW, batch=2))
    refused(path, "window 6, but this run has 8", identity(replace(WINDOW, window=8)))
    refused(path, "policy 'Window', but this run has 'EmaSink'", identity(OPTIONS["ema_sink"]))
    refused(path, "store 'model', but this run has 'int8'", identity(replace(WINDOW, store="int8")))
    refused(path, "1 conditions, this run has 2", target=denoiser(WINDOW, texts=(0, 1)))
    refused(path, "instead of torch.bfloat16", target=replace(denoiser(WINDOW), dtype=torch.bfloat16))
    refused(path, "instead of", target=denoiser(WINDOW, batch=2))
    refused(tmp_path / "b", "There is no snapshot b")
    refused(tmp_path, "was not read")


def test_offloading_can_be_changed(tmp_path):
    """It changes where numbers lie, not what they are."""
    before = saved(tmp_path / "a", OPTIONS["window, offload"])
    assert torch.equal(torch.cat([before, resumed(tmp_path / "a", WINDOW)], dim=2), blocks(WINDOW, denoiser(WINDOW)))


def test_fingerprints_see_names_shapes_types_and_values():
    net = dict(network().named_parameters())
    name, weight = next(iter(net.items()))
    prints = [snapshot.fingerprint(net.items()), snapshot.fingerprint([*net.items()][::-1])]
    assert prints[0] == prints[1]
    for other in (weight + 1, weight.double(), weight.to(torch.float8_e4m3fn), weight[:1]):
        prints.append(snapshot.fingerprint({**net, name: other}.items()))
    assert len({*prints}) == 5


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file of a few kilobytes, its options and a check: what load and resume make of it, or None for a refusal."""
    path, options = tmp_path_factory.mktemp("small") / "a", WindowOptions(2, 0, 1, "relative")
    saved(path, options, frames=4, at=3)
    target = denoiser(options, 4)

    def outcome():
        try:
            return snapshot.load(path).resume(identity(options), target)
        except ForcingError as error:
            assert str(error).endswith(".")
            return None

    return path, outcome


def test_cut_files_are_refused(small):
    path, outcome = small
    whole = path.read_bytes()
    places = [*range(0, 20), *random.Random(0).sample(range(20, len(whole)), 179), len(whole) - 1]
    for place in places:
        path.write_bytes(whole[:place])
        assert outcome() is None
    path.write_bytes(whole + b"\0")
    assert outcome() is None
    path.write_bytes(whole)
    assert outcome() is not None and len(places) == 200


def test_changed_bytes_are_refused(small):
    """Half of them in the header, which is read before the checksum can be."""
    path, outcome = small
    whole, draw = path.read_bytes(), random.Random(1)
    header = 8 + int.from_bytes(whole[:8], "little")
    with open(path, "r+b", buffering=0) as file:
        for turn in range(2000):
            place = draw.randrange(header if turn % 2 else len(whole))
            for byte in (whole[place] ^ draw.randrange(1, 256), whole[place]):
                file.seek(place)
                file.write(bytes([byte]))
                if byte != whole[place]:
                    assert outcome() is None, place
    assert outcome() is not None


HEADERS = {
    "empty": b"", "no JSON": b"{", "list": b"[]", "number": b"1", "deep": b"[" * 100_000, "no text": b"{}", "null": b"null",
    "text only": json.dumps({"__metadata__": {snapshot_file.KEY: "{}"}}).encode(),
    "wrong text": json.dumps({"__metadata__": {snapshot_file.KEY: 3}}).encode(),
    "wrong entry": json.dumps({"__metadata__": {snapshot_file.KEY: ""}, "checksum": 3}).encode(),
    "not UTF-8": b"\xff\xfe{}",
    "huge": json.dumps({"__metadata__": {snapshot_file.KEY: "{}"}, "a": {"dtype": "F32", "shape": [1 << 60],
                                                                        "data_offsets": [0, 1 << 62]},
                        "checksum": {"dtype": "U8", "shape": [32], "data_offsets": [1 << 62, (1 << 62) + 32]}}).encode(),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_others_are_refused(name, tmp_path):
    path, header = tmp_path / "a", HEADERS[name]
    for length in (len(header), 1 << 63, snapshot_file.LONGEST_HEADER + 1, 0):
        path.write_bytes(length.to_bytes(8, "little") + header + bytes(64))
        refused(path, "no snapshot, or was cut or changed")


JUNK = (None, -1, 1 << 70, "x", [], {}, True, 1.5, [[1, 2], [1, 2]], [[3, 99]], float("nan"))


def leaves(tree, path=()):
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))


@pytest.mark.parametrize("name", ["window, int8", "deep_compress", "bounded", "merging", "rolling", "ema_sink, float32, int8",
                                  "recompute", "rolling_sink", "routing", "deep_sink"])
def test_what_contradicts_itself_is_refused_or_fits(name, tmp_path):
    """Files with a right checksum and wrong content: nothing but ForcingError ever comes out of them."""
    path, options, draw = tmp_path / "a", OPTIONS[name], random.Random(2)
    saved(path, options)
    text, tensors = snapshot_file.read(path)
    plain = json.loads(text)
    places, refusals = [*leaves(plain)], 0
    for turn in range(60):
        changed, wrong = json.loads(text), dict(tensors)
        if turn % 2:
            victim = draw.choice(sorted(wrong))
            t = wrong[victim]
            wrong[victim] = draw.choice([t.flatten(), t[:1, :1], t.double(), t.to(torch.uint8), torch.full_like(t, 100),
                                         t.float().fill_(torch.nan)]).contiguous()
        else:
            *way, last = draw.choice(places)
            part = changed
            for step in way:
                part = part[step]
            part[last] = draw.choice(JUNK)
        snapshot_file.write(path, json.dumps(changed), wrong)
        try:
            snapshot.load(path).resume(identity(options), denoiser(options))
        except ForcingError:
            refusals += 1
    assert refusals > 20


def test_not_a_number_is_refused(tmp_path):
    path = tmp_path / "a"
    for name in ("window", "window, fp8, dense"):
        saved(path, OPTIONS[name])
        text, tensors = snapshot_file.read(path)
        victim = next(n for n in tensors if n.startswith("memories/0/store/layer 1"))
        tensors[victim].view(-1)[-1] = torch.nan
        snapshot_file.write(path, text, tensors)
        refused(path, "holds NaN", identity(OPTIONS[name]), denoiser(OPTIONS[name]))


def test_another_version_is_refused(tmp_path):
    path = tmp_path / "a"
    saved(path, WINDOW)
    text, tensors = snapshot_file.read(path)
    snapshot_file.write(path, json.dumps(json.loads(text) | {"version": 2}), tensors)
    refused(path, "version 2, but this run has 1")


def test_the_file_is_plain_safetensors(tmp_path):
    saved(tmp_path / "a", OPTIONS["window, fp8, dense"])
    text, tensors = snapshot_file.read(tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {snapshot_file.KEY: text}
        assert sorted(file.keys()) == sorted([*tensors, "checksum"])
        assert all(torch.equal(file.get_tensor(n).view(torch.uint8), t.view(torch.uint8)) for n, t in tensors.items())
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.float8_e4m3fn}


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    saved(path, WINDOW)
    before, real, count = path.read_bytes(), snapshot_file._bytes_of, iter(range(99))

    def failing(t):
        if next(count) == 5:
            raise OSError(28, "No space left on device")
        return real(t)

    monkeypatch.setattr(snapshot_file, "_bytes_of", failing)
    with pytest.raises(ForcingError, match="No space left on device. Check the folder"):
        saved(path, WINDOW)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failure_while_replacing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    saved(path, WINDOW)
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ForcingError, match="Permission denied"):
        saved(path, WINDOW, at=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_copy_stays_what_it_was_while_the_rollout_goes_on(tmp_path):
    """What is written when a run is stopped is of the last block that was done, not of the one in work."""
    target, state = denoiser(WINDOW), RolloutState()
    blocks(WINDOW, target, state, stop=8)
    packed = snapshot.pack(identity(WINDOW), target, state, seed=5, copy=True)
    whole = blocks(WINDOW, denoiser(WINDOW))
    blocks(WINDOW, target, state, stop=12)
    then, now = split(packed["memories"])[1], split(target.state())[1]
    assert not torch.equal(then["0/store/layer 0/0"], now["0/store/layer 0/0"])
    snapshot.write(tmp_path / "a", packed)
    assert torch.equal(resumed(tmp_path / "a", WINDOW), whole[:, :, 8:])
