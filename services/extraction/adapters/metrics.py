"""What operators see of extraction: throughput, and how full the caches are."""

from __future__ import annotations

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.extraction.domain import Match


class ExtractionMetrics:
    """Implements the port `Meters`; the caches' bytes are set by who keeps them tidy."""

    def __init__(self, registry: CollectorRegistry, limit_bytes: int) -> None:
        self._requests = Counter(
            "extraction_requests", "Extractions asked for, by how a cache matched", ["cache"], registry=registry
        )
        for match in get_args(Match):
            self._requests.labels(match)
        self._tokens = Counter("extract_tokens", "Tokens whose activations were written", registry=registry)
        self._bytes = Counter("extract_bytes_written", "Bytes of shards that were written", registry=registry)
        self.cache_bytes = Gauge("cache_bytes", "Bytes of activation caches on this host", registry=registry)
        Gauge("cache_limit_bytes", "Most bytes of activation caches on this host", registry=registry).set(limit_bytes)

    def asked(self, match: Match) -> None:
        """Count a request."""
        self._requests.labels(match).inc()

    def written(self, tokens: int, size_bytes: int) -> None:
        """Count a unit."""
        self._tokens.inc(tokens)
        self._bytes.inc(size_bytes)
