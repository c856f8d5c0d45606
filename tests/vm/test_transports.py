"""What every transport must carry unharmed, from real guests: tmemd's own device, and somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest
from framework.vms import COMMAND_S, Vms

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

_PROGRAM = "/usr/bin/tmem-bench"


@pytest.mark.parametrize(
    ("transport", "options", "checks"),
    [
        ("vhost-user", "", 8),
        # It loses longer packets, and what follows on a stream that one side has ended.
        pytest.param(
            *("vhost-device-vsock", "--write-bytes 28672 --no-half-close", 7),
            marks=pytest.mark.long,  # `make test-long` installs it
        ),
    ],
)
def test_it_carries_everything_unharmed(
    module_vms: Vms, bench_program: Path, transport: str, options: str, checks: int
) -> None:
    guest = module_vms.up(transport=transport, files={_PROGRAM: bench_program.read_bytes()})
    with guest.ssh() as shell:
        check = f"chmod 755 {_PROGRAM}; {_PROGRAM} check vsock:2:29805 {options}"
        assert shell.check(check, deadline_s=4 * COMMAND_S).count('"result": "ok"') == checks
