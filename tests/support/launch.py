"""Run ComfyUI's main.py with the wheel work-around: launch.py MAIN_PY [its arguments].

Ends with the process that started it: the test run holds the other end of stdin.
"""
import os
import runpy
import sys
import threading
from pathlib import Path

import cpu_wheels


def exit_with_parent():
    sys.stdin.buffer.read()
    os._exit(0)


def main():
    cpu_wheels.install()
    script = Path(sys.argv[1])
    # As if main.py had been started: this file's folder leaves the path, and so do its module names.
    sys.path[0] = str(script.parent)
    sys.argv = sys.argv[1:]
    threading.Thread(target=exit_with_parent, daemon=True).start()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
