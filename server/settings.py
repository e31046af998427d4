"""Settings: one frozen object, built once at the door from a TOML file, the environment and the command line.

The file holds the fields below by their names. ``FEWSTEP_`` and a name in capitals is the same in the environment,
which wins over the file, and ``--set name=value`` on the command line, where the usual ones have flags of their own,
wins over both. Nothing is read from anywhere else afterwards. ``fewstep serve --print-config`` shows what came of it.
"""

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..runtime import DEFAULT_BUNDLE
from .keys import ApiKey, hashed
from .logs import LogFormat

PREFIX = "FEWSTEP_"
SECRETS = {"API_KEY": False, "ADMIN_KEY": True}  # keys themselves, in the environment only; whether for an admin
_LISTS = ("bundles", "cors_origins")  # in the environment and after --set: with commas between
_TABLES = ("api_keys", "aliases", "student_weights")  # there: as JSON

Share = Annotated[float, Field(gt=0)]


class SettingsError(ValueError):
    """Settings that cannot be used. One line: the field, what is wrong, what would be right."""


class Settings(BaseModel):
    """What a server needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bundles: tuple[str, ...] = Field(default=(DEFAULT_BUNDLE,), min_length=1)  # folders or embedded names
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)  # 0: any free port
    grpc: bool = True
    grpc_port: int | None = Field(default=None, ge=0, le=65535)  # None: the next one after port; 0: any free port
    repository: Path | None = None  # folder of bundles that clients may load; None: only reload what is served
    tables_folder: Path | None = None  # whose tables are served too, as they come and go; see tables
    aliases: dict[str, str | dict[str, float]] = {}  # other names: of a student, or of several with their parts
    # Work
    max_rows: int = Field(default=16, ge=1, le=4096)  # rows that run together, per student
    threads: int | None = Field(default=None, ge=1)  # CPU threads of one network call; None: all cores
    device: Literal["cpu", "cuda", "tensorrt"] = "cpu"  # the last two not run on a GPU yet
    precision: str = "float32"  # or what `fewstep export --precision` added to the bundles; tensorrt: of the engine
    simulate: str | None = None  # "A+B": a simulated accelerator, whose call on n rows takes A + B n ms
    encoders: int = Field(default=1, ge=1, le=64)  # threads that encode what is not small
    student_weights: dict[str, Share] = {}  # of the device, where several students have work; else 1
    # Limits
    max_waiting: int = Field(default=1024, ge=1)  # samples in line, per student
    max_waiting_pixels: int = Field(default=1 << 28, ge=1)  # and their pixels
    max_images: int = Field(default=64, ge=1)  # n of one request
    max_steps: int | None = Field(default=None, ge=1)  # of one image: tables with more are not served; None: all are
    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    max_connections: int = Field(default=4096, ge=1)  # open at once over HTTP, and over gRPC; further ones are refused
    request_timeout_s: float = Field(default=30.0, gt=0)  # for a request to be there
    ageing_s: float = Field(default=10.0, gt=0)  # time in line that is worth one level of priority
    max_jobs: int = Field(default=1000, ge=1)  # under way or finished, of each caller
    max_job_bytes: int = Field(default=1 << 28, ge=1)  # of each caller's results; the oldest go first
    job_ttl_s: float = Field(default=600.0, gt=0)  # for which a finished job is kept
    drain_timeout_s: float = Field(default=30.0, gt=0)  # for accepted requests, after SIGTERM; then they are cut off
    # Who may call
    api_keys: dict[str, ApiKey] = {}  # by the caller's name; none: everybody
    api_keys_file: Path | None = None  # more of them: a TOML file with api_keys
    cors_origins: tuple[str, ...] = ()  # pages of these may call from a browser; "*" for all
    tls_certfile: Path | None = None  # PEM, with the chain; for HTTP and gRPC
    tls_keyfile: Path | None = None  # PEM
    # Logs and traces
    log_format: LogFormat = "text"
    otlp_endpoint: str | None = None  # an OpenTelemetry collector's URL for traces over HTTP
    trace_ratio: float = Field(default=1.0, ge=0, le=1)  # of the requests whose caller does not say
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    access_log: bool = False

    @model_validator(mode="after")
    def _tls_is_both(self) -> "Settings":
        if (self.tls_certfile is None) != (self.tls_keyfile is None):
            raise ValueError("tls_certfile and tls_keyfile belong together: give both or neither")
        return self

    @model_validator(mode="after")
    def _one_thing_runs_the_networks(self) -> "Settings":
        if self.simulate and (self.device != "cpu" or self.precision != "float32"):
            raise ValueError("simulate runs no network: leave device and precision out")
        return self

    @classmethod
    def load(
        cls,
        file: Path | None,
        flags: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        said_set: Sequence[str] = (),
    ) -> "Settings":
        """Settings from a TOML file, the environment, and the flags that were given (those that are not None).

        Args:
            file: if any; else what ``FEWSTEP_CONFIG`` names.
            flags: by field.
            environment: such as ``os.environ``; none when left out.
            said_set: ``name=value`` for any field, as the environment has values; flags win.

        Raises:
            SettingsError: a file cannot be read, or a value is not allowed.
        """
        said = {
            name.removeprefix(PREFIX): value
            for name, value in (environment or {}).items()
            if name.startswith(PREFIX) and value
        }
        config = said.pop("CONFIG", None)
        if file is None and config is not None:
            file = Path(config)
        values: dict[str, Any] = {} if file is None else _read(file)
        in_environment = {name.lower(): value for name, value in said.items() if name not in SECRETS}
        values |= _from_text(in_environment, lambda name: PREFIX + name.upper(), [*map(str.lower, SECRETS), "config"])
        values |= _from_text(_pairs(said_set), lambda name: f"--set {name}")
        values |= {name: value for name, value in flags.items() if value is not None}
        keys = dict(values.get("api_keys", {}))
        if values.get("api_keys_file"):
            more = Path(values["api_keys_file"])
            found = _read(more)
            if list(found) not in ([], ["api_keys"]):
                raise SettingsError(f"{more}: holds {', '.join(found)}; only [api_keys.NAME] is read from it")
            keys |= found.get("api_keys", {})
        for name, is_admin in SECRETS.items():
            if name in said:
                keys[name.lower()] = {"sha256": hashed(said[name]), "admin": is_admin}
        if keys:
            values["api_keys"] = keys
        return cls._checked(values)

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> "Settings":
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                fields = ApiKey.model_fields if name.startswith("api_keys.") else cls.model_fields
                near = difflib.get_close_matches(name.rpartition(".")[2], fields, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(fields)}"
                raise SettingsError(f"{name} is not a setting{hint}") from None
            if not name:
                raise SettingsError(first["msg"].removeprefix("Value error, ")) from None
            given = "..." if name.startswith("api_keys") else repr(first["input"])
            raise SettingsError(f"{name} = {given}: {first['msg']}") from None

    def to_toml(self) -> str:
        """The settings as a file that gives them again; keys are there as hashes only."""
        lines, tables = [], []
        for name, value in self.model_dump(mode="json", exclude={"api_keys_file"}).items():
            if value is None:
                lines.append(f"# {name} is not set")
            elif isinstance(value, dict):
                plain = {key: item for key, item in value.items() if not isinstance(item, dict)}
                tables += [f"\n[{name}]"] if plain else []
                tables += [f"{json.dumps(key)} = {_toml(item)}" for key, item in plain.items()]
                for key in value.keys() - plain.keys():
                    tables.append(f"\n[{name}.{json.dumps(key)}]")
                    entries = value[key].items()
                    tables += [f"{json.dumps(field)} = {_toml(one)}" for field, one in entries if one is not None]
            else:
                lines.append(f"{name} = {_toml(value)}")
        return "\n".join([*lines, *tables]) + "\n"


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: is not TOML: {error}") from None


def _pairs(said_set: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for said in said_set:
        name, equals, value = said.partition("=")
        if not equals:
            raise SettingsError(f"--set {said}: must be NAME=VALUE, such as max_images=8")
        pairs[name.strip().replace("-", "_")] = value
    return pairs


def _from_text(said: Mapping[str, str], spell: Callable[[str], str], others: Sequence[str] = ()) -> dict[str, Any]:
    """Values by field that were said as text; ``spell`` gives a name as it was said, and ``others`` may be said too."""
    values: dict[str, Any] = {}
    for name, text in said.items():
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name, [*Settings.model_fields, *others], n=1)
            hint = f"; did you mean {spell(near[0])}?" if near else ""
            raise SettingsError(f"{spell(name)} is not a setting{hint}")
        if name in _LISTS:
            values[name] = tuple(part.strip() for part in text.split(","))
        elif name in _TABLES:
            try:
                values[name] = json.loads(text)
            except ValueError:
                raise SettingsError(f"{spell(name)}: must be JSON") from None
        else:
            values[name] = text
    return values


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)
