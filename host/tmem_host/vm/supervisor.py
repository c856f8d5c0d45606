"""Runs libvirtd where there is no init system: `python supervisor.py LIBVIRTD_CONFIG QEMU_CONFIG`.

libvirt's QEMU processes detach themselves, and libvirt takes them for running until somebody has collected
them. The first process of a container or of a CI machine does that late or never, and every step of libvirt
then waits for many seconds. So this one adopts them and collects them at once.

libvirtd sees QEMU_CONFIG in the place of /etc/libvirt/qemu.conf, in a mount namespace of its own: the
machine's configuration stays as it is. Only the standard library: this process lives as long as the VMs do,
and should be small.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

_QEMU_CONFIG = "/etc/libvirt/qemu.conf"
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# From <sys/prctl.h>, <sched.h> and <sys/mount.h>.
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNS = 0x20000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_SLAVE = 0x80000


class _StopError(Exception):
    """Asked to end."""


def _on_stop(_number: int, _frame: object) -> None:
    raise _StopError


def _isolate(qemu_config: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    check(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    check(libc.unshare(_CLONE_NEWNS))
    # What is mounted outside later on is still seen here; the mount below is not seen outside.
    check(libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None))
    check(libc.mount(qemu_config.encode(), _QEMU_CONFIG.encode(), None, _MS_BIND, None))


def main(configuration: str, qemu_config: str) -> int:
    """Run libvirtd until SIGTERM, or until it ends by itself (exit code 1)."""
    for number in _STOP_SIGNALS:
        signal.signal(number, _on_stop)
    _isolate(qemu_config)
    libvirtd = subprocess.Popen(["libvirtd", "--config", configuration], stdin=subprocess.DEVNULL).pid
    try:
        while os.wait()[0] != libvirtd:
            pass
    except _StopError:
        os.kill(libvirtd, signal.SIGTERM)
        with contextlib.suppress(ChildProcessError):
            while os.wait()[0] != libvirtd:
                pass
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
