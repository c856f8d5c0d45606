"""The one exception an operator sees: what happened, to which VM, what to try, and the exit code."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `tmemctl` and the daemons (documented in docs/operations.md)."""

    OK = 0
    FAILED = 1  # something went wrong that is not in this list
    USAGE = 2  # bad command line or configuration
    NOT_FOUND = 3  # unknown VM, pool, image, policy or profile
    CONFLICT = 4  # name, CID, socket or port already taken
    UNAVAILABLE = 5  # tmemd, libvirtd or a guest is not there
    TIMEOUT = 6  # a deadline passed
    PRIVILEGE = 7  # not root, or a missing capability
    NO_SPACE = 8  # disk or memory is full


class OperatorError(Exception):
    """A failure an operator can act on.

    `message` says what happened, `vm` to which VM (if one is concerned), `hint` what to try.
    """

    def __init__(
        self, message: str, *, hint: str = "", vm: str | None = None, code: ExitCode = ExitCode.FAILED
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.vm = vm
        self.code = code

    def __str__(self) -> str:
        """One line: `VM 'a': quota is below zero (try: …)`."""
        where = f"VM '{self.vm}': " if self.vm else ""
        hint = f" (try: {self.hint})" if self.hint else ""
        return f"{where}{self.message}{hint}"
