"""The compiled CPU build of the fused step: made by the machine's own C++ compiler, once, and kept.

The source travels with the package; the library stands in the user's cache folder under the hash of source,
flags and processor. What is found there is run, so it is looked for in folders that this user alone can write, and a
file that is another user's, or that others can write, is as good as none. Where there is no compiler, or what it made
does not give the reference's bits, there is no native build and numpy does the work: to the same bits, so nothing else
changes.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .noise import Floats, normals

log = logging.getLogger("fewstep")

Array = NDArray[Any]

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
_first: Callable[[Any], Any] = ctypes.c_char.from_buffer
_COMPILERS = ("c++", "g++", "clang++")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NativeStep:
    """The loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_long
        self._step, self._normals = library.fewstep_step, library.fewstep_normals
        self._step.argtypes = [pointer, number, pointer, *[number] * 4, *[pointer] * 7]
        self._normals.argtypes = [pointer, pointer, number, number, pointer]
        self._step.restype = self._normals.restype = None

    def bind(
        self, table: Array, row: NDArray[np.int32], x: Floats, history: Floats, *others: Array
    ) -> Callable[[int, int, Array], None]:
        """`BoundStep`, for C-contiguous arrays and a float32 network. ``others`` are the rest of its arrays, in order.

        What is given moves the rows from one to before another, with the network's output. It keeps the arrays.
        """
        elements, slots = x.shape[1], history.shape[1]
        arrays = (row, x, history, *others)
        to_row, *to_state = map(_address, (row, x, history))
        to_others = [*map(_address, others)]
        to_table, row_bytes, step = _address(table), table.strides[0], self._step

        def move(first: int, last: int, raw: Array, _: Any = (table, arrays)) -> None:
            step(to_table, row_bytes, to_row, first, last, elements, slots, *to_state, _address(raw), *to_others)

        return move

    def step(
        self, table: Array, row: NDArray[np.int32], x: Floats, history: Floats, raw: Floats, *others: Array
    ) -> None:
        """`fused_step`, for C-contiguous arrays and a float32 network."""
        self.bind(table, row.copy(), x, history, *others)(0, len(row), raw)

    def normals(self, seed: NDArray[np.uint64], noise_id: NDArray[np.uint32], out: Floats) -> None:
        """`noise.normals` into ``out``, C-contiguous."""
        rows, elements = out.shape
        self._normals(_address(seed), _address(noise_id), rows, elements, _address(out))


def _address(array: Array) -> int:
    """Of its first element. numpy's ``array.ctypes.data`` takes several times as long, and every tick asks."""
    try:
        return ctypes.addressof(_first(array))
    except TypeError:  # it is read-only
        return array.ctypes.data


@cache
def native_step() -> NativeStep | None:
    """The native build, compiled now if it has to be; None where there is none."""
    try:
        path = built("cpu.cpp")
        if path is None:
            return None
        native = NativeStep(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no native step, numpy does its work: %s", error)
        return None
    seed, noise_id = np.array([2**63 + 7, 1], np.uint64), np.array([0, 2**32 - 1], np.uint32)
    out = np.empty((2, 61), np.float32)
    native.normals(seed, noise_id, out)
    if not np.array_equal(out, normals(seed, noise_id, 61)):
        log.warning("no native step, numpy does its work: %s gives other bits than the reference", path)
        return None
    return native


def built(source: str) -> Path | None:
    """The library made from one C++ file of this folder and the shared header; None where there is no compiler.

    Raises:
        subprocess.SubprocessError: the compiler refuses.
    """
    key = hashlib.sha256(" ".join(_FLAGS).encode() + _processor())
    for name in (source, "fewstep_step.h"):
        key.update((_FOLDER / name).read_bytes())
    name = f"fewstep-{Path(source).stem}-{key.hexdigest()[:24]}.so"
    for folder in cache_folders():
        if read_kept(folder / name) is not None:
            return folder / name
        compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
        if compiler is None:
            log.info("no C++ compiler, so %s is not built", source)
            return None
        try:
            with tempfile.TemporaryDirectory(dir=folder) as made:
                library = Path(made) / name
                command = [compiler, *_FLAGS, "-o", str(library), str(_FOLDER / source)]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                keep(folder / name, library.read_bytes())  # a loader passes over what stands behind a library
            return folder / name
        except OSError:  # a folder that cannot be written: try the next
            continue
    return None


def keep(path: Path, made: bytes) -> None:
    """Write what was compiled, with its hash behind it: whole or not at all, whoever else writes it now.

    Raises:
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        file.write_bytes(made + hashlib.sha256(made).digest())
        file.chmod(0o600)
        file.replace(path)


def read_kept(path: Path) -> bytes | None:
    """What `keep` wrote; None where there is nothing, where it was torn or altered, or where others can write it."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not _is_own(found) or found.st_mode & _OTHERS_WRITE:
                return None
            kept = file.read()
    except OSError:
        return None
    made, digest = kept[:-32], kept[-32:]
    return made if hashlib.sha256(made).digest() == digest else None


def cache_folders() -> Iterator[Path]:
    """Where what was compiled is kept, in the order in which they are tried: folders that no other user can write."""
    yield from filter(_make_own, _places())


def _places() -> Iterator[Path]:
    base = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # no HOME, and a user without a name, as in containers
        yield Path(base or Path.home() / ".cache") / "fewstep"
    with suppress(FileNotFoundError):  # no folder for temporary files
        yield Path(tempfile.gettempdir()) / f"fewstep-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


def _make_own(folder: Path) -> bool:
    """Whether the folder, made if it has to be, is this user's; one that others can write is closed to them."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if not (_is_own(folder.lstat()) and _is_own(found)):  # the link, where it is one, and what it leads to
            log.warning("%s is not used: it belongs to another user", folder)
            return False
        if found.st_mode & _OTHERS_WRITE:
            folder.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS_WRITE)
    except OSError:
        return False
    return True


def _is_own(found: os.stat_result) -> bool:
    """Whether it is this user's, or root's, who could do as he likes anyway."""
    return not hasattr(os, "getuid") or found.st_uid in (0, os.getuid())


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}".encode()
