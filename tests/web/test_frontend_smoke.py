"""The frontend opens in a real browser with this pack linked into the server."""
import json

from forcing_testkit.graphs import core_ar_video


def test_page_is_ready_without_errors_from_the_pack(comfy_page):
    comfy_page.open()
    assert comfy_page.registered("SamplerARVideo")
    assert comfy_page.messages_about("forcing") == []


def test_workflow_survives_the_way_through_the_page(comfy_page, tmp_path):
    """API prompt -> drawn graph -> saved workflow -> API prompt: what every example workflow goes through."""
    comfy_page.load_workflow(write(tmp_path / "api.json", core_ar_video()))
    assert comfy_page.missing_node_types() == []
    first = comfy_page.graph_to_prompt()
    assert class_types(first) == class_types(core_ar_video())
    comfy_page.load_workflow(write(tmp_path / "ui.json", comfy_page.serialize()))
    assert comfy_page.graph_to_prompt() == first
    assert comfy_page.screenshot(tmp_path / "graph.png").stat().st_size > 10_000


def test_unknown_node_type_is_reported(comfy_page, tmp_path):
    workflow = {"version": 0.4, "last_node_id": 1, "last_link_id": 0, "links": [], "nodes": [
        {"id": 1, "type": "NoSuchNode", "pos": [0, 0], "size": [200, 100], "inputs": [], "outputs": []}]}
    comfy_page.load_workflow(write(tmp_path / "unknown.json", workflow))
    assert comfy_page.missing_node_types() == ["NoSuchNode"]


def class_types(prompt):
    return sorted(node["class_type"] for node in prompt.values())


def write(path, data):
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
