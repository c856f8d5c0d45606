"""`python -m tmem_host.demo`: the same as `tmemctl demo`."""

from __future__ import annotations

import sys

from tmem_host.cli.main import run

sys.exit(run(["demo", *sys.argv[1:]]))
