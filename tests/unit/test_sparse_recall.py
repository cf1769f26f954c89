"""The measurement of recall: what is counted, and the command that writes it."""
import json

import pytest
import torch
from forcing_pack.forcing_core import __main__ as program
from forcing_pack.forcing_core.sparse import AnnOptions, LightOptions, recall

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_a_tally_counts():
    """By hand: two queries, four keys; the second one chose the heaviest key, the first one did not."""
    tally = recall.Tally()
    weights = torch.tensor([[[[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]]]])
    tally.add(2, weights, torch.tensor([[[[False, True, True, False], [False, False, False, True]]]]))
    found = tally.record()
    assert found == {"attentions": 1, "density": 0.375, "recall": 0.6, "best": 0.7, "layers": [0.6]}
    assert recall.Tally().record() == {"attentions": 0}


def test_everything_chosen_is_all_of_the_mass(monkeypatch, tmp_path, capsys):
    """Through the command, on the trained model: at density 1 nothing is lost, at 0.1 something is, but not as much."""
    row = recall.Row("all", AnnOptions("quant", density=1.0, group=1, dense_steps=0), 1.0, 1.0, "none")
    few = recall.Row("few", AnnOptions("quant", density=0.1, group=1, dense_steps=0), None, None, "none")
    light = recall.Row("light", LightOptions(0.5, 0.5, block=2), 0.5, None, "none")
    monkeypatch.setattr(recall, "ROWS", (row, few, light))
    file = tmp_path / "recall.json"
    assert program.main(["recall", "--frames", "6", "--captions", "1", "--json", str(file)]) == 0
    made = json.loads(file.read_text(encoding="utf-8"))
    all_, some, half = made["methods"]
    assert all_["density"] == all_["recall"] == all_["best"] == 1
    assert all_["attentions"] == 6 * (4 * 2 + 1) - 1  # the last layer of a clean pass attends to nothing
    assert 0.1 < some["recall"] <= some["best"] < 1 and some["density"] == pytest.approx(0.1, abs=0.02)
    assert half["density"] == pytest.approx(0.5) and half["attentions"] == 6 * 4
    assert "| all | 100.0 % | 100.0 % | 100.0 % | 100.0 %, 100.0 % |" in capsys.readouterr().out


def test_nothing_to_measure_is_refused(capsys):
    assert program.main(["recall", "--captions", "0"]) == 1
    assert "Use at least 1 of each" in capsys.readouterr().err
