"""The live view: what each VM does now, what it said last, and its counters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tmem_host.cli.output import table
from tmem_host.cli.stats import HEADINGS, row
from tmem_host.errors import OperatorError

if TYPE_CHECKING:
    from tmem_host.api.types import Vm

_TERMINAL_INTERVAL_S = 1.0
_PLAIN_INTERVAL_S = 15.0
_LINE_LENGTH = 100


class Progress:
    """A table redrawn in place on a terminal; elsewhere (a CI log) lines as things happen, and counters now
    and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._started_s = time.monotonic()
        self._phases: dict[str, str] = {}
        self._words: dict[str, str] = {}
        self._lock = threading.Lock()
        self._watch: Callable[[], Sequence[Vm]] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        """Start to draw."""
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Report a step of the whole."""
        self._console.print(Text(f"{self._clock()}  {text}"), soft_wrap=True)

    def phase(self, vm: str, text: str) -> None:
        """Report what a VM does from now on."""
        with self._lock:
            self._phases[vm] = text
            self._words[vm] = ""
        self.say(f"{vm}: {text}")

    def hear(self, vm: str) -> Callable[[str], None]:
        """A listener for a workload's live output; its last line is shown."""

        def listen(piece: str) -> None:
            lines = [line.strip() for line in piece.replace("\r", "\n").splitlines() if line.strip()]
            if lines:
                with self._lock:
                    self._words[vm] = lines[-1][:_LINE_LENGTH]

        return listen

    def watch(self, source: Callable[[], Sequence[Vm]] | None) -> None:
        """Show the counters `source` returns from now on (None: no longer)."""
        self._watch = source

    def _run(self) -> None:
        interval_s = _TERMINAL_INTERVAL_S if self._live else _PLAIN_INTERVAL_S
        while not self._stop.wait(interval_s):
            source = self._watch
            try:
                vms = source() if source else []
            except OperatorError:
                # tmemd is on its way up or down; the next look will tell.
                continue
            if self._live:
                self._live.update(self._draw(vms), refresh=True)
            else:
                for vm in vms:
                    self.say(self._line(vm))

    def _draw(self, vms: Sequence[Vm]) -> Group:
        with self._lock:
            lines = [f"{vm}: {phase}  {self._words.get(vm, '')}" for vm, phase in self._phases.items()]
        parts = [Text(line, no_wrap=True, overflow="ellipsis") for line in [self._clock(), *lines]]
        return Group(*parts, *([table(HEADINGS, [row(vm) for vm in vms])] if vms else []))

    def _line(self, vm: Vm) -> str:
        with self._lock:
            words = self._words.get(vm.name, "")
        cells = ", ".join(
            f"{heading} {cell}" for heading, cell in zip(HEADINGS[1:], row(vm)[1:], strict=True)
        )
        return f"{vm.name}: {cells}" + (f" | {words}" if words else "")

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started_s), 60)
        return f"{minutes:2}:{seconds:02}"
