"""What operators see of a device: its memory, how busy it is, loads, switches and fingerprints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.kit import errors
from services.residency.memory import DeviceMemory
from services.residency.pool import Pool
from services.residency.sensors import Sensors

LOAD_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SWITCH_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1)


class ResidencyMetrics:
    """Gauges read the pool when they are scraped; counters are told by the servicer."""

    def __init__(self, registry: CollectorRegistry, pool: Pool, memory: DeviceMemory, sensors: Sensors) -> None:
        labels = {"device": pool.device, "kind": memory.kind}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, list(labels), registry=registry).labels(**labels)

        gauge("device_memory_total_bytes", "Bytes the device has").set(memory.total_bytes)
        gauge("device_memory_budget_bytes", "Bytes we may use").set(memory.budget_bytes)
        gauge("device_memory_used_bytes", "Bytes of models and lenses on it").set_function(lambda: pool.used_bytes)
        gauge("device_memory_reserved_bytes", "Bytes promised to loads").set_function(lambda: pool.reserved_bytes)
        gauge("device_models", "Models on it").set_function(lambda: len(pool.residents))
        gauge("device_lenses", "Lenses on it").set_function(lambda: sum(len(r.lenses) for r in pool.residents))
        gauge("device_leases", "Leases held on its models").set_function(lambda: sum(r.leases for r in pool.residents))

        def told(name: str, text: str, field: str) -> None:
            gauge(name, f"{text}; NaN where the platform does not tell").set_function(
                lambda: _known(getattr(sensors.latest, field))
            )

        told("device_utilization_ratio", "How busy it is, 0 to 1", "utilization_ratio")
        told("device_memory_in_use_bytes", "Bytes in use on it, by every program", "used_bytes")
        told("device_memory_process_bytes", "Of these, bytes of this process and its children", "own_bytes")
        told("device_temperature_celsius", "Its temperature", "temperature_celsius")
        told("device_power_watts", "What it draws", "power_watts")
        self._loads = Counter("residency_loads", "Loads by result", ["result"], registry=registry)
        self._load_seconds = Histogram(
            "residency_load_seconds", "Seconds of a load", ["quantization"], buckets=LOAD_BUCKETS, registry=registry
        )
        self._switch_seconds = Histogram(
            "residency_switch_seconds", "Seconds of a switch within a group", buckets=SWITCH_BUCKETS, registry=registry
        )
        self._mismatches = Counter("residency_fingerprint_mismatch", "Fingerprints that differed", registry=registry)
        self._loads.labels("OK")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count fingerprint mismatches that leave the block."""
        try:
            yield
        except errors.LensmeshError as error:
            if error.reason == "FINGERPRINT_MISMATCH":
                self._mismatches.inc()
            raise

    def loaded(self, quantization: str, seconds: float) -> None:
        """A load succeeded."""
        self._loads.labels("OK").inc()
        self._load_seconds.labels(quantization).observe(seconds)

    def load_failed(self, reason: str) -> None:
        """A load failed."""
        self._loads.labels(reason).inc()

    def switched(self, seconds: float) -> None:
        """A lens was made active."""
        self._switch_seconds.observe(seconds)


def _known(value: float | None) -> float:
    return float("nan") if value is None else value
