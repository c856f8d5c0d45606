"""The one exception an operator of the agent sees: what happened, what to try, and its exit code."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `tmem-agent`; they mean what those of `tmemctl` mean (docs/guest.md)."""

    OK = 0
    FAILED = 1  # something went wrong that is not in this list
    USAGE = 2  # bad command line or configuration
    NOT_FOUND = 3  # no such directory, mount or swap
    CONFLICT = 4  # already mounted, already on, in use
    UNAVAILABLE = 5  # the agent, a device or a kernel feature is not there
    TIMEOUT = 6  # a deadline passed
    PRIVILEGE = 7  # not root
    NO_SPACE = 8  # disk or memory is full


class AgentError(Exception):
    """A failure an operator can act on: `message` says what happened, `hint` what to try."""

    def __init__(self, message: str, *, hint: str = "", code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        """One line: `/srv is no directory (try: mkdir /srv)`."""
        return f"{self.message} (try: {self.hint})" if self.hint else self.message
