"""Files written completely or not at all.

Who is killed while writing leaves a temporary file. A lock that the system takes back with the process tells those from
the ones that are being written; where there are no such locks (Windows), an open file cannot be removed anyway.
"""
from __future__ import annotations

import os
import re
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

from .errors import ForcingError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp", re.DOTALL)
YOUNG = 60.0  # seconds in which an empty file may be one that is about to be locked


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives the name of a temporary file beside `path`, which takes its place when the block ends well; else `path` stays
    as it was, also when the power goes. Raises ForcingError where the folder cannot be written to."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        try:
            with _claimed(temporary):
                yield temporary
                _settle(temporary)
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ForcingError(f"{path} was not written: {error.strerror or error}. Check the folder and the free "
                           "space.") from error


def sweep(folder: Path, wanted: Callable[[str], bool]) -> None:
    """Remove what was left by writers that were killed, of the files of a folder whose names are wanted."""
    for path in folder.glob(".*.tmp"):
        found = TEMPORARY.fullmatch(path.name)
        if found and wanted(found[1]) and _abandoned(path):
            try:
                path.unlink(missing_ok=True)
            except OSError:
                pass  # it is nobody's problem now; the next one tries again


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Make a file and hold its lock."""
    if fcntl is None:
        yield
        return
    with open(path, "ab") as file:
        _lock(file)
        yield


def _lock(file) -> bool:
    """Whether nobody else has it now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # taken, or a file system without locks
        return False
    return True


def _abandoned(path: Path) -> bool:
    try:
        with open(path, "rb+") as file:
            found = os.fstat(file.fileno())
            old = found.st_size > 0 or time.time() - found.st_mtime > YOUNG
            return old and (fcntl is None or _lock(file))
    except OSError:
        return False


def _settle(path: Path) -> None:
    """Have the system put a file on the disk: after a power cut, a name without its contents would be all there is."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
