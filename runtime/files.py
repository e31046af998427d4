"""Files that change together: all of them, or none."""

import os
from collections.abc import Mapping
from pathlib import Path


def replace_all(files: Mapping[Path, bytes]) -> None:
    """Write files. The first takes its place when all of them stand in full beside theirs; the order is the one given.

    Raises:
        OSError: one cannot be written, for one because the disk is full. What was there before still is.
    """
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, content in files.items():
            partial[path].write_bytes(content)
        for path in files:
            partial[path].replace(path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
