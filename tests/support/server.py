"""A real ComfyUI on the CPU, with this pack and the test nodes, in a workspace of its own."""
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

from forcing_testkit.checkout import REPO
from forcing_testkit.client import ComfyClient
from forcing_testkit.poll import until

SUPPORT = Path(__file__).resolve().parent
PACK = "ComfyUI-Forcing"
# Anything but a CUDA user's attention path would test the wrong code; the rest keeps the server to itself.
FLAGS = ["--cpu", "--use-pytorch-cross-attention", "--listen", "127.0.0.1", "--disable-api-nodes",
         "--disable-auto-launch", "--database-url", "sqlite:///:memory:", "--preview-method", "latent2rgb"]
# What the page would show or do besides drawing the workflow it is given: greetings, complaints about
# models that tests lack (also late ones, about the default graph), workflows of earlier tests.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Notification.ShowVersionUpdates": False,
            "Comfy.RightSidePanel.ShowErrorsTab": False, "Comfy.Workflow.ShowMissingModelsWarning": False,
            "Comfy.Workflow.Persist": False, "Comfy.Minimap.Visible": False,
            # Texts stay legible however far a large graph is zoomed out.
            "LiteGraph.Canvas.MinFontSizeForLOD": 0}


class ComfyServer(ComfyClient):
    """Start with `start()`, end with `stop()`; everything a ComfyClient does in between.

    base: workspace (models, output, custom_nodes ...), created by `prepare`. log: path of the server's log.
    """

    def __init__(self, checkout, base, flags=()):
        self.port = _free_port()
        super().__init__(f"http://127.0.0.1:{self.port}", Path(base) / "output")
        self.checkout, self.base, self.flags = checkout, Path(base), list(flags)
        self.log = self.base / "server.log"
        self.process = None

    def start(self, timeout=120):
        command = [sys.executable, str(SUPPORT / "launch.py"), str(self.checkout / "main.py"), *FLAGS,
                   "--port", str(self.port), "--base-directory", str(self.base), *self.flags]
        # one thread: tiny convolutions on two spin for seconds as soon as anything else runs
        quiet = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            # A session of its own, so that stop() reaches whatever the server started.
            self.process = subprocess.Popen(command, cwd=self.base, env=os.environ | quiet, stdin=subprocess.PIPE,
                                            stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            until(self._answers, timeout, "answer from ComfyUI")
        except Exception as error:
            self.stop()
            raise RuntimeError(f"ComfyUI did not start; its log ends with:\n{self.log_tail()}") from error
        return self

    def _answers(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with status {self.process.returncode}")
        try:
            return self.get("/system_stats", timeout=2)
        except (urllib.error.URLError, OSError):
            return None

    def stop(self):
        if self.process is None:
            return
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, kind)
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                self.process.wait(10)
            break
        self.process.stdin.close()
        self.process = None

    def log_text(self):
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def log_tail(self, lines=60):
        return "\n".join(self.log_text().splitlines()[-lines:])

    def memory(self):
        """Bytes: `rss` of the server process, `ram_free` and `ram_total` of the machine."""
        import psutil

        system = self.get("/system_stats")["system"]
        return {"rss": psutil.Process(self.process.pid).memory_info().rss,
                "ram_free": system["ram_free"], "ram_total": system["ram_total"]}


def prepare(base, models=None, packs=None):
    """Lay out a workspace: custom_nodes with links to `packs` (name -> folder), user settings, `models` linked."""
    base = Path(base)
    packs = {PACK: REPO, "forcing-testnodes": SUPPORT / "testnodes"} if packs is None else packs
    settings = base / "user" / "default" / "comfy.settings.json"
    for folder in (base / "custom_nodes", base / "input", base / "output", settings.parent):
        folder.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    for name, folder in packs.items():
        (base / "custom_nodes" / name).symlink_to(folder, target_is_directory=True)
    if models is not None:
        (base / "models").symlink_to(models, target_is_directory=True)
    return base


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
