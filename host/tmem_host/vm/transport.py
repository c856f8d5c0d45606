"""How vsock reaches a VM.

| transport | the guest's vsock device is | the host reaches it through |
|---|---|---|
| `vhost-vsock` | the host kernel's | AF_VSOCK and the VM's CID |
| `vhost-user` | tmemd's own, on a vhost-user socket | a hybrid unix socket |
| `vhost-device-vsock` | a process of that name for each VM | a hybrid unix socket |
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm import hybrid, process
from tmem_host.vm.process import Recorded

TransportName = Literal["vhost-vsock", "vhost-user", "vhost-device-vsock"]
TransportChoice = Literal["auto", "vhost-vsock", "vhost-user", "vhost-device-vsock"]

_PROGRAM = "vhost-device-vsock"
_PROGRAM_ENVIRONMENT = "TMEM_VHOST_DEVICE_VSOCK"
_KERNEL_DEVICE = Path("/dev/vhost-vsock")
_START_TIMEOUT_S = 10.0
_POLL_S = 0.01


@dataclass(frozen=True)
class Transport:
    """The vsock of one VM."""

    name: TransportName
    vm: str
    cid: int
    sockets: Path
    """Directory of its sockets."""
    logs: Path
    """Directory of its process's log, if it has a process of its own."""

    @property
    def hybrid_socket(self) -> Path | None:
        """The VM's hybrid socket; `None` with the kernel's device."""
        return None if self.name == "vhost-vsock" else self.sockets / "vsock.sock"

    @property
    def vhost_user_socket(self) -> Path | None:
        """Where QEMU finds the device's process; `None` with the kernel's device."""
        return None if self.name == "vhost-vsock" else self.sockets / "vhost.sock"

    def start(self) -> Recorded | None:
        """Start what the transport needs before the VM; returns the process there is for this VM alone.

        tmemd's own device is there once the VM is registered, and is only waited for.
        """
        recorded = None
        if self.name == "vhost-device-vsock":
            recorded = self._start_process()
        if self.vhost_user_socket is not None:
            self._wait_for_socket(self.vhost_user_socket, recorded)
        return recorded

    def connect(self, port: int, timeout_s: float) -> socket.socket:
        """Connect to a port of the guest. UNAVAILABLE if nothing listens there, TIMEOUT if nobody answers."""
        if self.hybrid_socket is not None:
            return hybrid.connect(self.hybrid_socket, port, timeout_s, vm=self.vm)
        stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            stream.settimeout(timeout_s)
            stream.connect((self.cid, port))
            stream.settimeout(None)
        except OSError as error:
            stream.close()
            code = ExitCode.TIMEOUT if isinstance(error, TimeoutError) else ExitCode.UNAVAILABLE
            raise OperatorError(f"vsock port {port} of the guest: {error}", vm=self.vm, code=code) from error
        return stream

    def listen(self, port: int) -> socket.socket:
        """Listen for what the guest sends to a port of the host."""
        if self.hybrid_socket is not None:
            return hybrid.listen(self.hybrid_socket, port)
        stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            stream.bind((socket.VMADDR_CID_ANY, port))
            stream.listen(16)
        except BaseException:
            stream.close()
            raise
        return stream

    def _start_process(self) -> Recorded:
        assert self.hybrid_socket is not None and self.vhost_user_socket is not None  # noqa: S101
        self.sockets.mkdir(parents=True, exist_ok=True)
        command = [str(find_program()), "--guest-cid", str(self.cid)]
        command += ["--uds-path", str(self.hybrid_socket), "--socket", str(self.vhost_user_socket)]
        return process.start(command, self.logs / "vsock.log")

    def _wait_for_socket(self, path: Path, recorded: Recorded | None) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not path.is_socket():
            dead = recorded is not None and process.find(recorded) is None
            if dead or time.monotonic() > deadline:
                who = _PROGRAM if recorded else "tmemd"
                what = "ended at once" if dead else f"did not make its socket within {_START_TIMEOUT_S:g} s"
                raise OperatorError(
                    f"{who} {what}: {path}",
                    vm=self.vm,
                    hint=f"see {self.logs / 'vsock.log'}" if recorded else "journalctl -u tmemd",
                    code=ExitCode.UNAVAILABLE,
                )
            threading.Event().wait(_POLL_S)


def choose(wanted: TransportChoice, *, registered: bool = True) -> tuple[TransportName, str]:
    """The transport to use, and why. UNAVAILABLE if the one asked for cannot be had here.

    tmemd's own device is only for VMs that are registered with tmemd.
    """
    usable = _kernel_device_usable()
    if wanted == "vhost-vsock" and not usable:
        raise OperatorError(
            f"this host has no usable {_KERNEL_DEVICE}",
            hint="modprobe vhost_vsock, or another transport",
            code=ExitCode.UNAVAILABLE,
        )
    if wanted != "auto":
        return wanted, "as asked for"
    if usable:
        return "vhost-vsock", f"{_KERNEL_DEVICE} works"
    why = f"this host has no usable {_KERNEL_DEVICE}"
    return ("vhost-user" if registered else "vhost-device-vsock"), why


def _kernel_device_usable() -> bool:
    try:
        os.close(os.open(_KERNEL_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def find_program() -> Path:
    """The vhost-device-vsock program: TMEM_VHOST_DEVICE_VSOCK, a checkout's `build/tools`, or PATH."""
    if chosen := os.environ.get(_PROGRAM_ENVIRONMENT):
        return Path(chosen)
    local = Path(__file__).parents[3] / "build/tools/bin" / _PROGRAM
    if local.is_file():
        return local
    if found := shutil.which(_PROGRAM):
        return Path(found)
    raise OperatorError(
        f"{_PROGRAM} is not installed",
        hint=f"cargo install --locked --root build/tools {_PROGRAM}",
        code=ExitCode.UNAVAILABLE,
    )
