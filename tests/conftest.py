"""Fixtures for all tests are in `framework`."""

pytest_plugins = ["framework.fixtures"]
