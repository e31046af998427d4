"""Logs on standard error: lines for people, or one JSON object a line for machines."""

import json
import logging
import time
from typing import Literal

LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and what the record has beside them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message, and what the record has beside them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, and its traceback below it."""
        fields = {name: value for name, value in getattr(record, "fields", {}).items() if name.endswith(("_id", "ler"))}
        beside = "".join(f" {name}={value}" for name, value in fields.items() if value != "")
        return super().format(record) + beside


def set_up_logs(log_format: LogFormat, level: str, access_log: bool) -> None:
    """Send everything to standard error, from a level on."""
    handler = logging.StreamHandler()
    text = TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("fewstep.access").setLevel("INFO" if access_log else "WARNING")
