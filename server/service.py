"""The students being served: an engine for each, one thread that steps them, and the image encoders.

The event loop never waits on any of these: requests go to an engine as futures, and pictures are encoded in
threads of their own while the engine makes the next samples.
"""

import asyncio
import json
import logging
import random
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..runtime import Bundle, BundleError, Engine, EngineThread, TableauError
from ..runtime.bundle import MANIFEST
from ..runtime.engine import Counters
from ..runtime.gpu_backends import backend_on
from ..runtime.simulated import Cost, simulated
from .encoders import Encoders
from .errors import ApiError
from .jobs import Jobs
from .keys import Keys
from .settings import Settings, SettingsError
from .tables import TablesFolder
from .traces import LEAVE_S, Traces

log = logging.getLogger("fewstep")


class Service:
    """Everything behind the doors.

    Args:
        settings: which bundles, how many rows.

    Raises:
        BundleError: a bundle cannot be loaded.
        SettingsError: two bundles have the same name, a weight is that of no student, the tables' folder does not
            exist.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = Keys(settings.api_keys)
        self.jobs = Jobs(settings)
        self.traces: Traces | None = None
        if settings.otlp_endpoint is not None:
            self.traces = Traces(settings.otlp_endpoint, ratio=settings.trace_ratio)
        self.aliases: dict[str, dict[str, float]] = {}  # parts of the requests by student
        self.engines: dict[str, Engine] = {}
        self.counters: dict[tuple[str, str], Counters] = {}  # by student and version: a reload goes on with them
        self._sources: dict[str, str] = {}  # where each student, served or unloaded, was loaded from
        self._loading = asyncio.Lock()
        # Held by whoever changes which engines there are, or an engine's tables: a table goes to an engine that is
        # served then, or is among those that a reload carries over. Never for long: the event loop waits for it.
        self.changing = threading.Lock()
        for source in settings.bundles:
            bundle = Bundle.load(source)
            if bundle.name in self.engines:
                raise SettingsError(f"bundles: two students are called {bundle.name}; give each bundle its own name")
            self._serve(self._engine(bundle), source)
        for name in settings.student_weights:
            if name not in self._known():
                raise SettingsError(f"student_weights.{name} is no student; there is: {', '.join(self._known())}")
        for name, parts in settings.aliases.items():
            self._alias(name, {parts: 1.0} if isinstance(parts, str) else parts)
        self.started_s = int(time.time())
        self.is_draining = False
        self.encoders = Encoders(settings.encoders)
        self._thread = EngineThread(list(self.engines.values()))
        self._tables: TablesFolder | None = None
        for name in ("tables_folder", "repository"):
            folder = getattr(settings, name)
            if folder is not None and not folder.is_dir():
                raise SettingsError(f"{name}: there is no folder {folder}")
        if settings.tables_folder is not None:
            self._tables = TablesFolder(settings.tables_folder, self.engines, self.changing)

    def start(self) -> None:
        """Start the engine thread, and the watch on the tables' folder."""
        if self._tables is not None:
            self._tables.start()
        self._thread.start()

    def stop(self) -> None:
        """Stop. The doors have answered whom they could; what is left is for nobody who could fetch it: jobs."""
        if self._tables is not None:
            self._tables.stop()
        self._thread.stop(timeout_s=0)
        self.encoders.stop()
        if self.traces:
            self.traces.stop(min(LEAVE_S, self.settings.drain_timeout_s))

    @property
    def simulated(self) -> str | None:
        """The cost of a network call on the simulated accelerator, if that is what the students run on."""
        return str(Cost.parse(self.settings.simulate)) if self.settings.simulate else None

    @property
    def default(self) -> str | None:
        """The student of requests that name none: the first one served."""
        return next(iter(self.engines), None)

    def engine(self, name: str) -> Engine | None:
        """The engine of a student, or of one of an alias's students, drawn by their parts."""
        if name in self.engines:
            return self.engines[name]
        parts = self._parts(name)
        return self.engines[random.choices(list(parts), list(parts.values()))[0]] if parts else None

    @property
    def answering(self) -> list[str]:
        """The names that requests may have: of students, and of aliases of which a student is served."""
        return [*self.engines, *(name for name in self.aliases if self._parts(name))]

    def _parts(self, alias: str) -> dict[str, float]:
        """Those of an alias's students that are served and have a part of the requests."""
        parts = self.aliases.get(alias, {})
        return {student: part for student, part in parts.items() if part > 0 and student in self.engines}

    def _alias(self, name: str, parts: Any) -> None:
        """Answer to another name.

        Raises:
            SettingsError: the parts are none.
        """
        if name in self.engines:
            raise SettingsError(f"aliases.{name}: a student is called that")
        if not isinstance(parts, dict) or not parts:
            raise SettingsError(f"aliases.{name}: a student, or students with the parts of the requests they get")
        for student, part in parts.items():
            if student not in self.engines:
                raise SettingsError(f"aliases.{name}: {str(student)[:80]} is not served")
            if type(part) not in (int, float) or not 0 <= part < float("inf"):
                raise SettingsError(f"aliases.{name}: the part of {student} is a number from 0 on")
        if sum(parts.values()) <= 0:
            raise SettingsError(f"aliases.{name}: one of the parts must be above 0")
        self.aliases = {**self.aliases, name: {student: float(part) for student, part in parts.items()}}

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a student, or load it again; requests under way are finished by the engine that accepted them.

        Args:
            name: what it is called.
            parameters: ``config``, JSON text whose ``bundle`` is a folder within the repository. Left out, the student
                comes from where it came from before, or from the repository's folder of its name. With ``alias``
                instead, students and their parts of the requests, the name becomes an alias of them.

        Raises:
            ApiError: there is no such bundle, or it cannot be served; nothing was changed.
        """
        alias = _alias_of(parameters)
        if alias is not None:
            try:
                self._alias(name, alias)
            except SettingsError as error:
                raise ApiError(400, f"config: {error}", param="config", code="alias_refused") from None
            return
        source = self._source(name, parameters)
        if name in self.aliases:
            raise ApiError(400, f"{name[:80]}: is an alias; unload it first", param="model", code="bundle_refused")
        async with self._loading:
            try:
                engine = await asyncio.to_thread(self._loaded, source)
            except Exception as error:
                log.warning("%s: not loaded: %s", name[:80], error)
                reason = str(error) if isinstance(error, BundleError) else "its network cannot be run; the log says why"
                raise ApiError(400, f"{name[:80]}: {reason}", code="bundle_refused") from None
            if engine.bundle.name != name:
                message = f"{name[:80]}: the bundle calls itself {engine.bundle.name}"
                raise ApiError(400, message, code="bundle_refused")
            if not self.is_live:
                raise ApiError(503, "the engine failed; only a restart helps", code="engine_stopped")
            if self.is_draining:
                raise ApiError(503, "the server is shutting down", code="draining", retry_after_s=1)
            with self.changing:
                old = self.engines.get(name)
                for tableau in old.loaded.values() if old else ():
                    with suppress(TableauError):  # it was fitted to the weights that go
                        engine.load_table(tableau)
                self._serve(engine, source)
                self._thread.add(engine)
            if old is not None:
                old.close()
                self._thread.wake()

    def _serve(self, engine: Engine, source: str) -> None:
        name, version = engine.bundle.name, engine.bundle.manifest.version
        engine.counters = self.counters.setdefault((name, version), engine.counters)
        self.engines[name], self._sources[name] = engine, source

    @property
    def working(self) -> tuple[Engine, ...]:
        """The engines that are served, and those that are not any more and finish what they accepted."""
        return self._thread.engines

    def unload(self, name: str) -> None:
        """Serve a student no more; requests under way are finished.

        Raises:
            ApiError: it is not served.
        """
        if name in self.aliases:
            self.aliases = {other: parts for other, parts in self.aliases.items() if other != name}
            return
        with self.changing:
            engine = self.engines.pop(name, None)
        if engine is None:
            raise ApiError(404, f"model: {name[:80]!r} is not served", param="model", code="model_not_found")
        engine.close()
        self._thread.wake()

    def repository_index(self) -> list[dict[str, str]]:
        """Every student that is served or could be loaded, with its state in Triton's words."""
        return [
            {"name": name, "version": self.engines[name].bundle.manifest.version, "state": "READY", "reason": ""}
            if name in self.engines
            else {"name": name, "version": "", "state": "UNAVAILABLE", "reason": "unloaded"}
            for name in self._known()
        ] + [
            {
                "name": name,
                "version": "",
                "state": "READY" if self._parts(name) else "UNAVAILABLE",
                "reason": f"alias of {', '.join(parts)}",
            }
            for name, parts in self.aliases.items()
        ]

    def _known(self) -> list[str]:
        """The students that are served or could be loaded."""
        names = [*self.engines, *self._sources]
        if self.settings.repository is not None:
            names += sorted(file.parent.name for file in self.settings.repository.glob(f"*/{MANIFEST}"))
        return list(dict.fromkeys(names))

    def _source(self, name: str, parameters: Mapping[str, Any]) -> str:
        repository = self.settings.repository
        unknown = [key for key in parameters if key != "config"]
        if unknown:
            raise ApiError(400, f"{unknown[0][:80]}: is no parameter of loading; there is: config", param=unknown[0])
        if "config" not in parameters:
            if name in self._sources:
                return self._sources[name]
            if repository is not None and name in {file.parent.name for file in repository.glob(f"*/{MANIFEST}")}:
                return str(repository / name)
            raise ApiError(404, f"model: there is no bundle for {name[:80]!r}", param="model", code="model_not_found")
        try:
            folder = json.loads(parameters["config"])["bundle"]
            if repository is None:
                raise ApiError(403, "config: this server was started without a repository to load from", param="config")
            path = (repository / folder).resolve()
        except (ValueError, TypeError, KeyError):
            raise ApiError(400, 'config: must be the text {"bundle": "FOLDER"}', param="config") from None
        if not path.is_relative_to(repository.resolve()):
            raise ApiError(403, "config: the bundle must be within the repository", param="config")
        return str(path)

    def _loaded(self, source: str) -> Engine:
        return self._engine(Bundle.load(source))

    def _engine(self, bundle: Bundle) -> Engine:
        settings, start_s = self.settings, time.monotonic()
        if settings.max_steps is not None:
            bundle = bundle.within(settings.max_steps)
        _, height, width = bundle.manifest.sample_shape
        on_device = backend_on(settings.device, settings.precision)
        engine = Engine(
            bundle,
            max_rows=settings.max_rows,
            max_waiting=max(1, min(settings.max_waiting, settings.max_waiting_pixels // (height * width))),
            threads=settings.threads,
            precision=settings.precision,
            backend=simulated(settings.simulate) if settings.simulate else on_device,
            ageing_s=settings.ageing_s,
            weight=settings.student_weights.get(bundle.name, 1.0),
        )
        engine.warm_up()
        engine.load_s = time.monotonic() - start_s
        return engine

    @property
    def is_live(self) -> bool:
        """Whether requests would be worked on."""
        return self._thread.is_alive

    @property
    def is_ready(self) -> bool:
        """Whether new requests are welcome."""
        return self._thread.is_alive and not self.is_draining


def _alias_of(parameters: Mapping[str, Any]) -> Any:
    """The ``alias`` of a load's ``config``; None when there is none."""
    try:
        config = json.loads(parameters.get("config", "{}"))
    except (ValueError, TypeError):
        return None
    alias = config.get("alias") if isinstance(config, dict) else None
    return {alias: 1.0} if isinstance(alias, str) else alias
