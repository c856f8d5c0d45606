"""A guest in which tmem-agent runs, as tests talk to it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

from tmem_host.errors import OperatorError
from tmem_host.vm.machine import Machine
from tmem_host.vm.ssh import GuestShell

T = TypeVar("T")
COMMAND_S = 400.0
CONNECT_S = 60.0


class AgentGuest:
    """Shell lines in a guest, and what its agent says."""

    def __init__(self, up: Machine) -> None:
        self.up = up

    def run(self, line: str) -> str:
        """A shell line that must succeed; its output."""
        with self._connect() as shell:
            return shell.check(line, deadline_s=COMMAND_S)

    def _connect(self) -> GuestShell:
        """A shell; a guest that is short of memory may refuse a connection for a moment."""
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                return self.up.ssh()
            except OperatorError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def says(self, line: str, text: str) -> bool:
        """Whether a shell line, for now, succeeds and says this."""
        try:
            return text in self.run(line)
        except OperatorError:
            return False

    def status(self) -> dict[str, dict[str, object]]:
        """What `tmem-agent status` says."""
        answer: dict[str, dict[str, object]] = json.loads(self.run("tmem-agent status --json"))
        return answer

    def counters(self, part: str, name: str) -> dict[str, int]:
        """A part of the status that is a table of its own: `host`, `stats` or `swap`, `counters`."""
        table = self.status()[part][name]
        assert isinstance(table, dict)
        return table


def until(probe: Callable[[], T], what: str) -> T:
    """The first true answer of `probe`, within the deadline."""
    deadline = time.monotonic() + COMMAND_S
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.5)
    return answer
