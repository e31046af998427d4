"""Files that are written whole or not at all, one or several together."""

import errno
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write fails with on a full disk


def replace_all(files: Mapping[Path, bytes]) -> None:
    """Write files. The first takes its place when all of them stand in full beside theirs; the order is the one given.

    Raises:
        OSError: one cannot be written, for one because the disk is full. What was there before still is.
    """
    mark = secrets.token_hex(6)  # others may write the same file now
    partial = {path: path.with_name(f".{path.name}.{mark}") for path in files}
    try:
        for path, content in files.items():
            with partial[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            partial[path].replace(path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    for folder in {path.parent for path in files}:
        _sync(folder)


def _sync(folder: Path) -> None:
    """Else the renames themselves may be lost with the power."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        pass  # a file system that cannot sync folders
    finally:
        os.close(opened)
