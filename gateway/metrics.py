"""What the gateway counts; labels are route templates, never ids or users."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gateway.routes import Route
from services.kit.errors import Unauthenticated
from services.kit.metrics import RPC_BUCKETS


class GatewayMetrics:
    """The gateway's own metrics; every route's labels exist from the start, so that rates work from zero."""

    def __init__(self, registry: CollectorRegistry, routes: Iterable[Route], streams: Callable[[], float]) -> None:
        """Register them.

        Args:
            registry: where.
            routes: whose label sets exist from the start.
            streams: how many streams are open now.
        """
        labels = ["route", "method"]
        self.requests = Counter("http_requests", "HTTP requests answered", [*labels, "code"], registry=registry)
        self.seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds until a reply was complete; streams count when they end",
            labels,
            buckets=RPC_BUCKETS,
            registry=registry,
        )
        self.websockets = Gauge("gateway_ws_clients", "WebSocket clients connected", registry=registry)
        Gauge("gateway_streams", "Streams open to clients, of every kind", registry=registry).set_function(streams)
        self.dropped = Counter(
            "gateway_slow_clients_dropped", "Clients dropped because they took no bytes", registry=registry
        )
        self.auth_failures = Counter("auth_failures", "Calls refused for their token", ["reason"], registry=registry)
        for route in routes:
            verb, template = route.binding.verb, route.template.text
            success = (route.method.policy.success_status if route.method.policy else 0) or 200
            self.requests.labels(template, verb, str(success))
            self.seconds.labels(template, verb)

    def refused(self, error: Exception) -> None:
        """Count a call that is refused for its token."""
        if isinstance(error, Unauthenticated):
            self.auth_failures.labels(str(error.metadata.get("cause", "malformed"))).inc()
