"""One round of the controller, and what happens when a part of it fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from tmem_host.api.client import Client
from tmem_host.api.types import Policy as PolicyChoice
from tmem_host.controller.applier import apply
from tmem_host.controller.domains import Domain
from tmem_host.controller.registrar import Registrar
from tmem_host.controller.sampler import Sampler
from tmem_host.errors import OperatorError
from tmem_host.policies import Policy, PolicyError, make

_log = logging.getLogger(__name__)


class Domains(Protocol):
    """What a round asks of libvirt."""

    def running(self) -> dict[str, Domain] | None:
        """Running domains by name; None while libvirt cannot be asked."""
        ...

    def take_stopped(self) -> list[str]:
        """Names of domains that stopped for good since the last call."""
        ...

    def is_stopped(self, name: str) -> bool:
        """Whether it is certain that the domain does not run."""
        ...


class NoDomains:
    """For hosts without libvirt: only VMs whose guests are connected take part."""

    def running(self) -> dict[str, Domain]:
        """None run, and that is certain."""
        return {}

    def take_stopped(self) -> list[str]:
        """None stop."""
        return []

    def is_stopped(self, name: str) -> bool:
        """Never certain."""
        del name
        return False


class Loop:
    """Collect, decide, apply. Keeps no state that a restart would miss, but the last counters."""

    def __init__(
        self,
        client: Client,
        domains: Domains,
        *,
        register: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`register`: whether domains that ask for tmem and are unknown to tmemd are registered."""
        self._client = client
        self._domains = domains
        self._register = register
        self._clock = clock
        self._registrar = Registrar()
        self._sampler = Sampler()
        self._choice: PolicyChoice | None = None
        self._policy: Policy | None = None
        self._waits_for = ""
        self.state = "starting"
        """A few words for `systemctl status`."""

    def round(self) -> int:
        """Do one round; returns how many quotas changed. On any doubt none do. Raises nothing an operator
        caused."""
        try:
            changed = self._round()
        except OperatorError as error:
            self._wait_for(f"tmemd: {error}")
            return 0
        return changed

    def _round(self) -> int:
        for name in self._domains.take_stopped():
            self._registrar.release(self._client, self._domains, name)
        running = self._domains.running()
        if running is None:
            self._wait_for("libvirt")
            return 0
        vms = self._client.vms()
        if self._register and self._registrar.register(self._client, running, [vm.name for vm in vms]):
            vms = self._client.vms()
        capacity_bytes = self._client.status().capacity_bytes
        snapshot = self._sampler.sample(capacity_bytes, vms, running, self._clock())
        policy = self._chosen()
        if policy is None:
            return 0
        self._wait_for("")
        self.state = f"{self._choice.name if self._choice else 'no policy'}, {len(snapshot.vms)} VMs"
        return apply(self._client, snapshot, policy.decide(snapshot))

    def _chosen(self) -> Policy | None:
        """The policy tmemd names; the one before if it cannot be made."""
        choice = self._client.policy()
        if choice != self._choice:
            self._choice = choice
            try:
                self._policy = make(
                    choice.name, {key: float(value) for key, value in choice.parameters.items()}
                )
            except (PolicyError, ValueError) as error:
                kept = "the policy before stays" if self._policy else "quotas stay as they are"
                _log.warning("policy %s cannot be used: %s; %s", choice.name, error, kept)
            else:
                _log.info("policy %s", _text(choice))
        return self._policy

    def _wait_for(self, what: str) -> None:
        if what and what != self._waits_for:
            _log.warning("quotas stay as they are, waiting for %s", what)
        elif self._waits_for and not what:
            _log.info("rebalancing again")
        self._waits_for = what
        if what:
            self.state = f"waiting for {what}"


def _text(choice: PolicyChoice) -> str:
    return " ".join([choice.name, *(f"{key}={value}" for key, value in choice.parameters.items())])
