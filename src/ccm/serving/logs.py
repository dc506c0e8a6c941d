"""Log lines as JSON, one object each, with the id of the request that they belong to."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar

#: Id of the request that this task, or a thread that works for it, is busy with.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


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


def to_stderr() -> None:
    """Write every record, and one for every request, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("ccm.access").setLevel(logging.INFO)
