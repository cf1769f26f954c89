"""Write workflows/*.json from examples.py, drawn and saved by the real frontend.

    python tests/tools/build_workflows.py [--url http://127.0.0.1:8188] [--shots FOLDER] [NAME ...]

Without --url a ComfyUI of its own is started. --shots also saves a screenshot of every graph.
"""
import argparse
import json
import uuid
from pathlib import Path

import bench
from examples import EXAMPLES

CORE_VERSION, PACK_ID, PACK_VERSION = "0.27.0", "forcing", "0.1.0"
DRAW = Path(__file__).with_name("draw_graph.mjs")
# Nodes that exist in the page only belong to no package.
PAGE_NODES = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")


def main():
    arguments = parse()
    chosen = {name: make for name, make in EXAMPLES.items() if not arguments.names or name in arguments.names}
    with bench.frontend(arguments.url) as page:
        for name, make in chosen.items():
            drawn = page.evaluate(DRAW.read_text(encoding="utf-8"), make().as_dict())
            workflow = tidy(name, json.loads(drawn))
            path = bench.WORKFLOWS / f"{name}.json"
            path.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            if arguments.shots:
                page.load_workflow(path)
                page.screenshot(Path(arguments.shots) / f"{name}.png")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these workflows")
    parser.add_argument("--url", help="a running ComfyUI with this pack and no models")
    parser.add_argument("--shots", help="folder for screenshots")
    return parser.parse_args()


def tidy(name, workflow):
    """The same bytes at every build, and what Manager's "install missing" goes by."""
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_ID}/{name}"))
    workflow["revision"] = 0
    workflow["extra"] = {"ds": {"scale": 0.6, "offset": [80, 160]}}
    for node in workflow["nodes"]:
        node["pos"], node["size"] = rounded(node["pos"]), rounded(node["size"])
        if node["type"] == "LoadAudio":  # its upload field, empty in a node that was just drawn, None once it was opened
            node["widgets_values"] = [value or None for value in node["widgets_values"]]
        if node["type"] not in PAGE_NODES:
            node["properties"] = {**package(node["type"]), "Node name for S&R": node["type"],
                                  **{key: value for key, value in node["properties"].items() if key == "models"}}
    workflow["nodes"].sort(key=lambda node: node["id"])
    return workflow


def package(kind):
    if kind.startswith("Forcing"):
        return {"cnr_id": PACK_ID, "ver": PACK_VERSION}
    return {"cnr_id": "comfy-core", "ver": CORE_VERSION}


def rounded(pair):
    values = pair if isinstance(pair, list) else [pair[key] for key in sorted(pair)]
    return [round(value) for value in values]


if __name__ == "__main__":
    main()
