"""The portrait workflows: the files are what their functions describe; sound, picture and words reach the right places."""
import importlib
import json
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
NAMES = ("portrait_micro", "portrait_idle", "portrait_vace")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def described(name, monkeypatch):
    monkeypatch.syspath_prepend(str(PACK / "tests" / "tools"))
    return importlib.import_module("examples").EXAMPLES[name]().as_dict()


@pytest.fixture
def saved(name):
    return json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def test_file_is_what_the_function_describes(described, saved):
    nodes = {node["id"]: node for node in saved["nodes"]}
    assert {key: node["type"] for key, node in nodes.items()} == {node["id"]: node["type"] for node in described["nodes"]}
    named = [[*link[1:4], nodes[link[3]]["inputs"][link[4]]["name"]] for link in saved["links"]]
    assert sorted(named) == sorted(described["links"])
    for node in described["nodes"]:
        assert node["models"] == nodes[node["id"]]["properties"].get("models", [])
        if "text" in node["widgets"]:
            names = [entry["name"] for entry in nodes[node["id"]]["inputs"] if "widget" in entry] or ["text"]  # a note has none
            assert nodes[node["id"]]["widgets_values"][names.index("text")] == node["widgets"]["text"]


def feeding(described, kind, entry):
    """Type of the node that an input of the only node of a kind comes from, and the number of its output."""
    target, = (node["id"] for node in described["nodes"] if node["type"] == kind)
    types = {node["id"]: node["type"] for node in described["nodes"]}
    (source, output), = ((link[0], link[1]) for link in described["links"] if link[2:] == [target, entry])
    return types[source], output


# name -> (node, its input, where that comes from): of the sound, or of the words where there is none
SOURCES = {"portrait_micro": ("CreateVideo", "audio", ("ForcingMicroPortrait", 5)),
           "portrait_idle": ("ForcingStream", "clip", ("ForcingIdlePortrait", 2)),
           "portrait_vace": ("ForcingStream", "audio", ("ForcingDrivingVideo", 1))}
MOTION = {"portrait_micro": "ForcingMicroPortrait", "portrait_idle": "ForcingIdlePortrait", "portrait_vace": "WanVaceToVideo"}
FACE = {"portrait_micro": ("ForcingMicroPortrait", 2), "portrait_idle": ("ForcingIdlePortrait", 3),
        "portrait_vace": ("ForcingPortraitReference", 0)}


def test_sound_and_words_come_from_where_the_motion_does(name, described):
    node, entry, source = SOURCES[name]
    assert feeding(described, node, entry) == source
    assert feeding(described, "ForcingGuider", "positive")[0] == MOTION[name]


def test_the_face_is_the_reference_of_a_knot(name, described):
    assert feeding(described, "ForcingKnot", "reference") == FACE[name]
    widgets, = (node["widgets"] for node in described["nodes"] if node["type"] == "ForcingKnot")
    assert widgets["knot"] == 1
    cache, = (node["widgets"] for node in described["nodes"] if node["type"] == "ForcingCache")
    assert cache["policy"] == "window" and cache["policy.positions"] == "relative"
