"""Files written whole, and what is left when their writer is killed."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forcing_pack.forcing_core.errors import ForcingError
from forcing_pack.forcing_core.files import sweep, whole

WRITER = """
import importlib, sys, time, types
from pathlib import Path
package = types.ModuleType("forcing_alone")
package.__path__ = [sys.argv[1]]
sys.modules["forcing_alone"] = package
files = importlib.import_module("forcing_alone.forcing_core.files")
with files.whole(Path(sys.argv[2])) as temporary:
    temporary.write_bytes(b"half")
    print("begun", flush=True)
    time.sleep(600)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_completely_or_not_at_all(tmp_path):
    with whole(tmp_path / "a") as temporary:
        temporary.write_bytes(b"first")
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "a") as temporary:
        temporary.write_bytes(b"sec")
        raise ZeroDivisionError
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"first"
    with pytest.raises(ForcingError, match="was not written"), whole(tmp_path / "no" / "a"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="locks of the system")
def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    """Not what is being written by somebody who lives, not other names, not a file that was begun just now."""
    root = Path(__file__).resolve().parents[2]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(root), str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "begun\n"
        own, = names(tmp_path)
        for name in (".b.0123456789ab.tmp", ".a.not-ours.tmp", "a.tmp"):
            (tmp_path / name).write_bytes(b"x")
        (tmp_path / ".a.0123456789ab.tmp").write_bytes(b"")
        kept = names(tmp_path)
        sweep(tmp_path, "a".__eq__)
        assert names(tmp_path) == kept
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    os.utime(tmp_path / ".a.0123456789ab.tmp", (0, 0))
    sweep(tmp_path, "a".__eq__)
    assert names(tmp_path) == sorted({*kept} - {own, ".a.0123456789ab.tmp"})
