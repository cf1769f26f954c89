"""The public face of every node, compared with a snapshot: ids, order, types and defaults are in users' files.

After a change that is meant: FORCING_UPDATE_SNAPSHOT=1 pytest tests/host/test_schema.py, and review the diff.
"""
import difflib
import json
import os
import re
import urllib.request
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("schema_snapshot.json")
NODES = sorted(json.loads(SNAPSHOT.read_text(encoding="utf-8"))) if SNAPSHOT.exists() else []
# An entry of a help page. Lists, not tables: the help panel is about 40 characters wide.
ITEM = r"^- \*\*(.+?)\*\*: "
# Combos that list what is in folders of the user.
FILE_LISTS = {("ForcingLoadCheckpoint", "checkpoint"), ("ForcingLoadCheckpoint", "lora"), ("ForcingLoadCheckpoint", "vace"),
              ("ForcingLiveAvatar", "lora"),
              ("ForcingResume", "snapshot"),
              ("ForcingLiveCheckpoint", "checkpoint"), ("ForcingLiveCheckpoint", "autoencoder")}


@pytest.fixture(scope="module")
def schemas(comfy_server):
    """Node id -> its /object_info entry, for the nodes of this pack."""
    found = comfy_server.object_info()
    return {name: found[name] for name in sorted(found) if found[name]["python_module"].endswith("ComfyUI-Forcing")}


def inputs_of(schema):
    """Yields (section, name, type, options) in the order of the widgets."""
    for section in ("required", "optional"):
        for name in schema["input_order"].get(section, []):
            kind, *options = schema["input"][section][name]
            yield section, name, kind, options[0] if options else {}


def all_inputs_of(schema):
    """(name, options) of every widget and socket, those that a drop-down reveals right after it, each name once."""
    seen = {}
    for _, name, _, options in inputs_of(schema):
        seen.setdefault(name, options)
        for option in revealed(options):
            for inner in ("required", "optional"):
                for key, (_, *more) in option["inputs"].get(inner, {}).items():
                    seen.setdefault(key, more[0] if more else {})
    return list(seen.items())


def revealed(options):
    """The choices of a drop-down that bring inputs of their own."""
    return [option for option in options.get("options", ()) if isinstance(option, dict)]


def without_tooltips(value):
    if isinstance(value, dict):
        return {key: without_tooltips(part) for key, part in value.items() if key != "tooltip"}
    return [without_tooltips(part) for part in value] if isinstance(value, list) else value


def face(name, schema):
    """What a saved workflow depends on. Tooltips and descriptions may change freely."""
    inputs = []
    for section, key, kind, options in inputs_of(schema):
        kept = without_tooltips(options)
        if (name, key) in FILE_LISTS:
            kept["options"] = "files"
        inputs.append({"name": key, "type": kind, "section": section, **dict(sorted(kept.items()))})
    outputs = [{"name": output, "type": kind} for output, kind in zip(schema["output_name"], schema["output"])]
    return {"display_name": schema["display_name"], "category": schema["category"],
            "output_node": schema["output_node"], "inputs": inputs, "outputs": outputs}


def as_text(faces):
    return json.dumps(faces, indent=1, sort_keys=False) + "\n"


def test_nodes_are_those_of_the_snapshot(schemas):
    now = as_text({name: face(name, schema) for name, schema in schemas.items()})
    if os.environ.get("FORCING_UPDATE_SNAPSHOT"):
        SNAPSHOT.write_text(now, encoding="utf-8")
    before = SNAPSHOT.read_text(encoding="utf-8")
    changes = "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), "snapshot", "now", lineterm="", n=6))
    assert now == before, f"The nodes changed, and with them every saved workflow:\n{changes}\n{__doc__}"


@pytest.mark.parametrize("name", NODES)
def test_every_input_explains_itself(schemas, name):
    assert [key for key, options in all_inputs_of(schemas[name]) if not options.get("tooltip")] == []


@pytest.mark.parametrize("name", NODES)
def test_node_says_what_it_is_for(schemas, name):
    schema = schemas[name]
    assert schema["category"].split("/")[0] == "Forcing"
    assert schema["display_name"].startswith("Forcing ") and schema["description"].endswith(".")


@pytest.mark.parametrize("name", NODES)
def test_help_page_covers_every_input_and_output(schemas, name):
    page = (PACK / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.+?)\n(.+?)(?=\n## |\Z)", page, re.MULTILINE | re.DOTALL))
    inputs = [key for key, _ in all_inputs_of(schemas[name])]
    assert re.findall(ITEM, sections["Inputs"], re.MULTILINE) == inputs
    assert re.findall(ITEM, sections["Outputs"], re.MULTILINE) == schemas[name]["output_name"]
    assert sections["A typical connection"] and sections["Common errors"]
    assert page.startswith(f"# {schemas[name]['display_name']}\n")


@pytest.mark.parametrize("name", NODES)
def test_help_page_has_no_links(name):
    """The page opens every link of a help page as an address of its own, so relative ones lead nowhere."""
    page = (PACK / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert "](" not in page and "://" not in page


def test_help_pages_are_served(comfy_server):
    for name in NODES:
        with urllib.request.urlopen(f"{comfy_server.url}/extensions/ComfyUI-Forcing/docs/{name}.md", timeout=30) as reply:
            assert reply.read().startswith(b"# Forcing ")


@pytest.mark.parametrize("name", NODES)
def test_an_example_workflow_uses_the_node(name):
    workflows = [json.loads(path.read_text(encoding="utf-8")) for path in (PACK / "workflows").glob("*.json")]
    assert any(node["type"] == name for workflow in workflows for node in workflow["nodes"])
