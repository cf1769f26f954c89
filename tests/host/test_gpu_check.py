"""The script for machines with a card goes through all its steps on a tiny network here, so that it works there."""
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "gpu_check.py"
SUPPORT = Path(__file__).resolve().parents[1] / "support"
# not through launch.py: that one is made for servers and ends when its stdin does
START = ("import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); import cpu_wheels; cpu_wheels.install(); sys.path.pop(0); "
         "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')")


def test_every_check_reports(comfy_checkout, tmp_path):
    """Guards against a script that only breaks once it has a card."""
    out = tmp_path / "report.json"
    command = [sys.executable, "-c", START, str(SUPPORT), str(SCRIPT), "--comfy", str(comfy_checkout), "--json", str(out),
               "--runs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    checks = {check["name"]: check for check in json.loads(out.read_text())["checks"]}
    same = next(check for name, check in checks.items() if name.startswith("same latents"))
    assert same["equal"] and checks["noise equal on CPU and GPU"]["equal"]
    variants = [check for name, check in checks.items() if " frames, store " in name]
    assert len(variants) == 6 and all(check["same"] and check["exact"] for check in variants)
    ways = [check for name, check in checks.items() if " frames, accelerate " in name]
    assert len(ways) == 5 and all(check["equal"] and check["recorded"] is None for check in ways)  # nothing to do on a CPU
    fused = [check for name, check in checks.items() if name.startswith("kernel ")]
    assert "kernels" in checks or len(fused) == 3 and all(check["cubin"] > 0 for check in fused)
    windows = [check for name, check in checks.items() if " frames under " in name]
    assert len(windows) == 4 and all(check["exact"] and check["finite"] for check in windows)
