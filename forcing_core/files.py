"""Files written completely or not at all."""
from __future__ import annotations

import os
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from .errors import ForcingError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives the name of a temporary file beside `path`, which takes its place when the block ends well; else `path` stays
    as it was, also when the power goes. Raises ForcingError where the folder cannot be written to."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        try:
            yield temporary
            _settle(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ForcingError(f"{path} was not written: {error.strerror or error}. Check the folder and the free "
                           "space.") from error


def _settle(path: Path) -> None:
    """Have the system put a file on the disk: after a power cut, a name without its contents would be all there is."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
