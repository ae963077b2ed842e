"""The supervisor's own metrics, in Prometheus form."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from services.runtime.supervisor import Supervisor


class _Processes:
    """Reads the supervisor at every scrape."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("supervisor_process_up", "1 while the process runs.", labels=["process"])
        failed = GaugeMetricFamily("supervisor_process_failed", "1 once it was given up.", labels=["process"])
        restarts = CounterMetricFamily("supervisor_process_restarts", "Starts after a crash.", labels=["process"])
        for name, kept in list(self._supervisor.kept.items()):
            running.add_metric([name], float(kept.child.running))
            failed.add_metric([name], float(kept.failed))
            restarts.add_metric([name], float(kept.restarts))
        return running, failed, restarts


def serve_metrics(address: str, supervisor: Supervisor) -> None:
    """Serve `supervisor_process_*` at host:port from a thread of its own, as long as the process lives."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Processes(supervisor))
    host, _, port = address.rpartition(":")
    start_http_server(int(port), host, registry)
