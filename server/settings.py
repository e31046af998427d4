"""Settings: one frozen object, built once at the door from a TOML file and the command line.

The file holds the fields below by their names; the command line wins over the file. Nothing is read from
anywhere else afterwards.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..runtime import DEFAULT_BUNDLE


class SettingsError(ValueError):
    """Settings that cannot be used. One line: the field, what is wrong, what would be right."""


class Settings(BaseModel):
    """What a server needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundles: tuple[str, ...] = Field(default=(DEFAULT_BUNDLE,), min_length=1)  # folders or embedded names
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)  # 0: any free port
    grpc: bool = True
    grpc_port: int | None = Field(default=None, ge=0, le=65535)  # None: the next one after port; 0: any free port
    repository: Path | None = None  # folder of bundles that clients may load; None: only reload what is served
    max_rows: int = Field(default=16, ge=1, le=4096)  # rows that run together, per student
    max_waiting: int = Field(default=1024, ge=1)  # samples in line, per student
    max_waiting_pixels: int = Field(default=1 << 28, ge=1)  # and their pixels
    ageing_s: float = Field(default=10.0, gt=0)  # time in line that is worth one level of priority
    max_images: int = Field(default=64, ge=1)  # n of one request
    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    tables_folder: Path | None = None  # whose tables are served too, as they come and go; see tables
    threads: int | None = Field(default=None, ge=1)  # CPU threads of one network call; None: all cores
    encoders: int = Field(default=1, ge=1, le=64)  # threads that encode images
    drain_timeout_s: float = Field(default=30.0, gt=0)  # for accepted requests, after SIGTERM
    access_log: bool = False

    @classmethod
    def load(cls, file: Path | None, flags: Mapping[str, Any]) -> "Settings":
        """Settings from a TOML file, if any, and the flags that were given (those that are not None).

        Raises:
            SettingsError: the file cannot be read, or a value is not allowed.
        """
        values: dict[str, Any] = {}
        if file is not None:
            try:
                values = tomllib.loads(file.read_text("utf-8"))
            except OSError as error:
                raise SettingsError(f"{file}: cannot be read: {error.strerror}") from None
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise SettingsError(f"{file}: is not TOML: {error}") from None
        values |= {name: value for name, value in flags.items() if value is not None}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                near = difflib.get_close_matches(name, cls.model_fields, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(cls.model_fields)}"
                raise SettingsError(f"{name} is not a setting{hint}") from None
            raise SettingsError(f"{name} = {first['input']!r}: {first['msg']}") from None
