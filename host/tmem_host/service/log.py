"""Log lines: `TIME LEVEL module: message key=value …`, as the native engine writes its own."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class LineFormatter(logging.Formatter):
    """One line an event; what was given as `extra` stands at its end."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        extra = "".join(f" {key}={value}" for key, value in vars(record).items() if key not in _PLAIN)
        line = f"{time[:-6]}Z {record.levelname:>5} {record.name}: {record.getMessage()}{extra}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def set_up(level: str) -> None:
    """Log to standard error from `level` up."""
    logging.addLevelName(logging.WARNING, "WARN")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
