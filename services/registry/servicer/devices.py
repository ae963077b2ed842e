"""lensmesh.registry.v1.DeviceService and PlacementService: proto in, proto out."""

from __future__ import annotations

from typing import Any

from google.protobuf.empty_pb2 import Empty
from lensmesh.registry.v1 import devices_pb2 as pb
from lensmesh.registry.v1 import devices_pb2_grpc

from services.registry.domain import Host, HostedModel, Residency
from services.registry.operations import hosts, lenses, loading, reserving, serving, unloading
from services.registry.operations.registry import Registry
from services.registry.wire import hosted, to_dict, to_message


class DeviceServicer(devices_pb2_grpc.DeviceServiceServicer):
    """Devices and what is on them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def ListDevices(self, request: pb.ListDevicesRequest, context: Any) -> pb.ListDevicesResponse:
        """The devices."""
        found = await hosts.list_devices(self._registry)
        return pb.ListDevicesResponse(devices=[_device(host) for host in found], total=len(found))

    async def ClearDevice(self, request: pb.ClearDeviceRequest, context: Any) -> pb.ClearDeviceResponse:
        """Unload what is idle."""
        left, freed = await unloading.clear_device(self._registry, request.id)
        return pb.ClearDeviceResponse(model_ids=left, freed_bytes=freed)


class PlacementServicer(devices_pb2_grpc.PlacementServiceServicer):
    """What hosts and the other services ask."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def RegisterHost(self, request: pb.RegisterHostRequest, context: Any) -> pb.RegisterHostResponse:
        """A host process announces itself."""
        facts = to_dict(request)
        del facts["models"]
        seconds = await hosts.register_host(self._registry, facts, _held(request))
        return pb.RegisterHostResponse(heartbeat_seconds=seconds)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        """A host process lives."""
        figures = to_dict(request)
        named = {name: figures.pop(name) for name in ("host_id", "incarnation")}
        del figures["models"]
        figures["measured_bytes"] = figures.pop("used_bytes")
        again = await hosts.heartbeat(self._registry, held=_held(request), figures=figures, **named)
        return pb.HeartbeatResponse(register_again=again)

    async def Reserve(self, request: pb.ReserveRequest, context: Any) -> pb.Reservation:
        """Promise bytes to a job."""
        asked, ranks = (request.host_id, request.owner, request.bytes), request.ranks or 1
        devices = await reserving.reserve(self._registry, *asked, ranks=ranks, uses=request.model_ids)
        return pb.Reservation(owner=request.owner, bytes=request.bytes, devices=devices)

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> Empty:
        """Take bytes back."""
        await reserving.release(self._registry, request.host_id, request.owner)
        return Empty()

    async def MakeRoom(self, request: pb.MakeRoomRequest, context: Any) -> Empty:
        """Clear a device that has run out of memory."""
        await unloading.clear_processes(self._registry, request.host_id, keep=request.model_ids)
        return Empty()

    async def EnsureResident(self, request: pb.EnsureResidentRequest, context: Any) -> pb.ModelLocation:
        """Bring a model to a host process."""
        return _location(await loading.ensure_resident(self._registry, request.host_id, request.model_id))

    async def LocateModel(self, request: pb.LocateModelRequest, context: Any) -> pb.ModelLocation:
        """Where a model is."""
        return _location(await serving.locate(self._registry, request.model_id))

    async def SwitchExtension(self, request: pb.SwitchExtensionRequest, context: Any) -> pb.SwitchExtensionResponse:
        """Activate an extension."""
        wanted = request.extension_id or None
        switched = await lenses.switch_extension(
            self._registry, request.model_id, wanted, request.artifact_uri, request.base_digest
        )
        return to_message(pb.SwitchExtensionResponse, switched, active_extension_id=request.extension_id)


def _held(request: pb.RegisterHostRequest | pb.HeartbeatRequest) -> list[HostedModel]:
    return [hosted(model) for model in request.models]


def _device(host: Host) -> pb.Device:
    here = () if host.lost else host.residents
    models = [_resident(each) for each in here if each.state in ("resident", "unloading", "parking")]
    parked = [_resident(each) for each in here if each.state == "parked"]
    return to_message(pb.Device, host, models=models, parked_models=parked, alive=not host.lost)


def _resident(residency: Residency) -> pb.ResidentModel:
    return to_message(pb.ResidentModel, residency, memory_bytes=residency.bytes)


def _location(copy: Residency) -> pb.ModelLocation:
    return to_message(pb.ModelLocation, copy)
