"""One rollout shared by several processes: equal to one process, and what happens when one of them dies.

Most of it runs with threads that play the processes; what starts real ones (gloo on the CPU) says so.
"""
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core import snapshot
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.noise import BlockNoise
from forcing_pack.forcing_core.parallel import launch as launching
from forcing_pack.forcing_core.parallel.launch import launch
from forcing_pack.forcing_core.parallel.ranks import Ranks, device_of
from forcing_pack.forcing_core.parallel.request import LATENTS, SNAPSHOT, Request
from forcing_pack.forcing_core.parallel.ulysses import HEADWISE, can_spread, fit, spread
from forcing_pack.forcing_core.parallel.work import Rollout
from forcing_pack.forcing_core.plan import layout
from forcing_pack.forcing_core.policies import KINDS, build, replayed_frames
from forcing_pack.forcing_core.policies.bounded import BoundedOptions
from forcing_pack.forcing_core.policies.deep_sink import DeepSinkOptions
from forcing_pack.forcing_core.policies.ema_sink import EmaSinkOptions
from forcing_pack.forcing_core.policies.recency import RecencyOptions
from forcing_pack.forcing_core.policies.recompute import RecomputeOptions
from forcing_pack.forcing_core.policies.reference import ReferenceOptions, with_reference
from forcing_pack.forcing_core.policies.rolling import RollingOptions
from forcing_pack.forcing_core.policies.rolling_sink import RollingSinkOptions
from forcing_pack.forcing_core.policies.routing import RoutingOptions
from forcing_pack.forcing_core.policies.window import WindowOptions
from forcing_pack.forcing_core.rollout import ROLLOUTS, Knot, RolloutState
from forcing_pack.forcing_core.rollout.joining import Joining
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.standalone import make_denoiser
from forcing_pack.forcing_core.wan import WanConfig
from forcing_pack.forcing_core.wan.random import random_network, random_prompt
from forcing_testkit.forcing_corekit import gap
from forcing_testkit.parallelkit import together
from safetensors.torch import load_file

TOLERANCE = 1e-5
CONFIG = WanConfig(dim=128, ffn_dim=128, heads=4, layers=2, in_channels=4, out_channels=4, text_dim=16, text_len=4)
ALONE = Ranks()
SIZE, FRAMES = (4, 8), 18  # 8 tokens a frame
LEVELS = levels([1000, 500], 5.0)

pytestmark = pytest.mark.usefixtures("one_thread")


def memories():
    """name -> options whose videos of FRAMES frames lose some of them."""
    window = WindowOptions(9, 3, positions="relative")
    return {
        "window": window,
        "everything": WindowOptions(None, 0),
        "compact": replace(window, compact=True),
        "jitter": replace(window, jitter=0.5),
        "int8": replace(window, store="int8", dense=3),
        "offload": replace(window, store="fp8", offload=True),
        "rolling": RollingOptions(9, 3),
        "ema_sink": EmaSinkOptions(9, 3, sink_dtype="float32", store="int8"),
        "deep_sink": DeepSinkOptions(9, 6),
        "routing": RoutingOptions(2, 1, 1),
        "routing by token": RoutingOptions(2, 0, 1, group="token", window=12),
        "recency": RecencyOptions(12, 3),
        "recompute": RecomputeOptions(9, weight=0.5),
        "rolling_sink": RollingSinkOptions(9),
        "reference": with_reference(window, 1, 8, 4),
        "uniform": BoundedOptions(3, 3, 6, mode="uniform"),
    }


def denoiser(options, ranks=ALONE, frames=FRAMES, conditions=1, ahead=0):
    prompts = [random_prompt(CONFIG, seed) for seed in range(conditions)]
    made = make_denoiser(random_network(CONFIG, 0), options, frames, SIZE, prompts, 3.0, ahead)
    return spread(made, ranks)


def rollout(made, options, frames=FRAMES, **more):
    """Its generator, with noise that does not depend on who asks."""
    noise = BlockNoise(7, (1, CONFIG.in_channels), SIZE)
    kind = "knot" if isinstance(options, ReferenceOptions) else options.rollout
    if kind == "knot":
        reference = torch.randn(1, CONFIG.in_channels, 1, *SIZE, generator=torch.Generator().manual_seed(3))
        more |= {"knot": Knot(1), "reference": reference}
    window = replayed_frames(build(options, frames))
    return ROLLOUTS[kind](made, layout(frames, 3), LEVELS, noise, window=window, **more)


def video(options, ranks=ALONE, **more):
    made = denoiser(options, ranks, ahead=isinstance(options, ReferenceOptions), **more)
    return torch.cat([x0 for _, x0 in rollout(made, options)], dim=2)


# --- the same numbers as one process

@pytest.mark.parametrize("name", memories())
def test_two_share_a_rollout_under_every_memory(name):
    options = memories()[name]
    alone = video(options)
    for shared in together(2, lambda ranks: video(options, ranks)):
        assert gap(alone, shared) <= TOLERANCE


def test_four_share_a_guided_rollout():
    options = memories()["window"]
    alone = video(options, conditions=2)
    assert gap(alone, video(options)) > 1e-2
    for shared in together(4, lambda ranks: video(options, ranks, conditions=2)):
        assert gap(alone, shared) <= TOLERANCE


def test_clean_and_noisy_passes_in_one_forward():
    """A joined forward drops its clean half in the last layer: other lengths for queries than for keys."""
    options = WindowOptions(None, 0)

    def joining(ranks):
        made = denoiser(options, ranks)
        return torch.cat([x0 for _, x0 in rollout(Joining(made), options)], dim=2), made.forwards

    made, forwards = together(2, joining)[1]
    assert gap(video(options), made) <= TOLERANCE
    assert forwards == len(LEVELS) * FRAMES // 3  # no forward for a clean pass


def test_a_process_holds_its_heads_only():
    options = memories()["window"]

    def held(ranks):
        made = denoiser(options, ranks)
        list(rollout(made, options))
        return made.conditions[0].memory.store.nbytes

    alone, = {held(Ranks())}
    assert together(4, held) == [alone // 4] * 4


# --- who may

def test_every_memory_that_is_allowed_is_tested():
    tested = {next(name for name, (kind, _) in KINDS.items() if type(options) is kind) for options in memories().values()}
    assert tested == {*HEADWISE, "bounded"}


def test_memories_that_look_at_all_heads_are_refused_by_name():
    refused = [name for name, (options, _) in KINDS.items() if name not in HEADWISE]
    assert {"deep_compress", "merging", "memflow", "relax", "bounded"} <= {*refused}
    for name in refused:
        with pytest.raises(ForcingError, match=f"'{name}' chooses by all heads.* --processes 1"):
            can_spread(build(KINDS[name][0](), 60))


def test_shares_that_do_not_come_out_even_are_refused_with_the_number_that_does():
    fit(12, 1560, 4)
    with pytest.raises(ForcingError, match="12 heads and 1560 tokens .* 8 processes. Use --processes 6"):
        fit(12, 1560, 8)
    with pytest.raises(ForcingError, match=r"--processes 2, or a picture .* a multiple of 4\."):
        fit(4, 6, 4)
    with pytest.raises(ForcingError, match="4 heads and 8 tokens"):
        together(3, lambda ranks: denoiser(memories()["window"], ranks))


def test_devices_that_are_not_there():
    with pytest.raises(ForcingError, match="'tpu'. Use cpu or cuda"):
        device_of("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ForcingError, match="PyTorch sees 0. Use --processes 1 or --device cpu"):
            device_of("cuda")


# --- snapshots

IDENTITY = snapshot.Identity("net", {"policy": "test"}, (1, CONFIG.in_channels, *SIZE))


def saved_after(options, blocks, path, ranks):
    """Make so many blocks and save; process 0 writes."""
    made, state = denoiser(options, ranks), RolloutState()
    for block, _ in rollout(made, options, resume=state):
        if block.index + 1 == blocks:
            break
    packed = snapshot.pack(IDENTITY, made, state, seed=7)
    if ranks.rank == 0:
        snapshot.write(path, packed)


def gone_on(options, path, ranks):
    made = denoiser(options, ranks)
    state = snapshot.load(path).resume(IDENTITY, made)
    return torch.cat([x0 for _, x0 in rollout(made, options, resume=state)], dim=2)


@pytest.mark.parametrize("name", ["jitter", "int8", "offload", "rolling", "ema_sink", "rolling_sink", "routing"])
def test_a_snapshot_goes_on_with_any_number_of_processes(name, tmp_path):
    options, path = memories()[name], tmp_path / "s"
    whole = together(2, lambda ranks: video(options, ranks))[0]
    together(2, lambda ranks: saved_after(options, 4, path, ranks))
    assert torch.equal(together(2, lambda ranks: gone_on(options, path, ranks))[1], whole[:, :, 12:])
    for size in (1, 4) if name == "int8" else (1,):
        assert gap(together(size, lambda ranks: gone_on(options, path, ranks))[0], whole[:, :, 12:]) <= TOLERANCE


def test_a_snapshot_of_other_heads_is_refused(tmp_path):
    options, path = memories()["window"], tmp_path / "s"
    together(1, lambda ranks: saved_after(options, 4, path, ranks))

    def wider(ranks):
        made = denoiser(options, ranks)
        made.net.config = replace(CONFIG, heads=8)
        return snapshot.load(path).resume(IDENTITY, made)

    with pytest.raises(ForcingError, match="has the shape"):
        together(2, wider)


# --- real processes

REQUEST = Request(out="", weights="random", frames=15, preset="longlive-infinity", size=(64, 32), every=1,
                  cache={"window": 9, "sink": 3})


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return latents_of(replace(REQUEST, out=str(tmp_path_factory.mktemp("single"))))


def latents_of(request):
    """Made in this process."""
    assert [number for number, _ in Rollout(request, Ranks()).run()][-1] == request.frames // 3
    return load_file(request.folder / LATENTS)["latents"]


def never():
    raise AssertionError("nobody failed")


@pytest.mark.parametrize("size", [2, 4])
def test_gloo_processes_reproduce_one(size, single, tmp_path):
    request = replace(REQUEST, out=str(tmp_path))
    launch([[request]] * size, together=True, advice=never)
    assert single.shape == (1, 16, 15, 4, 8)
    assert gap(single, load_file(tmp_path / LATENTS)["latents"]) <= TOLERANCE


def test_a_killed_process_ends_the_run_and_leaves_a_snapshot_to_go_on_from(single, tmp_path, monkeypatch):
    request, workers = replace(REQUEST, out=str(tmp_path), frames=3000), []
    start = launching._start
    monkeypatch.setattr(launching, "_start", lambda *args: workers.append(start(*args)) or workers[-1])
    killed = []

    def kill():
        while not (tmp_path / SNAPSHOT).is_file():
            time.sleep(0.02)
        os.kill(workers[1].process.pid, signal.SIGKILL)
        killed.append(time.monotonic())

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(ForcingError, match=r"Process 1 of 2 was killed \(SIGKILL\)\. Take the snapshot\."):
        launch([[request]] * 2, together=True, advice=lambda: "Take the snapshot.")
    assert time.monotonic() - killed[0] < 10
    assert all(worker.process.poll() is not None for worker in workers)
    assert not (tmp_path / LATENTS).exists()
    done = snapshot.load(tmp_path / SNAPSHOT).block.index + 1
    frames = max(REQUEST.frames, 3 * (done + 2))
    resumed = Rollout(replace(request, frames=frames, resume=True), Ranks())
    assert [number for number, _ in resumed.run()][0] == done + 1
    (tmp_path / "whole").mkdir()
    whole = latents_of(replace(request, frames=frames, out=str(tmp_path / "whole")))
    assert gap(load_file(tmp_path / LATENTS)["latents"], whole) <= TOLERANCE
    assert gap(whole[:, :, :15], single) <= TOLERANCE
