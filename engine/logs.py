"""Log records as JSON lines on stderr: the same form in the front and in the engine process."""

from __future__ import annotations

import json
import logging
import sys
import time

LEVELS = ("debug", "info", "warning", "error")


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, process, logger, message, `extra={"fields": …}`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_json_lines(process: str, level: str) -> None:
    """Sends every logger's records to stderr. Called once, by a process's main function."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    set_log_level(level)


def set_log_level(level: str) -> None:
    """Of our own records. Libraries say no more than warnings: some log urls with passwords."""
    logging.getLogger("pilotlight").setLevel(level.upper())
