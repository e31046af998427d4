"""Logs on standard error: lines for people, or one JSON object a line for machines.

What is logged while a request is answered has its id. In text a record begins where a line does and nowhere else,
whatever clients put into paths: control characters are escaped, and tracebacks are indented.
"""

import json
import logging
import re
import time
from contextvars import ContextVar
from typing import Any, Literal

LogFormat = Literal["text", "json"]
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")  # of the request that is being answered

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and what the record has beside them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().rstrip(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message, and what the record has beside them."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """The line of a record."""
        fields = {name: value for name, value in _fields(record).items() if name.endswith(("_id", "ler"))}
        beside = "".join(f" {name}={value}" for name, value in fields.items() if value != "")
        return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], super().formatMessage(record).rstrip() + beside)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """The traceback below it."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(_CONTROLS.sub(" ", f"    {line}") for line in lines)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a record has beside its message."""
    name = REQUEST_ID.get()
    return {**({"request_id": name} if name else {}), **getattr(record, "fields", {})}


def set_up_logs(log_format: LogFormat, level: str, access_log: bool) -> None:
    """Send everything to standard error, from a level on."""
    handler = logging.StreamHandler()
    text = TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("fewstep.access").setLevel("INFO" if access_log else "WARNING")
