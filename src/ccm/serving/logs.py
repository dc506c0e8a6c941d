"""Log lines with the id of the request that they belong to: for a person on a terminal, or one JSON object each."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar

from ..errors import UnknownNameError

#: Id of the request that this task, or a thread that works for it, is busy with.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
#: What ``--log-format`` takes; auto is text on a terminal and JSON elsewhere.
FORMATS = ("auto", "text", "json")


class JsonLines(logging.Formatter):
    """A record as one line; a dictionary in ``extra={"fields": …}`` becomes part of it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request": request_id.get(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Words(logging.Formatter):
    """A record for a person: the time of day, the level where it matters, the message, and whose request it was."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        parts = [time.strftime("%H:%M:%S", time.localtime(record.created))]
        parts += [f"{record.levelname}:"] if record.levelno > logging.INFO else []
        parts += [record.getMessage()]
        parts += [f"{fields['seconds']:.2f} s"] if "seconds" in fields else []
        parts += [str(fields["tenant"])] if fields.get("tenant") else []
        parts += [f"({name})"] if (name := request_id.get()) else []
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def check_format(name: str) -> str:
    """The format, if it is one. Raises UnknownNameError."""
    if name not in FORMATS:
        raise UnknownNameError("log format", name, list(FORMATS))
    return name


def to_stderr(log_format: str = "auto") -> None:
    """Write every record, and one for every request, to stderr.

    Args:
        log_format: one of :data:`FORMATS`.
    """
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Words() if text else JsonLines())
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("ccm.access").setLevel(logging.INFO)
