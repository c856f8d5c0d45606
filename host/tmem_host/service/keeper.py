"""The keeper: a process that holds what the VMs' vsock devices need to outlive tmemd.

It is `tmem_native.run_keeper` and nothing else. Where there is systemd it is a unit of its own
(`tmem-keeper.service`); elsewhere tmemd starts it when the first VM with such a device is registered. It ends
by itself once no device is left and tmemd is gone.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import tmem_native

from tmem_host.errors import OperatorError

_START_TIMEOUT_S = 10.0
_POLL_S = 0.02
_LINGER_S = 5.0


def is_running(path: Path) -> bool:
    """Whether a keeper listens at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def ensure(path: Path) -> Path:
    """Start a keeper at `path` unless one runs there; returns the path. Raises OperatorError.

    It is no child in any sense that matters: a session of its own, and nobody waits for it.
    """
    if is_running(path):
        return path
    command = [sys.executable, "-m", "tmem_host.service.keeper", str(path)]
    quiet = subprocess.DEVNULL
    keeper = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not is_running(path):
        if keeper.poll() is not None or time.monotonic() > deadline:
            raise OperatorError(
                f"the keeper of vsock devices did not start at {path}",
                hint=f"run it by hand to see why: {' '.join(command)}",
            )
        time.sleep(_POLL_S)
    return path


def main() -> None:
    """Run until nothing is held. The arguments are the socket's path and, for ever, `--stay`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    stay = "--stay" in sys.argv[2:]
    tmem_native.run_keeper(sys.argv[1], linger_s=1e9 if stay else _LINGER_S)


if __name__ == "__main__":
    main()
