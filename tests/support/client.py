"""A small client of ComfyUI's HTTP interface: queue API prompts, wait for them, get their files."""
import json
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from forcing_testkit.events import Events
from forcing_testkit.poll import until


class PromptFailed(AssertionError):
    """A prompt was refused or stopped. `node_id`, `node_type`, `exception_type` are None if no node is to blame."""

    def __init__(self, message, node_id=None, node_type=None, exception_type=None):
        super().__init__(message)
        self.node_id, self.node_type, self.exception_type = node_id, node_type, exception_type


class PromptInterrupted(PromptFailed):
    """A prompt was interrupted by its user."""


class ComfyClient:
    def __init__(self, url, output):
        self.url, self.output = url, Path(output)
        self.client_id = uuid.uuid4().hex

    def get(self, path, timeout=30):
        with urllib.request.urlopen(self.url + path, timeout=timeout) as reply:
            return json.loads(reply.read())

    def post(self, path, data, timeout=30):
        request = urllib.request.Request(self.url + path, json.dumps(data).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            body = reply.read()
        return json.loads(body) if body else None

    def object_info(self, node_id=None):
        """Schemas of all nodes, or of one (KeyError if the server lacks it)."""
        return self.get("/object_info/" + node_id)[node_id] if node_id else self.get("/object_info")

    def queue(self, prompt, **extra_data):
        """Submit an API-format prompt and return its id; PromptFailed if it does not validate."""
        try:
            data = {"prompt": prompt, "client_id": self.client_id, "extra_data": extra_data}
            return self.post("/prompt", data)["prompt_id"]
        except urllib.error.HTTPError as refusal:
            raise PromptFailed(_refusal(refusal.read())) from None

    def wait(self, prompt_id, timeout=120):
        """History entry of a finished prompt; PromptFailed carries the failing node's own words."""
        entry = until(lambda: self.get("/history/" + prompt_id).get(prompt_id), timeout, f"end of prompt {prompt_id}")
        if entry["status"]["status_str"] != "success":
            raise _failure(entry["status"]["messages"])
        return entry

    def run(self, prompt, timeout=120):
        return self.wait(self.queue(prompt), timeout)

    def interrupt(self, prompt_id=None):
        """Stop that prompt if it is running; without an id, whatever runs."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def events(self):
        """Context manager that collects what the server sends about prompts queued by this client."""
        return Events(self.url, self.client_id)

    def files(self, entry, node_id):
        """Paths of the files an output node saved, e.g. SaveVideo's mp4."""
        groups = [group for group in entry["outputs"][node_id].values() if isinstance(group, list)]
        found = [item for group in groups for item in group if isinstance(item, dict) and "filename" in item]
        return [self.output / item["subfolder"] / item["filename"] for item in found]

    def cached(self, entry):
        """Ids of the nodes that did not run because their result was kept from an earlier prompt."""
        return {node for kind, data in entry["status"]["messages"] if kind == "execution_cached"
                for node in data["nodes"]}

    def free(self):
        """Unload models and forget cached results, so that the next prompt starts from files."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        # The request is only looked at after a prompt, or at once if the worker happens to sleep already.
        self.run({"nothing": {"class_type": "PreviewAny", "inputs": {"source": ""}}})


def _refusal(body):
    reply = json.loads(body)
    lines = [reply["error"]["message"] + ": " + reply["error"].get("details", "")]
    for node_id, node in reply.get("node_errors", {}).items():
        lines += [f"node {node_id} ({node['class_type']}): {error['message']}: {error['details']}"
                  for error in node["errors"]]
    return "\n".join(lines)


def _failure(messages):
    kind, data = messages[-1]
    where = f"node {data.get('node_id')} ({data.get('node_type')})"
    if kind == "execution_interrupted":
        return PromptInterrupted(f"interrupted in {where}", data.get("node_id"), data.get("node_type"))
    trace = "".join(data.get("traceback", []))
    return PromptFailed(f"{where}: {data.get('exception_type')}: {data.get('exception_message')}\n{trace}",
                        data.get("node_id"), data.get("node_type"), data.get("exception_type"))
