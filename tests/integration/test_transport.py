"""What every transport must carry unharmed, over a VM's unix socket.

From guests: `tests/vm/test_transports.py` and `test_af_vsock.py`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from framework.daemon import Tmemd


def test_it_carries_everything_unharmed(tmemd: Tmemd, bench_program: Path) -> None:
    check = [str(bench_program), "check", f"unix:{tmemd.vm_socket('a')}"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"result": "ok"') == 8
