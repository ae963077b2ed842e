"""What a device process asks of the registry about devices: where a model is, and bytes of its own device's ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import grpc
from lensmesh.registry.v1 import devices_pb2, devices_pb2_grpc
from lensmesh.residency.v1 import residency_pb2_grpc

from services.kit import errors
from services.kit.waiting import Backoff
from services.residency.catalogue import LOAD_SECONDS, LOOK_UP_SECONDS, translated_calls

RESERVE_SECONDS: Final = 600.0
"""Models may have to be parked first."""
WAIT_SECONDS: Final = (0.5, 15.0)
"""Between attempts, the first and the longest."""
Waiting = Callable[[str | None], Awaitable[None]]


class Hosts:
    """Implements the port `Ledger`; knows the hosts of models."""

    def __init__(self, registry: grpc.aio.Channel, connect: Callable[[str], grpc.aio.Channel], host_id: str) -> None:
        """Use these.

        Args:
            registry: channel to the registry as the mesh itself.
            connect: opens a channel to a host's address.
            host_id: this process.
        """
        self.placement = devices_pb2_grpc.PlacementServiceStub(registry)
        self._connect = connect
        self._host_id = host_id
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def having(self, model_id: str) -> residency_pb2_grpc.ModelHostServiceStub | None:
        """The host that has the model, None where none has."""
        try:
            wanted = devices_pb2.LocateModelRequest(model_id=model_id)
            location = await self.placement.LocateModel(wanted, timeout=LOOK_UP_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            return None
        return self._host(location.address)

    async def of(self, model_id: str) -> residency_pb2_grpc.ModelHostServiceStub:
        """The host that has the model; it is loaded into this process when none has."""
        found = await self.having(model_id)
        if found is not None:
            return found
        request = devices_pb2.EnsureResidentRequest(host_id=self._host_id, model_id=model_id)
        location = await self.placement.EnsureResident(request, timeout=LOAD_SECONDS)
        return self._host(location.address)

    def _host(self, address: str) -> residency_pb2_grpc.ModelHostServiceStub:
        if address not in self._channels:
            self._channels[address] = self._connect(address)
        return residency_pb2_grpc.ModelHostServiceStub(self._channels[address])

    async def reserve(
        self, owner: str, size_bytes: int, ranks: int = 1, *, waiting: Waiting, uses: Sequence[str] = ()
    ) -> list[str]:
        """In the ledger of this process's device, for a gang also of others; the device of each rank, for `gang`.

        Idle models make room. One that wants the device alone and is in use is waited for, and `waiting` told so.

        Args:
            owner: the job.
            size_bytes: of each rank.
            ranks: processes.
            waiting: told what is waited for, and None when that is over.
            uses: models that the job works with, which stay.
        """
        request = devices_pb2.ReserveRequest(
            host_id=self._host_id, owner=owner, bytes=size_bytes, ranks=ranks, model_ids=uses
        )
        backoff, waited = Backoff(*WAIT_SECONDS), False
        while True:
            try:
                with translated_calls():
                    reserved = await self.placement.Reserve(request, timeout=RESERVE_SECONDS)
                break
            except errors.Conflict as error:
                if error.reason != "IN_USE":
                    raise
                await waiting(error.message)
                waited = True
                await asyncio.sleep(backoff.next())
        if waited:
            await waiting(None)
        return list(reserved.devices)

    async def release(self, owner: str) -> None:
        """In the same ledgers."""
        request = devices_pb2.ReleaseRequest(host_id=self._host_id, owner=owner)
        with translated_calls():
            await self.placement.Release(request, timeout=LOOK_UP_SECONDS)

    async def close(self) -> None:
        """Close the channels to hosts."""
        for channel in self._channels.values():
            await channel.close()
