"""The line an operator sees, and the exit codes the documentation promises."""

from __future__ import annotations

import re
from pathlib import Path

from tmem_host.errors import ExitCode, OperatorError

OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"


def test_the_line_says_vm_what_and_what_to_try() -> None:
    error = OperatorError("quota is below zero", hint="a larger one", vm="a", code=ExitCode.USAGE)
    assert str(error) == "VM 'a': quota is below zero (try: a larger one)"
    assert str(OperatorError("disk full")) == "disk full"


def test_every_exit_code_is_documented() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", OPERATIONS.read_text(), re.MULTILINE)}
    assert documented == {*ExitCode, 130}
