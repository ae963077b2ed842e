"""Prometheus metrics of the control plane: counted as things happen, or read from the rows every few seconds."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.kit import errors
from services.kit.database import Database
from services.kit.events import outbox_depth
from services.kit.jobs.metrics import attempts, job_counts, oldest_queued_seconds
from services.registry.ports import Store

REFRESH_SECONDS = 5.0
STATUSES = ("pending", "loading", "ready", "failed", "unloaded")
CAUSES = ("memory", "resident_limit", "exclusive", "park_limit", "device_cleared", "out_of_memory", "pressure")
LOAD_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SWITCH_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 30)
ERROR_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class RegistryMetrics:
    """Implements Gauges; `refresh` shows what only the rows know."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._loads = Counter("registry_loads", "Loads that ended, by result", ["result"], registry=registry)
        self._load_seconds = Histogram(
            "registry_load_duration_seconds",
            "Seconds that good loads took on their hosts",
            ["quantization"],
            buckets=LOAD_BUCKETS,
            registry=registry,
        )
        self._load_failures = Counter(
            "registry_load_failures", "Loads that failed, by reason", ["reason"], registry=registry
        )
        self._estimate_error = Histogram(
            "registry_estimate_error_ratio",
            "Difference between estimated and measured bytes over the measured ones",
            buckets=ERROR_BUCKETS,
            registry=registry,
        )
        self._evictions = Counter("registry_evictions", "Models evicted, by cause", ["cause"], registry=registry)
        self._switch_seconds = Histogram(
            "registry_switch_seconds",
            "Seconds of lens switches in the registry, by kind",
            ["kind"],
            buckets=SWITCH_BUCKETS,
            registry=registry,
        )
        self._foreseen = Counter(
            "registry_foreseen_switches",
            "Switches for which another one was foreseen (miss) or this one (hit)",
            ["result"],
            registry=registry,
        )
        self._models = Gauge("registry_models", "Models by status", ["state"], registry=registry)
        self._pinned = Gauge("registry_pinned_models", "Models that are never evicted", registry=registry)
        self._lru_age = Gauge(
            "registry_lru_age_seconds", "Since the least recently used resident model was used", registry=registry
        )
        self._lenses = Gauge("registry_lenses_attached", "Lenses on devices", registry=registry)
        self._saved = Gauge("registry_shared_base_saved_bytes", "What sharing bases saves", registry=registry)
        device = partial(Gauge, labelnames=["device"], registry=registry)
        self._total = device("registry_device_capacity_bytes", "Bytes the device has")
        self._budget = device("registry_device_budget_bytes", "Bytes we may use")
        self._used = device("registry_device_used_bytes", "Bytes of models and lenses by the ledger")
        self._reserved = device("registry_device_reserved_bytes", "Bytes promised to loads and jobs")
        self._parked = device("registry_device_parked_bytes", "Bytes of parked models and lenses, in host memory")
        self._alive = device("registry_device_alive", "Whether the device's host is heard")
        self._jobs = Gauge("jobs", "Jobs by kind and state", ["kind", "state"], registry=registry)
        self._oldest = Gauge("job_queue_oldest_seconds", "Age of the oldest queued job", ["kind"], registry=registry)
        self._attempts = Gauge("job_attempts", "Times that jobs were started, by kind", ["kind"], registry=registry)
        self._outbox_depth = Gauge("outbox_depth", "Events that wait for the broker", registry=registry)
        self._outbox_lag = Gauge("outbox_lag_seconds", "Age of the oldest such event", registry=registry)
        for result in ("ready", "failed", "cancelled"):
            self._loads.labels(result)
        for status in STATUSES:
            self._models.labels(status)
        for cause in CAUSES:
            self._evictions.labels(cause)
        for result in ("hit", "miss"):
            self._foreseen.labels(result)
        for kind in ("within", "cross"):
            self._switch_seconds.labels(kind)

    def load_ended(self, outcome: str, quantization: str, seconds: float, estimate_error: float | None) -> None:
        """A load ended: `ready`, `cancelled`, or the reason of its failure."""
        self._loads.labels(outcome if outcome in ("ready", "cancelled") else "failed").inc()
        if outcome == "ready":
            self._load_seconds.labels(quantization).observe(seconds)
            if estimate_error is not None:
                self._estimate_error.observe(estimate_error)
        elif outcome != "cancelled":
            self._load_failures.labels(outcome).inc()

    def evicted(self, cause: str) -> None:
        """A model was evicted."""
        self._evictions.labels(cause).inc()

    def foreseen(self, *, hit: bool) -> None:
        """A user switched; whether to what was foreseen."""
        self._foreseen.labels("hit" if hit else "miss").inc()

    def switched(self, kind: str, seconds: float) -> None:
        """A switch was done."""
        self._switch_seconds.labels(kind).observe(seconds)

    async def refresh(self, store: Store, database: Database) -> None:
        """Read the rows once.

        Raises:
            errors.Unavailable: the database does not answer.
        """
        async with store.transaction() as tx:
            counted = await tx.counted()
            hosts = await tx.placement.all_hosts()
        for status in STATUSES:
            self._models.labels(status).set(counted.models.get(status, 0))
        self._pinned.set(counted.pinned)
        self._lru_age.set(counted.lru_age_seconds)
        self._lenses.set(counted.lenses)
        self._saved.set(counted.saved_bytes)
        for host in hosts:
            self._total.labels(host.name).set(host.total_bytes)
            self._budget.labels(host.name).set(host.budget_bytes)
            self._used.labels(host.name).set(0 if host.lost else host.used_bytes)
            self._reserved.labels(host.name).set(0 if host.lost else host.reserved_bytes)
            self._parked.labels(host.name).set(0 if host.lost else host.parked_bytes)
            self._alive.labels(host.name).set(not host.lost)
        async with database.connection() as conn:
            jobs = await job_counts(conn)
            oldest = await oldest_queued_seconds(conn)
            started = await attempts(conn)
            depth, lag = await outbox_depth(conn)
        self._jobs.clear()
        for (kind, state), count in jobs.items():
            self._jobs.labels(kind, state).set(count)
        for kind, seconds in oldest.items():
            self._oldest.labels(kind).set(seconds)
            self._attempts.labels(kind).set(started[kind])
        self._outbox_depth.set(depth)
        self._outbox_lag.set(lag)

    async def keep_fresh(self, store: Store, database: Database) -> None:
        """Until cancelled, read the rows every few seconds."""
        while True:
            with suppress(errors.Unavailable):  # the last figures stay; /readyz tells
                await self.refresh(store, database)
            await asyncio.sleep(REFRESH_SECONDS)
