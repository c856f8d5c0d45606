"""`python -m tmem_host.vm.proxy VM PORT`: stdin and stdout to a vsock port of a VM, for OpenSSH."""

from __future__ import annotations

import os
import select
import sys

from tmem_host.errors import OperatorError
from tmem_host.vm import machine

_CHUNK_BYTES = 32 << 10
_CONNECT_TIMEOUT_S = 20.0


def main() -> int:
    """Copy both ways until one side ends."""
    try:
        stream = machine.get(sys.argv[1]).transport.connect(int(sys.argv[2]), _CONNECT_TIMEOUT_S)
    except OperatorError as error:
        print(error, file=sys.stderr)
        return error.code
    with stream:
        while True:
            readable, _, _ = select.select([0, stream.fileno()], [], [])
            if stream.fileno() in readable:
                data = stream.recv(_CHUNK_BYTES)
                if not data:
                    return 0
                _write(1, data)
            if 0 in readable:
                data = os.read(0, _CHUNK_BYTES)
                if not data:
                    return 0
                stream.sendall(data)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    sys.exit(main())
