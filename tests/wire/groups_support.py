"""Groups on fake hosts that have room for few of them, and switches between them."""

from __future__ import annotations

from typing import Any

from lensmesh.common.v1 import types_pb2 as types
from lensmesh.registry.v1 import groups_pb2 as pb
from lensmesh.registry.v1 import jobs_pb2
from lensmesh.training.v1 import training_pb2

from tests.wire.registry_support import MB, FakeHost, Mesh


async def add_host(mesh: Mesh, **changes: Any) -> FakeHost:
    """Room for one base of 100 MB with a lens, and for another one parked."""
    room = {"sizes": dict.fromkeys("abc", 100 * MB), "budget": 130 * MB, "park": 110 * MB}
    host = FakeHost(**{**room, **changes})
    for name in "abc":
        host.transcoders[name] = training_pb2.Transcoder(
            id=name, artifact_uri=f"artifact://transcoder/{name}", base_digest=f"digest-{name}", size_bytes=8 * MB
        )
    return await mesh.add_host(host)


async def group(mesh: Mesh, name: str) -> tuple[pb.Group, str]:
    """A group on a base that is not loaded, and its lens."""
    model = await mesh.create(name)
    made = await mesh.groups.CreateGroup(pb.CreateGroupRequest(name=name, model_id=model.id))
    lens = await mesh.groups.AttachLens(
        pb.AttachLensRequest(group_id=made.id, kind=types.LENS_KIND_TRANSCODER, transcoder_id=name)
    )
    return made, lens.id


async def switch(mesh: Mesh, to: tuple[pb.Group, str], **more: Any) -> pb.SwitchLensResponse:
    return await mesh.groups.SwitchLens(pb.SwitchLensRequest(id=to[0].id, lens_id=to[1], **more))


async def switched(mesh: Mesh, to: tuple[pb.Group, str]) -> pb.SwitchLensResponse:
    """Switch, and wait for the job."""
    answer = await switch(mesh, to)
    job = await mesh.settled(answer.job_id)
    assert job.status == jobs_pb2.JOB_STATE_COMPLETED, job.error_message
    return answer


async def status(mesh: Mesh, of: tuple[pb.Group, str]) -> pb.GroupStatus:
    return await mesh.groups.GetGroupStatus(pb.GetGroupStatusRequest(id=of[0].id))


def leaving(plan: types.LoadPlan) -> list[tuple[str, str, bool]]:
    return [(e.model_id, e.cause, e.parked) for e in plan.placements[0].evictions]


async def reading(mesh: Mesh, name: str, source_id: str) -> tuple[pb.Group, str]:
    """A group whose lens reads the activations of another model."""
    model = await mesh.create(name)
    made = await mesh.groups.CreateGroup(pb.CreateGroupRequest(name=name, model_id=model.id))
    kind = types.LENS_KIND_TRANSCODER
    request = pb.AttachLensRequest(
        group_id=made.id, kind=kind, transcoder_id=name, activation_source_model_id=source_id
    )
    return made, (await mesh.groups.AttachLens(request)).id
