"""tmemd's counters in Prometheus' text format. They are read from the engine when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from tmem_native import EngineError, latency_bounds

from tmem_host.service.lender import Lender

CONTENT_TYPE = CONTENT_TYPE_LATEST

_STORE_GAUGES = {
    "capacity_bytes": "Host memory that may be lent",
    "backed_bytes": "Host memory the arena takes now",
    "used_bytes": "Host memory charged to VMs",
    "payload_bytes": "Encoded pages, without headers",
    "metadata_bytes": "Headers, index and lists",
    "raw_bytes": "Stored pages before compression",
    "pages": "Pages stored",
    "same_filled_pages": "Pages stored that are one repeated word",
    "connections": "Connections open",
    "in_flight_bytes": "Large buffers held by connections",
}
_STORE_COUNTERS = {
    "pages_evicted": "Ephemeral pages evicted",
    "pages_moved": "Pages moved by compaction",
    "pages_lost": "Pages found damaged by their checksum",
}
_VM_GAUGES = {
    "quota_bytes": "Cap on host memory",
    "min_bytes": "Guaranteed minimum of host memory",
    "weight": "Share relative to other VMs",
    "stored_bytes": "Host memory used",
    "raw_bytes": "Stored pages before compression",
    "ephemeral_pages": "Pages in ephemeral pools",
    "persistent_pages": "Pages in persistent pools",
    "persistent_bytes": "Host memory used by persistent pages",
    "connections": "Connections open",
}
_VM_COUNTERS = {
    "puts_accepted": "Pages put",
    "puts_refused": "Puts refused",
    "gets_hit": "Gets that hit",
    "gets_missed": "Gets that missed",
    "pages_flushed": "Pages flushed by the guest",
    "pages_evicted": "Ephemeral pages evicted",
    "connections_opened": "Connections opened",
    "connections_refused": "Connections turned away by a limit",
    "protocol_errors": "Connections closed because the guest broke the protocol",
    "timeouts": "Connections closed because the guest was silent or did not read",
    "throttled": "Requests that waited for the rate limit",
    "gave_way": "Times that work for it was interrupted to let other VMs' threads run",
}
_REPORT_GAUGES = {
    "psi_some_avg10": "Guest's PSI memory some, percent",
    "psi_full_avg10": "Guest's PSI memory full, percent",
    "mem_available_bytes": "Guest's available memory",
    "swap_free_bytes": "Guest's free swap",
}


def exposition(lender: Lender) -> Callable[[], bytes]:
    """A function that gives all metrics of a lender as text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(lender))
    return lambda: generate_latest(registry)


class _Figures(Collector):
    def __init__(self, lender: Lender) -> None:
        self._lender = lender

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance: registering must not read the engine."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Read the engine."""
        usage = dict(self._lender.engine.usage())
        for name, text in _STORE_GAUGES.items():
            yield GaugeMetricFamily(f"tmem_{name}", text, value=float(str(usage[name])))
        for name, text in _STORE_COUNTERS.items():
            yield CounterMetricFamily(f"tmem_{name}", text, value=float(str(usage[name])))
        yield from self._vms()

    def _vms(self) -> Iterator[Metric]:
        gauges = {n: GaugeMetricFamily(f"tmem_vm_{n}", t, labels=["vm"]) for n, t in _VM_GAUGES.items()}
        counters = {n: CounterMetricFamily(f"tmem_vm_{n}", t, labels=["vm"]) for n, t in _VM_COUNTERS.items()}
        guest = {n: GaugeMetricFamily(f"tmem_guest_{n}", t, labels=["vm"]) for n, t in _REPORT_GAUGES.items()}
        frozen = GaugeMetricFamily("tmem_vm_frozen", "Whether puts are refused", labels=["vm"])
        requests = CounterMetricFamily("tmem_vm_requests", "Requests served", labels=["vm", "operation"])
        latency = HistogramMetricFamily(
            "tmem_vm_page_seconds", "Time to serve a page", labels=["vm", "operation"]
        )
        for name in self._lender.engine.vms():
            try:
                vm, latencies = self._lender.engine.vm(name), self._lender.engine.latencies(name)
            except EngineError:
                continue  # removed in this moment
            figures: dict[str, object] = dict(vm)
            for key, gauge in gauges.items():
                gauge.add_metric([name], float(str(figures[key])))
            for key, counter in counters.items():
                counter.add_metric([name], float(str(figures[key])))
            frozen.add_metric([name], float(vm["frozen"]))
            for operation, count in vm["frames"].items():
                requests.add_metric([name, operation], count)
            for operation, (counts, sum_s) in (("get", latencies["get"]), ("put", latencies["put"])):
                latency.add_metric([name, operation], buckets=_cumulative(counts), sum_value=sum_s)
            if vm["report"] is not None:
                report: dict[str, object] = dict(vm["report"])
                for key, gauge in guest.items():
                    gauge.add_metric([name], float(str(report[key])))
        yield from gauges.values()
        yield from counters.values()
        yield from guest.values()
        yield frozen
        yield requests
        yield latency


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    buckets, total = [], 0
    for bound, count in zip(latency_bounds(), counts, strict=True):
        total += count
        buckets.append(("+Inf" if math.isinf(bound) else repr(bound), float(total)))
    return buckets
