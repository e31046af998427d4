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
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..runtime import Engine, Tableau, TableauError
from .errors import ApiError

log = logging.getLogger("fewstep")
POLL_S = 1.0
_Stamp = tuple[int, int, int]  # a file's time, size and number


def describe_table(engine: Engine, tableau: Tableau) -> dict[str, Any]:
    """What clients are told of a table."""
    return {
        "solver": tableau.name,
        "num_steps": tableau.num_steps,
        "stochastic": tableau.is_stochastic,
        "loaded": engine.loaded.get((tableau.name, tableau.num_steps)) is tableau,
        "sha256": tableau.sha256,
    }


def load_table(engine_of: Callable[[], Engine], body: bytes, changing: threading.Lock) -> dict[str, Any]:
    """Answer a POST.

    Args:
        engine_of: the student's engine; asked when the table has been read, since a reload may give it another.
        body: the table's file.
        changing: see `Service`.

    Raises:
        ApiError: the body is no table, or one that does not fit the student; nothing was changed.
    """
    try:
        tableau = Tableau.from_bytes(body)
        with changing:
            engine = engine_of()
            replaced = engine.load_table(tableau)
    except TableauError as error:
        raise ApiError(400, str(error), code="table_refused") from None
    return {
        "model": engine.bundle.name,
        **describe_table(engine, tableau),
        "replaced_sha256": replaced.sha256 if replaced else None,
    }


def unload_table(
    engine_of: Callable[[], Engine], solver: str, num_steps: int, changing: threading.Lock
) -> dict[str, Any]:
    """Answer a DELETE; see `load_table`.

    Raises:
        ApiError: no such table was loaded; the bundle's own cannot be removed.
    """
    try:
        with changing:
            engine = engine_of()
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
    leaves what is served as it was. An engine that was not there at the last look gets everything. Write a file
    elsewhere and rename it into place, as ``fewstep fit`` does.

    Args:
        folder: looked at every second.
        engines: by model name, as they are served now; the first student first.
        changing: held while engines are looked up and changed, and never while files are read; see `Service`.
    """

    def __init__(self, folder: Path, engines: Mapping[str, Engine], changing: threading.Lock) -> None:
        self._folder, self._engines, self._changing = folder, engines, changing
        self._first = next(iter(engines))
        self._seen: dict[Path, tuple[_Stamp, Engine]] = {}  # and the engine that was told
        self._loaded: dict[Path, tuple[str, Tableau]] = {}  # and the student
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

    def poll(self) -> None:
        """Look once."""
        present: dict[Path, tuple[str, _Stamp]] = {}
        for place, model in ((self._folder, self._first), *((self._folder / name, name) for name in [*self._engines])):
            try:
                for file in sorted(place.glob("*.safetensors")):
                    if not file.name.startswith("."):
                        stat = file.stat()
                        present[file] = model, (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            except OSError as error:  # it went while it was looked at
                log.warning("tables: %s: %s", place, error.strerror)
        for file in [file for file in self._seen if file not in present]:
            del self._seen[file]
            self._unload(self._loaded.pop(file, None))
        for file, (model, stamp) in present.items():
            engine = self._engines.get(model)
            if engine is None:
                self._seen.pop(file, None)
            elif self._seen.get(file) != (stamp, engine):
                self._seen[file] = stamp, engine
                self._load(file, model, engine)

    def _load(self, file: Path, model: str, engine: Engine) -> None:
        try:
            tableau = Tableau.load(file)
            with self._changing:
                if self._engines.get(model) is not engine:
                    return  # there is another one by now, which gets it at the next look
                engine.load_table(tableau)
        except TableauError as error:
            log.warning("tables: %s: refused: %s", file, error)
            return
        old = self._loaded.get(file)
        self._loaded[file] = model, tableau
        if old is not None and (old[1].name, old[1].num_steps) != (tableau.name, tableau.num_steps):
            self._unload(old)
        log.info("tables: %s: %s with %d steps is served", file, tableau.name, tableau.num_steps)

    def _unload(self, loaded: tuple[str, Tableau] | None) -> None:
        if loaded is None:
            return
        model, tableau = loaded
        with self._changing, suppress(KeyError):  # the student is gone, or something else was loaded over it meanwhile
            self._engines[model].unload_table(tableau.name, tableau.num_steps, tableau.sha256)

    def _run(self) -> None:
        while not self._stopping.wait(POLL_S):
            try:
                self.poll()
            except Exception:
                log.exception("tables: the folder could not be read")
