"""grpc.health that also says why a process is not ready, for the gateway's /readyz."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpc_health.v1 import health, health_pb2

REASON_KEY = "x-not-ready"
"""Trailing metadata of a Check: the failing readiness checks, `name: why`, in ASCII."""


class Health(health.aio.HealthServicer):
    """The standard servicer; a Check of a process that is not ready carries the reason."""

    def __init__(self) -> None:
        super().__init__()
        self._reason = ""

    async def report(self, failing: Mapping[str, str]) -> None:
        """Show the state of the readiness checks.

        Args:
            failing: name and reason of each check that fails; empty when the process is ready.
        """
        told = "; ".join(f"{name}: {reason}" for name, reason in failing.items())
        self._reason = told.encode("ascii", "replace").decode()
        state = health_pb2.HealthCheckResponse.NOT_SERVING if failing else health_pb2.HealthCheckResponse.SERVING
        await self.set("", state)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """The state, with the reason beside it."""
        if self._reason:
            context.set_trailing_metadata(((REASON_KEY, self._reason),))
        return await super().Check(request, context)
