"""The students being served: an engine for each, one thread that steps them, and the image encoders.

The event loop never waits on any of these: requests go to an engine as futures, and pictures are encoded in
threads of their own while the engine makes the next samples.
"""

import time
from concurrent.futures import ThreadPoolExecutor

from ..runtime import Bundle, Engine, EngineThread
from .settings import Settings, SettingsError
from .tables import TablesFolder


class Service:
    """Everything behind the doors.

    Args:
        settings: which bundles, how many rows.

    Raises:
        BundleError: a bundle cannot be loaded, or two have the same name.
        SettingsError: the tables' folder does not exist.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engines: dict[str, Engine] = {}
        for source in settings.bundles:
            bundle = Bundle.load(source)
            if bundle.name in self.engines:
                raise ValueError(f"bundles: two students are called {bundle.name}; give each bundle its own name")
            self.engines[bundle.name] = Engine(
                bundle, max_rows=settings.max_rows, max_waiting=settings.max_waiting, threads=settings.threads
            )
        self.default = next(iter(self.engines))
        self.started_s = int(time.time())
        self.is_draining = False
        self.encoders = ThreadPoolExecutor(settings.encoders, "fewstep-encoder")
        self._thread = EngineThread(list(self.engines.values()))
        self._tables: TablesFolder | None = None
        if settings.tables_folder is not None:
            if not settings.tables_folder.is_dir():
                raise SettingsError(f"tables_folder: there is no folder {settings.tables_folder}")
            self._tables = TablesFolder(settings.tables_folder, self.engines)

    def start(self) -> None:
        """Start the engine thread, and the watch on the tables' folder."""
        if self._tables is not None:
            self._tables.start()
        self._thread.start()

    def stop(self) -> None:
        """Finish what was accepted, then stop."""
        if self._tables is not None:
            self._tables.stop()
        self._thread.stop()
        self.encoders.shutdown()

    @property
    def is_live(self) -> bool:
        """Whether requests would be worked on."""
        return self._thread.is_alive

    @property
    def is_ready(self) -> bool:
        """Whether new requests are welcome."""
        return self._thread.is_alive and not self.is_draining
