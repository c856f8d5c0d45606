"""Fixtures for all tests are in `framework`."""

import signal

pytest_plugins = ["framework.fixtures"]

# Whoever ends a run (a deadline of CI) finds nothing left: fixtures are torn down as after Ctrl-C.
signal.signal(signal.SIGTERM, signal.default_int_handler)
# A shell's background jobs ignore it, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
