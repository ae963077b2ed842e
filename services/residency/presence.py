"""Tell the registry that this host is here, and keep telling it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from lensmesh.registry.v1 import devices_pb2, devices_pb2_grpc

from services.kit.logs import get_logger
from services.residency.memory import DeviceMemory
from services.residency.messages import hosted_model
from services.residency.pool import Pool
from services.residency.sensors import Sensors

RETRY_SECONDS = 1.0
"""Between attempts to reach a registry that does not answer."""
CALL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Presence:
    """This process in the registry's eyes."""

    registry: grpc.aio.Channel
    pool: Pool
    memory: DeviceMemory
    sensors: Sensors
    host_id: str
    incarnation: str
    address: str
    services: Sequence[str]

    async def announce(self) -> None:
        """Register, then send heartbeats, until cancelled; a registry that is away is waited for."""
        stub = devices_pb2_grpc.PlacementServiceStub(self.registry)
        log = get_logger("presence")
        reached = True
        while True:
            try:
                await self._stay(stub)
            except grpc.aio.AioRpcError as error:
                if reached:
                    log.warning("the registry does not answer", code=error.code().name)
                reached = False
                await asyncio.sleep(RETRY_SECONDS)
            else:
                reached = True

    async def _stay(self, stub: devices_pb2_grpc.PlacementServiceStub) -> None:
        """Register and heartbeat until the registry asks for a new registration."""
        answer = await stub.RegisterHost(self._registration(), timeout=CALL_SECONDS)
        while True:
            await asyncio.sleep(answer.heartbeat_seconds)
            await asyncio.to_thread(self.sensors.look)
            if (await stub.Heartbeat(self._heartbeat(), timeout=CALL_SECONDS)).register_again:
                return

    def _registration(self) -> devices_pb2.RegisterHostRequest:
        return devices_pb2.RegisterHostRequest(
            host_id=self.host_id,
            incarnation=self.incarnation,
            address=self.address,
            device=self.pool.device,
            kind=self.memory.kind,
            total_bytes=self.memory.total_bytes,
            budget_bytes=self.memory.budget_bytes,
            park_bytes=self.memory.park_bytes,
            services=self.services,
            models=[hosted_model(resident) for resident in self.pool.residents],
            accelerator="" if self.pool.device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        )

    def _heartbeat(self) -> devices_pb2.HeartbeatRequest:
        seen = self.sensors.latest
        return devices_pb2.HeartbeatRequest(
            host_id=self.host_id,
            incarnation=self.incarnation,
            models=[hosted_model(resident) for resident in self.pool.residents],
            used_bytes=self.pool.used_bytes,
            temperature_celsius=seen.temperature_celsius,
            utilization_ratio=seen.utilization_ratio,
            power_watts=seen.power_watts,
            device_used_bytes=seen.used_bytes,
            process_bytes=seen.own_bytes,
        )
