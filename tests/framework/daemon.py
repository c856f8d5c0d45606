"""A real `tmemd` on sockets in a temporary directory."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tmem_host.api.client import Client as AdminClient
from tmem_host.api.types import Vm, VmSpec

from framework.client import Client as GuestClient
from framework.client import Feature, Role
from framework.process import Program

MIB = 1 << 20
PORT = 29805
ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
AS_NOBODY = [
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--bounding-set=-all", "--no-new-privs", "--"),
]


class Tmemd(Program):
    """A `tmemd` process; a context manager that leaves nothing behind."""

    def __init__(
        self, directory: Path, *, capacity: str = "64M", config: str = "", arena: str | None = None
    ) -> None:
        super().__init__(directory, "tmemd")
        self.admin_socket = directory / "admin.sock"
        self.arena = arena or str(directory / "arena")
        self._capacity = capacity
        self._config = directory / "tmemd.toml"
        self._config.write_text(config)

    def arguments(self) -> list[str]:
        return [
            *("--config", str(self._config)),
            *("--arena", self.arena),
            *("--capacity", self._capacity),
            *("--admin-socket", str(self.admin_socket)),
            *("--vm-directory", str(self.directory / "vm")),
            *("--state-directory", str(self.directory / "state")),
        ]

    def command(self) -> list[str]:
        """What to run."""
        return [sys.executable, "-m", "tmem_host.service.main", *self.arguments()]

    def environment(self) -> Mapping[str, str]:
        """So that tests run from a checkout that is not installed, too."""
        return {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("host", "guest", "native/py"))}

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


class Unprivileged(Tmemd):
    """A `tmemd` of a user who may do nothing but what any user may; the directory is given to that user."""

    def command(self) -> list[str]:
        return [*AS_NOBODY, *super().command()]

    def start(self) -> None:
        """The socket on which it says that it is ready is made by root, and must be open to it."""
        shutil.chown(self.directory, NOBODY, NOBODY)
        umask = os.umask(0)
        try:
            super().start()
        finally:
            os.umask(umask)
