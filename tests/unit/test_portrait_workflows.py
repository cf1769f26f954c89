"""The portrait workflows: the files are what their functions describe, and sound and picture reach the video together."""
import importlib
import json
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
NAMES = ("portrait_micro", "portrait_vace")


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
            assert nodes[node["id"]]["widgets_values"][0] == node["widgets"]["text"]


def feeding(described, kind, entry):
    """Type of the node that an input of the only node of a kind comes from, and the number of its output."""
    target, = (node["id"] for node in described["nodes"] if node["type"] == kind)
    types = {node["id"]: node["type"] for node in described["nodes"]}
    (source, output), = ((link[0], link[1]) for link in described["links"] if link[2:] == [target, entry])
    return types[source], output


# name -> (node that gets the sound, where it comes from), where the driving conditioning comes from
SOURCES = {"portrait_micro": (("CreateVideo", ("ForcingMicroPortrait", 5)), "ForcingMicroPortrait"),
           "portrait_vace": (("ForcingStream", ("GetVideoComponents", 1)), "WanVaceToVideo")}


def test_sound_comes_from_where_the_motion_does(name, described):
    (node, sound), motion = SOURCES[name]
    assert feeding(described, node, "audio") == sound
    assert feeding(described, "ForcingGuider", "positive")[0] == motion


def test_the_face_is_the_reference_of_a_knot(name, described):
    assert feeding(described, "ForcingKnot", "reference") == (
        ("ForcingMicroPortrait", 2) if name == "portrait_micro" else ("VAEEncode", 0))
    widgets, = (node["widgets"] for node in described["nodes"] if node["type"] == "ForcingKnot")
    assert widgets["knot"] == 1
    cache, = (node["widgets"] for node in described["nodes"] if node["type"] == "ForcingCache")
    assert cache["policy"] == "window" and cache["policy.positions"] == "relative"
