"""The official code beside ours: how it is loaded and called, by a stand-in; and the real one, where a checkout is at hand."""
import os
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forcing_pack.forcing_core.bench import Case, Setup
from forcing_pack.forcing_core.bench.official import beside_official, check_official
from forcing_pack.forcing_core.bench.parts import Rates
from forcing_pack.forcing_core.cli import bench as command
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.presets import get
from forcing_pack.forcing_core.schedule import levels
from forcing_pack.forcing_core.wan import WanConfig

pytestmark = pytest.mark.usefixtures("one_thread", "no_other_wan")
TINY = WanConfig(dim=128, ffn_dim=32, heads=1, layers=2, text_dim=8, text_len=4, freq_dim=32)
SETUP = Setup(get("longlive"), TINY, (32, 16), clock="process")  # 2 tokens a frame
RATES = Rates(1e9, 1e9)
# As much of the official file as is called: a network that says what it was asked, and answers with what it was given.
NETWORK = '''
import torch
from torch import nn

CALLS, MADE = [], []

class CausalWanModel(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        MADE.append(sizes)
        self.dim, self.num_heads = sizes["dim"], sizes["num_heads"]
        self.blocks = [None] * sizes["num_layers"]
        self.weight = nn.Parameter(torch.zeros(1))

    def load_state_dict(self, state):
        assert "blocks.0.self_attn.q.weight" in state and "head.modulation" in state

    def forward(self, x, t, context, seq_len, kv_cache, crossattn_cache, current_start):
        CALLS.append((current_start, t.tolist(), seq_len, [c["k"].shape[1] for c in kv_cache], len(crossattn_cache)))
        return x
'''


@pytest.fixture
def no_other_wan(monkeypatch):
    for name in [name for name in sys.modules if name == "wan" or name.startswith("wan.")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name == "wan" or name.startswith("wan.")]:
        del sys.modules[name]


@pytest.fixture
def checkout(tmp_path):
    modules = tmp_path / "Self-Forcing" / "wan" / "modules"
    modules.mkdir(parents=True)
    for folder in (modules, modules.parent):
        (folder / "__init__.py").write_text("raise RuntimeError('needs CUDA')")
    (modules / "attention.py").write_text("FLASH_ATTN_2_AVAILABLE = FLASH_ATTN_3_AVAILABLE = False")
    (modules / "model.py").write_text("flash_attention = None")
    (modules / "causal_model.py").write_text(NETWORK)
    return tmp_path / "Self-Forcing"


def test_the_passes_of_the_official_pipeline(checkout):
    """All steps of a block, then a clean pass, behind the last block too; every rollout with caches of its own."""
    rows = beside_official(checkout, SETUP, [Case(6, 3)], 1, RATES)
    official = sys.modules["wan.modules.causal_model"]
    block = [[level.timestep] * 3 for level in levels(get("self-forcing").steps, 5.0)] + [[0.0] * 3]
    told = torch.tensor([call[1][0] for call in official.CALLS])
    torch.testing.assert_close(told, torch.tensor(4 * block))  # two blocks, a warm-up and a run
    assert [call[0] for call in official.CALLS] == 2 * ([0] * 5 + [6] * 5)
    assert {(call[2], *call[3], call[4]) for call in official.CALLS} == {(6, 6, 6, 2)}
    assert official.MADE[0]["local_attn_size"] == 3 and official.MADE[0]["num_layers"] == 2
    assert callable(official.attention) and callable(sys.modules["wan.modules.model"].flash_attention)
    assert [row["who"] for row in rows] == ["official", "off"] and rows[0]["ratio"] == 1 and rows[0]["difference"] == 0
    assert rows[1]["ratio"] == pytest.approx(rows[0]["seconds"] / rows[1]["seconds"]) and rows[1]["difference"] > 0
    assert all(0 < row["first_seconds"] < row["seconds"] and row["floor"] > 0 and row["runs"] == 1 for row in rows)


def test_what_it_cannot_do_is_told_first(checkout, tmp_path):
    with pytest.raises(ForcingError, match="no Self Forcing code in .* Clone"):
        check_official(tmp_path, [Case(6, 3)])
    with pytest.raises(ForcingError, match="does not do 24 frames, window everything"):
        check_official(checkout, [Case(24, None)])
    with pytest.raises(ForcingError, match="a multiple of 3"):
        check_official(checkout, [Case(7, 6)])
    (checkout / "wan" / "modules" / "causal_model.py").write_text("import a_package_that_nobody_has")
    with pytest.raises(ForcingError, match="a_package_that_nobody_has.*pip install diffusers"):
        check_official(checkout, [Case(6, 3)])


def test_the_command(checkout, tmp_path, capsys):
    parser = ArgumentParser()
    command.add_arguments(parser)
    words = ["--official", checkout, "--frames", 6, "--window", 6, "--runs", 1, "--dim", 128, "--layers", 1, "--size", "16x16",
             "--json", tmp_path / "a.json"]
    assert command.run(parser.parse_args([str(word) for word in words])) == 0
    told = capsys.readouterr().out
    assert "first block s" in told and " official " in told and '"who": "off"' in (tmp_path / "a.json").read_text()


@pytest.mark.parametrize("case", [Case(9, None), Case(15, 6)])
@pytest.mark.skipif("SELF_FORCING_PATH" not in os.environ, reason="needs a checkout of github.com/guandeh17/Self-Forcing in "
                                                                   "SELF_FORCING_PATH, and pip install diffusers")
def test_the_real_one_makes_the_same_latents(case):
    rows = beside_official(Path(os.environ["SELF_FORCING_PATH"]), replace(SETUP, size=(64, 64)), [case], 1, RATES)
    assert rows[1]["difference"] <= 1e-5 and torch.isfinite(torch.tensor(rows[1]["difference"]))
