"""A real `tmemd` on sockets in a temporary directory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from tmem_host.api.client import Client as AdminClient
from tmem_host.api.types import Vm, VmSpec

from framework.client import Client as GuestClient
from framework.client import Feature, Role

MIB = 1 << 20
PORT = 29805
ROOT = Path(__file__).resolve().parents[2]
_READY_S = 20.0
_STOP_S = 20.0


class Tmemd:
    """A `tmemd` process; a context manager that leaves nothing behind.

    The directory must be short: socket paths have at most 107 bytes.
    """

    def __init__(
        self, directory: Path, *, capacity: str = "64M", config: str = "", arena: str | None = None
    ) -> None:
        self.directory = directory
        self.admin_socket = directory / "admin.sock"
        self.arena = arena or str(directory / "arena")
        self._capacity = capacity
        self._config = directory / "tmemd.toml"
        self._config.write_text(config)
        self._log = directory / "tmemd.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it wrote to standard error since the first start."""
        return self._log.read_text()

    def arguments(self) -> list[str]:
        return [
            *("--config", str(self._config)),
            *("--arena", self.arena),
            *("--capacity", self._capacity),
            *("--admin-socket", str(self.admin_socket)),
            *("--vm-directory", str(self.directory / "vm")),
            *("--state-directory", str(self.directory / "state")),
        ]

    def start(self) -> None:
        """Start it and wait until it says that it is ready."""
        address = self.directory / "notify.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self._log.open("ab") as log:
            ready.bind(str(address))
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tmem_host.service.main", *self.arguments()],
                    env=os.environ | {"NOTIFY_SOCKET": str(address), "PYTHONPATH": _python_path()},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
                self._await_ready(ready)
            finally:
                address.unlink()

    def _await_ready(self, ready: socket.socket) -> None:
        assert self._process is not None
        ready.settimeout(0.1)
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            try:
                if ready.recv(4096) == b"READY=1":
                    return
            except TimeoutError:
                if self._process.poll() is not None:
                    raise AssertionError(
                        f"tmemd ended with {self._process.returncode}:\n{self.log}"
                    ) from None
        self.kill()
        raise AssertionError(f"tmemd was not ready after {_READY_S} s:\n{self.log}")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        assert self._process is not None
        return self._process.wait(_STOP_S)

    def stop(self) -> int:
        """Stop it as systemd would; returns its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """kill -9, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(_STOP_S)

    def restart(self, *, kill: bool = False) -> None:
        """Stop or kill it, and start it again."""
        if kill:
            self.kill()
        else:
            assert self.stop() == 0, self.log
        self.start()

    def rss_bytes(self) -> int:
        """Anonymous memory it has resident: the arena's pages are shared memory and do not count."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024

    def admin(self) -> AdminClient:
        """A client of its admin API."""
        return AdminClient(self.admin_socket, timeout_s=20.0)

    def add_vm(self, name: str, **spec: int) -> Vm:
        """Register a VM with the default hybrid socket."""
        with self.admin() as admin:
            return admin.add_vm(name, VmSpec(**spec))  # type: ignore[arg-type]

    def vm_socket(self, name: str) -> Path:
        """Where the VM's guest connects to tmem's port."""
        return self.directory / "vm" / name / f"vsock.sock_{PORT}"

    def guest(
        self,
        name: str,
        *,
        role: Role = Role.SWAP,
        boot: int = 1,
        features: Feature = Feature.LZ4 | Feature.CHECKSUMS,
        timeout_s: float = 10.0,
        max_frame_bytes: int = 2 << 20,
    ) -> GuestClient:
        """A connection of a VM's guest."""
        return GuestClient(
            self.vm_socket(name),
            role=role,
            boot_id=boot.to_bytes(16, "little"),
            features=features,
            timeout_s=timeout_s,
            max_frame_bytes=max_frame_bytes,
        )


def _python_path() -> str:
    """So that tests run from a checkout that is not installed, too."""
    return os.pathsep.join(str(ROOT / part) for part in ("host", "guest", "native/py"))
