"""Peak memory of a stream of one minute and of ten, each in a process of its own: it must not depend on the length.

    python tests/tools/stream_memory.py [--minutes 1 10] [--kind mp4]

A small random model, a window policy, snapshots off. Also opens the file while it grows. Prints JSON; exit status 1 where the
longer one takes more than 5 % more, or a file has another number of frames than announced.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av

TESTS = Path(__file__).resolve().parents[1]
BLOCK, FPS, MARGIN = 12, 16, 1.05  # video frames of a block
# glibc keeps freed blocks for later, more or fewer of them by chance (100 MB between two equal runs); large ones go back now
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def weights(folder):
    """A random micro model, made in another process: this one stays small."""
    code = ("import sys, types; sys.path.insert(0, {support!r}); "
            "p = types.ModuleType('forcing_pack'); p.__path__ = [{pack!r}]; sys.modules['forcing_pack'] = p; "
            "import micro; micro.random_bundle({folder!r})")
    subprocess.run([sys.executable, "-c", code.format(support=str(TESTS / "support"), pack=str(TESTS.parent),
                                                      folder=str(folder))], check=True)


def frames_of(path):
    """Frames that a file can be read to have now."""
    count = 0
    try:
        with av.open(str(path)) as container:
            for packet in container.demux(video=0):
                count += packet.size > 0
    except (av.error.FFmpegError, FileNotFoundError):
        pass
    return count


def measured(folder, minutes, kind):
    """One stream: frames announced and found, also half-way, peak bytes, seconds."""
    blocks = round((minutes * 60 * FPS + 3) / BLOCK)
    path, began = folder / f"{minutes}", time.monotonic()
    told = {"folder": str(folder), "path": str(path), "blocks": blocks, "kind": kind, "memory": True}
    process = subprocess.Popen([sys.executable, str(TESTS / "support" / "streamkit.py"), json.dumps(told)],
                               stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATOR)
    growing, peak = {}, 0
    file = path.with_suffix("." + {"mkv lossless": "mkv"}.get(kind, kind))
    for line in process.stdout:
        word, *rest = line.split()
        if rest:
            peak = int(rest[0])
        elif int(word) in (blocks // 4, blocks // 2):
            growing[word] = frames_of(file)
    if process.wait():
        raise SystemExit("The stream failed.")
    return {"minutes": minutes, "announced": BLOCK * blocks - 3, "found": frames_of(file), "growing": growing,
            "peak_mb": round(peak / 1e6, 1), "seconds": round(time.monotonic() - began)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 10])
    parser.add_argument("--kind", default="mp4")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights(folder)
        found = [measured(Path(folder), minutes, asked.kind) for minutes in asked.minutes]
    ratio = found[-1]["peak_mb"] / found[0]["peak_mb"]
    sys.stdout.write(json.dumps({"streams": found, "ratio": round(ratio, 4)}, indent=1) + "\n")
    return int(ratio > MARGIN or any(one["announced"] != one["found"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
