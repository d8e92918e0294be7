"""Logs as JSON lines with the id of the request, and without secrets."""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

# Tokens of fedvit, and JSON web tokens.
_SECRETS = re.compile(r"fvt_[0-9a-f]{12}_[A-Za-z0-9_-]+|eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def redact(text: str) -> str:
    """The text with every bearer token in it blotted out."""
    return _SECRETS.sub("[redacted]", text)


class JsonLines(logging.Formatter):
    """One JSON object a record: its own fields, ``extra`` and the request's id."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=str))


def log_to_file(logger: logging.Logger, path: Path) -> None:
    """Append the logger's records to ``path`` as JSON lines, and nowhere else; harmless when done twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several replicas append to the one file; this handler also follows it when logrotate moves it away.
    handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(JsonLines())
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
