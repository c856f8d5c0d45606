"""Policies by the names and parameters operators write: `tmemctl policy set smart-alloc percent=4`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tmem_host.policies.greedy import Greedy
from tmem_host.policies.smart_alloc import SmartAlloc
from tmem_host.policies.snapshot import Policy
from tmem_host.policies.static import Static


class PolicyError(ValueError):
    """An unknown policy or parameter, or a value out of range; the text is fit for an operator."""


class UnknownPolicyError(PolicyError):
    """No policy of that name."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number a policy takes: its default and the range it must lie in."""

    name: str
    default: float
    low: float
    high: float
    summary: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy as the catalogue lists it."""

    name: str
    summary: str
    parameters: tuple[Parameter, ...]
    build: Callable[[Mapping[str, float]], Policy]


_CATALOGUE = {
    entry.name: entry
    for entry in (
        Entry("static", "a fixed share by weight for every VM", (), lambda _: Static()),
        Entry("greedy", "no targets: every VM may use the total", (), lambda _: Greedy()),
        Entry(
            "smart-alloc",
            "grow VMs whose puts are refused, shrink VMs that leave quota unused",
            (
                Parameter("percent", 6.0, 0.1, 100.0, "P: step per interval, percent"),
                Parameter("threshold_percent", 5.0, 0.0, 100.0, "percent of the total a VM may leave unused"),
            ),
            lambda values: SmartAlloc(values["percent"], values["threshold_percent"]),
        ),
    )
}


def names() -> tuple[str, ...]:
    """Names of all policies."""
    return tuple(_CATALOGUE)


def describe(name: str) -> Entry:
    """The catalogue's entry for `name`. Raises `UnknownPolicyError`."""
    try:
        return _CATALOGUE[name]
    except KeyError:
        known = ", ".join(_CATALOGUE)
        raise UnknownPolicyError(f"no policy is called {name!r}; there are {known}") from None


def make(name: str, parameters: Mapping[str, float] | None = None) -> Policy:
    """The policy `name` with these parameters, defaults for the rest.

    Raises `UnknownPolicyError`, and `PolicyError` for an unknown parameter or a value out of its range.
    """
    entry = describe(name)
    values = {parameter.name: parameter.default for parameter in entry.parameters}
    ranges = {parameter.name: parameter for parameter in entry.parameters}
    for key, value in (parameters or {}).items():
        if key not in ranges:
            takes = "it takes " + ", ".join(ranges) if ranges else "it takes none"
            raise PolicyError(f"policy {name!r} has no parameter {key!r}; {takes}")
        low, high = ranges[key].low, ranges[key].high
        if not low <= value <= high:
            raise PolicyError(f"{key} of policy {name!r} must be from {low:g} to {high:g}, not {value:g}")
        values[key] = float(value)
    return entry.build(values)
