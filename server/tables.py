"""Tables over HTTP and from a folder: a learned solver reaches a student that is running, weights untouched.

    POST    /v2/models/{model}/tables                       the table's file as the body
    GET     /v2/models/{model}/tables
    DELETE  /v2/models/{model}/tables/{solver}/{num_steps}

A table is checked against the student before anything changes, and refused with the reason. Requests in line and under
way end on the table they were accepted with; each answer names its table by hash. What is loaded lies over the
bundle's own tables and is gone with the process: the watched folder is what lasts.
"""

import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..runtime import Engine, Tableau, TableauError
from .errors import ApiError

log = logging.getLogger("fewstep")
POLL_S = 1.0


def describe_table(engine: Engine, tableau: Tableau) -> dict[str, Any]:
    """What clients are told of a table."""
    return {
        "solver": tableau.name,
        "num_steps": tableau.num_steps,
        "stochastic": tableau.is_stochastic,
        "loaded": engine.loaded.get((tableau.name, tableau.num_steps)) is tableau,
        "sha256": tableau.sha256,
    }


def load_table(engine: Engine, body: bytes) -> dict[str, Any]:
    """Answer a POST.

    Raises:
        ApiError: the body is no table, or one that does not fit the student; nothing was changed.
    """
    try:
        tableau = Tableau.from_bytes(body)
        replaced = engine.load_table(tableau)
    except TableauError as error:
        raise ApiError(400, str(error), code="table_refused") from None
    return {
        "model": engine.bundle.name,
        **describe_table(engine, tableau),
        "replaced_sha256": replaced.sha256 if replaced else None,
    }


def unload_table(engine: Engine, solver: str, num_steps: int) -> dict[str, Any]:
    """Answer a DELETE.

    Raises:
        ApiError: no such table was loaded; the bundle's own cannot be removed.
    """
    try:
        removed = engine.unload_table(solver, num_steps)
    except KeyError:
        own = (solver, num_steps) in engine.bundle.tableaus
        reason = "belongs to the bundle" if own else "is not loaded"
        raise ApiError(404, f"{solver} with {num_steps} steps {reason}", code="no_such_table") from None
    now = engine.tableaus.get((solver, num_steps))
    return {
        "model": engine.bundle.name,
        "solver": solver,
        "num_steps": num_steps,
        "removed_sha256": removed.sha256,
        "sha256": now.sha256 if now else None,
    }


class TablesFolder:
    """Keeps engines at what a folder holds: ``folder/*`` for the first student, ``folder/MODEL/*`` for the others.

    A file that appears or changes is loaded, one that goes is unloaded; one that cannot be used is reported once and
    leaves what is served as it was. Write a file elsewhere and rename it into place, as ``fewstep fit`` does.

    Args:
        folder: looked at every second.
        engines: by model name, the first student first.
    """

    def __init__(self, folder: Path, engines: dict[str, Engine]) -> None:
        first, *_ = engines.values()
        self._folder = folder
        self._places = [(folder, first), *((folder / name, engine) for name, engine in engines.items())]
        self._seen: dict[Path, tuple[int, int, int]] = {}
        self._loaded: dict[Path, tuple[Engine, Tableau]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fewstep-tables", daemon=True)

    def start(self) -> None:
        """Load what is there, and begin to watch."""
        self.poll()
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stopping.set()
        self._thread.join()

    def replace(self, old: Engine | None, new: Engine) -> None:
        """Keep another engine at what the folder holds; it gets everything at the next look."""
        self._places = [(place, new if engine is old else engine) for place, engine in self._places]
        if old is None:
            self._places.append((self._folder / new.bundle.name, new))
        self._seen = {}

    def poll(self) -> None:
        """Look once."""
        present: dict[Path, tuple[Engine, tuple[int, int, int]]] = {}
        for place, engine in self._places:
            try:
                for file in sorted(place.glob("*.safetensors")):
                    if not file.name.startswith("."):
                        stat = file.stat()
                        present[file] = engine, (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            except OSError as error:  # it went while it was looked at
                log.warning("tables: %s: %s", place, error.strerror)
        for file in [file for file in self._seen if file not in present]:
            del self._seen[file]
            self._unload(file)
        for file, (engine, stamp) in present.items():
            if self._seen.get(file) == stamp:
                continue
            self._seen[file] = stamp
            try:
                tableau = Tableau.load(file)
                engine.load_table(tableau)
            except TableauError as error:
                log.warning("tables: %s: refused: %s", file, error)
                continue
            old = self._loaded.get(file)
            self._loaded[file] = engine, tableau
            if old is not None and (old[1].name, old[1].num_steps) != (tableau.name, tableau.num_steps):
                _drop(*old)
            log.info("tables: %s: %s with %d steps is served", file, tableau.name, tableau.num_steps)

    def _unload(self, file: Path) -> None:
        old = self._loaded.pop(file, None)
        if old is not None:
            _drop(*old)

    def _run(self) -> None:
        while not self._stopping.wait(POLL_S):
            try:
                self.poll()
            except Exception:
                log.exception("tables: the folder could not be read")


def _drop(engine: Engine, tableau: Tableau) -> None:
    with suppress(KeyError):  # something else was loaded over it meanwhile
        engine.unload_table(tableau.name, tableau.num_steps, tableau.sha256)
