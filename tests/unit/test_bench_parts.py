"""A rollout taken apart: its parts, what they must do at least, and the memory told beforehand."""
import json
from argparse import ArgumentParser
from dataclasses import replace

import pytest
import torch
from forcing_pack.forcing_core.bench import Case, Setup, measure
from forcing_pack.forcing_core.bench import budget as budgets
from forcing_pack.forcing_core.bench.clock import clock
from forcing_pack.forcing_core.bench.parts import INSIDE, Meter, Parts, Rates, metering, rates
from forcing_pack.forcing_core.bench.plot import picture
from forcing_pack.forcing_core.bench.timing import record
from forcing_pack.forcing_core.cli import bench as command
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.kernels import PLAIN, table
from forcing_pack.forcing_core.presets import get, runnable
from forcing_pack.forcing_core.wan import TextState, WanConfig
from forcing_pack.forcing_core.wan.random import random_network, random_prompt
from forcing_testkit.forcing_corekit import gap

TINY = WanConfig(dim=128, ffn_dim=32, heads=1, layers=2, text_dim=8, text_len=4, freq_dim=32)
SETUP = Setup(get("longlive"), TINY, (32, 16))  # 2 tokens a frame
RATES = Rates(1e9, 1e8)

pytestmark = pytest.mark.usefixtures("one_thread")


def taken_apart(setup, frames=9, window=None):
    [timing] = measure(setup, [Case(frames, window)], 1, parts=1)
    return timing, timing.parts


def test_parts_add_up():
    decoded = []
    setup = replace(SETUP, decoder=lambda: lambda x0: decoded.append(x0.shape[2]))
    timing, parts = taken_apart(setup)
    assert sum(parts.seconds.values()) == pytest.approx(parts.total, abs=1e-6)
    assert all(parts.seconds[part] > 0 for part in (*INSIDE, "elementwise", "solver", "decode"))
    assert {phase: number for phase, (number, _) in parts.passes.items()} == {"noisy": 12, "clean": 2}
    assert decoded == [3, 3, 3] and len(timing.block_seconds) == 3


def test_joined_passes_do_the_same_work_in_fewer_forwards():
    _, apart = taken_apart(SETUP)
    _, joined = taken_apart(replace(SETUP, joined=True))
    assert {phase: number for phase, (number, _) in joined.passes.items()} == {"noisy": 10, "joined": 2}
    embedded = 2 * 3 * (32 * 128 + 128 * 128 + 6 * 128 * 128)  # the first level of three frames, once more behind clean ones
    assert joined.operations - apart.operations == embedded and joined.bytes < apart.bytes  # weights are read less often


def test_operations_by_hand():
    """One noisy pass of 3 frames over an empty memory, 6 tokens, 4 rows of text, heads and layers as above."""
    _, parts = taken_apart(replace(SETUP, preset=replace(SETUP.preset, steps=(1000,), window=None, sink=0)), 3)
    n, d, rows, frames = 6, 128, 4, 3
    layer = 2 * n * d * (6 * d + 2 * 32) + 2 * rows * d * 2 * d + 4 * n * n * d + 4 * n * rows * d
    around = 2 * n * d * 64 * 2 + 2 * rows * (8 * d + d * d) + 2 * frames * (32 * d + d * d + 6 * d * d)
    assert parts.operations == 2 * layer + around


@pytest.mark.parametrize("joined", [False, True])
def test_kernels_of_a_cpu_do_the_operations_of_the_modules(monkeypatch, joined):
    """And are taken for what they are: every linear layer is counted once, whoever runs it."""
    setup, apart = replace(SETUP, joined=joined), []
    for there in (True, False):
        monkeypatch.setitem(table.THERE, "cpu", ("cpu", lambda there=there: there))
        apart.append(taken_apart(setup)[1])
    assert apart[0].operations == apart[1].operations and apart[0].bytes == apart[1].bytes
    assert all(parts.seconds["matmul"] > 0 for parts in apart)


def test_floors_and_rates():
    parts = Parts({}, {}, 1.0, 3 * 10 ** 9, 2 * 10 ** 8)
    assert parts.floors(RATES) == {"operations": 3.0, "bytes": 2.0}
    found = rates("cpu", torch.float32, "process")
    assert found.operations > 1e8 and found.bytes > 1e7


def test_a_meter_leaves_nothing_behind():
    net, meter = random_network(TINY, 0), Meter(clock("cpu"))
    with metering(net, meter, PLAIN):
        TextState(random_prompt(TINY, 0)).embedded(net.text_embedding)
    assert len(meter.spans["matmul"]) == 2
    TextState(random_prompt(TINY, 0)).embedded(net.text_embedding)
    assert len(meter.spans["matmul"]) == 2


def test_the_processors_own_time_and_unknown_clocks():
    [found] = measure(replace(SETUP, clock="process"), [Case(6, None)], 1)
    assert found.seconds > 0
    with pytest.raises(ForcingError, match="clock 'sun' is not known"):
        measure(replace(SETUP, clock="sun"), [Case(6, None)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_budget_is_exact(dtype):
    setup = replace(SETUP, dtype=dtype)
    told, net = budgets.budget(setup, Case(12, 9)), random_network(TINY, 0, dtype=dtype)
    [found] = measure(setup, [Case(12, 9)], 1)
    assert told.store == found.store_bytes and told.weights == sum(p.nbytes for p in net.parameters())
    text = TextState(random_prompt(TINY, 0, dtype=dtype))
    kept = [text.context, text.embedded(net.text_embedding)]
    for index, block in enumerate(net.blocks):
        kept += text.keys_values(index, block.cross_attn, net.text_embedding)
    assert told.text == sum(t.nbytes for t in kept)
    assert told.total == told.weights + told.store + told.text + told.work
    assert budgets.budget(replace(setup, joined=True), Case(12, 9)).work == 2 * told.work


def test_cards():
    """Better choices on larger cards, and none that does not fit."""
    found = budgets.cards(WanConfig(), (832, 480))
    assert [card for card, _, _ in found] == [8, 12, 16, 24] and all(choice for _, choice, _ in found)
    assert all(b.total + budgets.BESIDE <= card * budgets.GB for card, _, b in found)
    places = [budgets.CHOICES.index(choice) for _, choice, _ in found]
    assert places == sorted(places, reverse=True) and places[-1] == 0
    assert budgets.cards(budgets.WAN_14B, (832, 480))[0][1] is None


def arguments(*words):
    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_the_picture_has_a_bar_of_each_part():
    row = record(SETUP, measure(SETUP, [Case(6, None)], 1, parts=1), RATES)[0]
    row["parts"]["seconds"] = dict.fromkeys(row["parts"]["seconds"], 1.0)
    row["parts"]["total"], row["floors"] = 6.0, {"operations": 5.0, "bytes": 1.0}
    image = picture([row])
    seen = {colour for _, colour in image.crop((0, 90, *image.size)).getcolors(100000)}
    assert {*command.COLOURS.values()} <= seen
    with pytest.raises(ForcingError, match="no parts to draw"):
        picture([{**row, "parts": None}])


def test_the_command(tmp_path, capsys):
    path, plot = tmp_path / "a.json", tmp_path / "a.png"
    words = ("--frames", 6, "--window", 6, "--runs", 1, "--dim", 128, "--layers", 1, "--size", "16x16", "32x16",
             "--preset", "longlive", "self-forcing", "--clock", "process")
    assert command.run(arguments("--json", path, "--plot", plot, *words)) == 0
    result, told = json.loads(path.read_text(encoding="utf-8")), capsys.readouterr()
    assert [(row["preset"], row["width"]) for row in result["rollouts"]] == [
        ("longlive", 16), ("longlive", 32), ("self-forcing", 16), ("self-forcing", 32)]
    assert all(row["floors"]["operations"] > 0 and row["clock"] == "process" for row in result["rollouts"])
    assert "together" in told.err and "floor/run" in told.out and plot.stat().st_size > 1000


def test_every_preset_has_a_budget(capsys):
    """Nothing is run; what a preset cannot do is told and left out."""
    assert command.run(arguments("--budget", "--model", "1.3b", "--preset", "all", "--frames", 21, "--window", "all")) == 0
    told = capsys.readouterr()
    assert all(preset.name in told.out + told.err for preset in runnable()) and "24 GB" in told.out
    with pytest.raises(ForcingError, match="leaves no room"):
        command.run(arguments("--budget", "--frames", 21, "--window", 4))


def test_the_one_command_for_a_card_is_in_the_help():
    words = command.HELP.split("python -m forcing_core bench ")[1].split(". ")[0].split()
    args = arguments(*words)
    assert (args.device, args.model, args.preset, args.parts) == ("cuda", "1.3b", ["all"], 1)


@pytest.mark.slow
def test_compiled_halves_equal_the_plain_ones(require):
    """The store stays outside of what is compiled."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # whatever inductor says without a compiler
        require(False, f"torch.compile has no C++ compiler here ({type(error).__name__})", "Install g++.")

    def video(compiled):
        held = []
        setup = replace(SETUP, config=replace(TINY, layers=1), compiled=compiled, decoder=lambda: held.append)
        measure(setup, [Case(6, None)], 1, parts=1)
        return torch.cat(held, dim=2)

    assert gap(video(False), video(True)) <= 1e-5
