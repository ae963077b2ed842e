"""The catalogue of models: create, read, update, delete."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from services.kit.errors import Conflict, Forbidden, LensmeshError, Stale
from services.kit.ids import new_id
from services.kit.requests import RequestKey
from services.registry.domain import Caller, Facts, LoadPlan, Model, Source
from services.registry.identifiers import check_identifier
from services.registry.listing import Listed, Page
from services.registry.operations import admission
from services.registry.operations.estimating import columns_of, expected, inspect_if_reachable, need_of, plan
from services.registry.operations.registry import Registry
from services.registry.operations.unloading import unload_copies


@dataclass(frozen=True, slots=True)
class NewModel:
    """What a caller says about a model."""

    name: str
    model_type: str
    source: str
    model_identifier: str
    revision: str
    quantization: str
    pinned: bool
    preload: bool

    @property
    def files(self) -> Source:
        """Where its files come from."""
        return Source(self.source, self.model_identifier, self.revision)


@dataclass(frozen=True, slots=True)
class Draft:
    """A model about to be registered, with what its files say."""

    new: NewModel
    facts: Facts | None
    plan: LoadPlan | None


async def draft_model(registry: Registry, new: NewModel) -> Draft:
    """Check a new model and read its files; with the plan of a load. Changes nothing.

    Raises:
        Invalid: the identifier could leave its root, or model_type contradicts the config.
        Unavailable: `NO_HOST` for a local source.
    """
    check_identifier(new.source, new.model_identifier)
    facts = await inspect_if_reachable(registry, new.files, new.model_type)
    if facts is None:
        return Draft(new, None, None)
    need, seconds = await need_of(registry, new.files, new.quantization)
    return Draft(new, facts, await plan(registry, need, device="", seconds=seconds))


async def create_model(
    registry: Registry, caller: Caller, new: NewModel, request: RequestKey, *, auto_load: bool
) -> Model:
    """Register a model, and start to load it when asked; both or neither. The answer is the model as it was registered.

    A hub that does not answer leaves the model pending, with its sizes to be filled at its load, which begins by itself
    with auto_load once the hub answers.

    Raises:
        Invalid: see `draft_model`.
        Exhausted: `INSUFFICIENT_MEMORY` or `QUOTA_EXCEEDED`, with auto_load; nothing was registered.
        Conflict: `REQUEST_ID_REUSED`.
    """
    draft = await draft_model(registry, new)
    async with registry.store.transaction() as tx, tx.once(request) as once:
        if once.answer is None:
            model = await tx.models.insert({**_row(caller, draft), "wanted": auto_load})
            once.answer = {"id": model.id}
            if auto_load:
                await admission.count_load(registry, tx, caller)
            if auto_load and draft.plan is not None:
                need, seconds = draft.plan.need, draft.plan.estimated_seconds
                order = admission.Order(model.quantization, caller.subject, need, seconds)
                await admission.accept(registry, tx, model, order)
            return model
        return await tx.models.get(once.answer["id"])


async def get_model(registry: Registry, model_id: str) -> Model:
    """One model.

    Raises:
        NotFound: `MODEL_NOT_FOUND`.
    """
    async with registry.store.transaction() as tx:
        return await tx.models.get(model_id)


async def list_models(registry: Registry, page: Page, status: str | None, model_type: str | None) -> Listed:
    """Models, newest first."""
    async with registry.store.transaction() as tx:
        return await tx.models.page(page, status=status, model_type=model_type)


async def update_model(
    registry: Registry,
    model_id: str,
    *,
    etag: str,
    name: str | None,
    quantization: str | None,
    pinned: bool | None,
    preload: bool | None,
) -> Model:
    """Change a model.

    Raises:
        Stale: the etag is of an earlier version.
        Conflict: another quantization while it is on a device, or on its way there.
    """
    changes: dict[str, object] = {"name": name, "quantization": quantization, "pinned": pinned, "preload": preload}
    changes = {column: value for column, value in changes.items() if value is not None}
    if quantization is not None:
        changes |= await expected(registry, model_id, quantization)
    async with registry.store.transaction() as tx:
        model = await tx.models.get(model_id, lock=True)
        if etag and etag != model.etag:
            raise Stale(
                f"Model {model_id} is at version {model.etag}, the request was made for {etag}",
                metadata={"etag": model.etag},
            )
        if quantization is not None and quantization != model.quantization and model.status in ("ready", "loading"):
            raise Conflict(
                f"Model {model_id} is {model.status}; unload it before its quantization changes",
                metadata={"model_id": model_id, "status": model.status},
            )
        if not changes:
            return model
        return await tx.models.update(model_id, version=model.version + 1, **changes)


async def delete_model(registry: Registry, caller: Caller, model_id: str, *, cascade: bool) -> None:
    """Delete a model; an idle copy on a device is unloaded first, and the hosts' disks forget files nobody shares.

    Raises:
        Conflict: `IN_USE`, naming the users, unless cascade; a job that runs has to be cancelled in any case.
        Forbidden: cascade without the scope model:admin.
    """
    if cascade and not (caller.admin or caller.internal):
        raise Forbidden("cascade needs the scope model:admin", metadata={"required": "model:admin"})
    async with registry.store.transaction() as tx:
        model = await tx.models.get(model_id)
        users = await tx.models.users(model_id)
    if model.status == "loading":
        raise Conflict(f"Model {model_id} is loading", reason="ALREADY_LOADING", metadata={"model_id": model_id})
    jobs = [user for user in users if user.startswith("job ")]
    if jobs:
        raise _in_use(model_id, jobs)
    users += await registry.peers.users_of_model(model_id)
    if users and not cascade:
        raise _in_use(model_id, users)
    await unload_copies(registry, model_id, wait_seconds=0.0, cause="deleted")
    async with registry.store.transaction() as tx:  # first: what a lens uses is not deleted
        for group in await tx.groups.of_model(model_id):
            await tx.groups.delete(group.id)
    await registry.peers.delete_users_of_model(model_id)
    async with registry.store.transaction() as tx:
        shared = await tx.models.sharers(model_id)
        await tx.models.delete(model_id)
        await tx.emit("model:deleted", model_id, {"model_id": model_id})
        hosts = await tx.placement.hosts()
    for host in hosts if not shared else ():
        with suppress(LensmeshError):  # its files stay until the disk cache needs their room
            await registry.hosts.forget(host.address, model.files, model.digest or "")


def _in_use(model_id: str, users: list[str]) -> Conflict:
    named = ", ".join(users)
    return Conflict(
        f"Model {model_id} is in use by {named}", reason="IN_USE", metadata={"model_id": model_id, "users": named}
    )


def _row(caller: Caller, draft: Draft) -> dict[str, object]:
    new = draft.new
    row: dict[str, object] = {
        "id": new_id("m", new.model_identifier.rpartition("/")[2]),
        "name": new.name,
        "model_type": new.model_type,
        "source": new.source,
        "model_identifier": new.model_identifier,
        "revision": new.revision or None,
        "quantization": new.quantization,
        "pinned": new.pinned,
        "preload": new.preload,
        "created_by": caller.subject,
    }
    if new.source == "huggingface":
        row["cache_dir"] = "models--" + new.model_identifier.replace("/", "--")
    else:
        row["model_path"] = new.model_identifier
    if draft.facts is not None:
        row |= columns_of(draft.facts)
    if draft.plan is not None:
        row["estimated_memory_bytes"] = draft.plan.need.total
        row["estimated_load_seconds"] = draft.plan.estimated_seconds
    return row
