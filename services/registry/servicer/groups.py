"""lensmesh.registry.v1.GroupService: proto in, proto out."""

from __future__ import annotations

from typing import Any

from google.protobuf.empty_pb2 import Empty
from lensmesh.registry.v1 import groups_pb2 as pb
from lensmesh.registry.v1 import groups_pb2_grpc

from services.kit.idempotency import request_key
from services.registry.domain import Group, Lens, LoadPlan
from services.registry.operations import groups, lenses, switching
from services.registry.operations.registry import Registry
from services.registry.ports import Switched
from services.registry.servicer.calls import caller, page, page_fields
from services.registry.servicer.models import plan_message
from services.registry.wire import to_dict, to_message

DEFAULT_TOP_K = 10
_NEW = ("kind", "transcoder_id", "extension_id", "artifact_uri", "activation_source_model_id")


class GroupServicer(groups_pb2_grpc.GroupServiceServicer):
    """Groups of one base and its lenses."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def CreateGroup(self, request: pb.CreateGroupRequest, context: Any) -> pb.Group:
        """Make a group."""
        key = request_key("CreateGroup", request)
        named = (request.name, request.model_id)
        group = await groups.create_group(self._registry, caller(), *named, key, exclusive=request.exclusive)
        return await self._message(group.id)

    async def GetGroup(self, request: pb.GetGroupRequest, context: Any) -> pb.Group:
        """One group."""
        return await self._message(request.id)

    async def ListGroups(self, request: pb.ListGroupsRequest, context: Any) -> pb.ListGroupsResponse:
        """Groups, newest first."""
        listed, sizes = await groups.list_groups(self._registry, page(request), request.model_id or None)
        rows = [group_message(group, size) for group, size in zip(listed.rows, sizes, strict=True)]
        return pb.ListGroupsResponse(groups=rows, **page_fields(listed))

    async def DeleteGroup(self, request: pb.DeleteGroupRequest, context: Any) -> Empty:
        """Delete a group."""
        await groups.delete_group(self._registry, request.id)
        return Empty()

    async def GetGroupStatus(self, request: pb.GetGroupStatusRequest, context: Any) -> pb.GroupStatus:
        """Where the group's parts are."""
        return status_message(await groups.group_status(self._registry, request.id))

    async def AttachLens(self, request: pb.AttachLensRequest, context: Any) -> pb.Lens:
        """Add a lens."""
        fields = to_dict(request)
        new = lenses.NewLens(**{name: fields[name] for name in _NEW})
        key = request_key("AttachLens", request)
        return lens_message(await lenses.attach_lens(self._registry, caller(), request.group_id, new, key))

    async def DetachLens(self, request: pb.DetachLensRequest, context: Any) -> Empty:
        """Take a lens off."""
        await lenses.detach_lens(self._registry, request.group_id, request.lens_id)
        return Empty()

    async def SwitchLens(self, request: pb.SwitchLensRequest, context: Any) -> pb.SwitchLensResponse:
        """Make a lens the active one, at once or by a queued job, or say what that would do."""
        lens_id = request.lens_id or None
        if request.validate_only:
            plan, seconds = await switching.plan_switch(self._registry, request.id, lens_id)
            return _switch_message(lens_id, {"estimated_seconds": seconds}, plan)
        key = request_key("SwitchLens", request)
        done = await switching.switch(self._registry, caller(), request.id, lens_id, key)
        if isinstance(done, Switched):
            return _switch_message(lens_id, done, None)
        context.set_trailing_metadata((("x-http-status", "202"),))
        return _switch_message(lens_id, done, done.plan)

    async def PreloadGroup(self, request: pb.PreloadGroupRequest, context: Any) -> pb.PreloadGroupResponse:
        """Bring base and lenses to a device or to host memory."""
        parked = request.residency == pb.RESIDENCY_PARKED
        key = request_key("PreloadGroup", request)
        job_id, total = await groups.preload_group(
            self._registry, caller(), request.id, request.lens_ids, key, parked=parked
        )
        return pb.PreloadGroupResponse(id=request.id, total=total, task_id=job_id)

    async def MoveGroup(self, request: pb.MoveGroupRequest, context: Any) -> pb.GroupStatus:
        """Move base and lenses to another device."""
        key = request_key("MoveGroup", request)
        return status_message(await groups.move_group(self._registry, caller(), request.id, request.device, key))

    async def AnalyzeText(self, request: pb.AnalyzeTextRequest, context: Any) -> pb.AnalyzeTextResponse:
        """Read a text through lenses."""
        query = {
            "text": request.text,
            "token_ids": list(request.token_ids),
            "top_k": request.top_k or DEFAULT_TOP_K,
            "prefix": request.prefix,
            "interventions": to_dict(request)["interventions"],
        }
        found = await groups.analyze(self._registry, request.id, request.lens_ids, query)
        return pb.AnalyzeTextResponse(readings=found.readings, seconds=found.seconds)

    async def _message(self, group_id: str) -> pb.Group:
        return group_message(*await groups.get_group(self._registry, group_id))


def group_message(group: Group, size: int) -> pb.Group:
    """A group as clients see it."""
    lenses = [lens_message(lens) for lens in group.lenses]
    return to_message(pb.Group, group, lenses=lenses, estimated_memory_bytes=size)


def lens_message(lens: Lens) -> pb.Lens:
    """A lens as clients see it."""
    residency = "parked" if lens.parked else "disk" if lens.charge_bytes is None else "device"
    return to_message(pb.Lens, lens, residency=residency, memory_bytes=lens.charge_bytes or 0)


def status_message(status: groups.GroupStatus) -> pb.GroupStatus:
    """A group's status as clients see it."""
    estimate = pb.SwitchEstimate(within_group=status.within_seconds, cross_group=status.cross_seconds)
    return to_message(
        pb.GroupStatus,
        status,
        id=status.group.id,
        active_lens_id=status.group.active_lens_id,
        estimated_switch_seconds=estimate,
    )


def _switch_message(lens_id: str | None, done: object, plan: LoadPlan | None) -> pb.SwitchLensResponse:
    planned = None if plan is None else plan_message(plan)
    return to_message(pb.SwitchLensResponse, done, lens_id=lens_id, plan=planned)
