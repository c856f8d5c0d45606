"""A native store in a process of its own, which can be killed at any instant, as a daemon can."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import cast

import tmem_native

_ANSWER_TIMEOUT_S = 30.0
# Children come from a small server that has the module loaded already: a start takes a few milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tmem_native"])

Call = tuple[str, tuple[object, ...], dict[str, object]]


def _serve(connection: Connection, capacity_bytes: int, arena: str) -> None:
    store = tmem_native.Store(capacity_bytes, arena=arena)
    connection.send(None)
    while True:
        try:
            name, arguments, options = cast("Call", connection.recv())
        except EOFError:
            return
        try:
            answer = getattr(store, name)(*arguments, **options)
        except Exception as error:
            # The caller's, who raises it.
            answer = error
        connection.send(answer)


class StoreProcess:
    """Passes every call on to a store in another process and returns, or raises, what it answered."""

    def __init__(self, capacity_bytes: int, arena: str) -> None:
        self._connection, other = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(other, capacity_bytes, arena), daemon=True)
        self._process.start()
        other.close()
        self._answer()

    def _answer(self) -> object:
        if not self._connection.poll(_ANSWER_TIMEOUT_S):
            raise TimeoutError(f"the store's process did not answer within {_ANSWER_TIMEOUT_S:g} s")
        answer: object = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            self.begin(name, *arguments, **options)
            return self._answer()

        return call

    def begin(self, name: str, *arguments: object, **options: object) -> None:
        """Let it begin a call, and do not wait for the answer."""
        self._connection.send((name, arguments, options))

    def kill(self) -> None:
        """End it without a chance to tidy up; returns once it is gone."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join(_ANSWER_TIMEOUT_S)
        self._connection.close()

    def close(self) -> None:
        """Let it end by itself."""
        self._connection.close()
        self._process.join(_ANSWER_TIMEOUT_S)
