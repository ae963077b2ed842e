"""Lenses: attach, detach, switch, and bring them back after their base was loaded anew."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from services.kit.errors import Conflict, Exhausted, Invalid, LensmeshError, NotFound, Unsupported
from services.kit.ids import new_id
from services.kit.requests import RequestKey
from services.registry.domain import Beside, Caller, Group, Lens, LensArtifact, Model, Residency
from services.registry.failures import insufficient_memory
from services.registry.operations.loading import ensure_resident
from services.registry.operations.registry import Registry
from services.registry.operations.room import charge, make_all_room
from services.registry.operations.turns import Absent, Wish, serving, switch_events
from services.registry.operations.unloading import unload_copies
from services.registry.ports import Switched

_FIELDS = {"transcoder": "transcoder_id", "extension": "extension_id", "tuned_lens": "artifact_uri"}
"""The field that names what a lens of a kind is made of."""


@dataclass(frozen=True, slots=True)
class NewLens:
    """What a caller says about a lens."""

    kind: str
    transcoder_id: str
    extension_id: str
    artifact_uri: str
    activation_source_model_id: str


async def attach_lens(registry: Registry, caller: Caller, group_id: str, new: NewLens, request: RequestKey) -> Lens:
    """Add a lens to a group, and bring it to the device when the base is there; both or neither.

    Raises:
        Invalid: a field that the kind needs is missing, or one that it does not know is given.
        NotFound: no such group, transcoder, extension or activation source.
        Conflict: `LENS_INCOMPATIBLE`, with both values.
        Exhausted: `INSUFFICIENT_MEMORY`.
    """
    _check_fields(new)
    async with registry.store.transaction() as tx:
        group = await tx.groups.get(group_id)
        model = await tx.models.get(group.model_id)
        source = await tx.models.get(new.activation_source_model_id) if new.activation_source_model_id else model
    artifact = await _artifact(registry, new)
    if artifact is not None:
        check_fit(source if artifact.base_digest == source.digest else model, artifact)
    async with registry.store.transaction() as tx, tx.once(request) as once:
        if once.answer is not None:
            return (await tx.groups.get(group_id)).lens(once.answer["id"])
        lens = await tx.groups.add_lens(_row(caller, group_id, model, new, artifact))
        once.answer = {"id": lens.id}
        copy = await serving(tx, group.model_id)
    if copy is not None:
        try:
            await bring(registry, lens, copy)
        except LensmeshError:
            async with registry.store.transaction() as tx:
                await tx.groups.remove_lens(lens.id)
            raise
    async with registry.store.transaction() as tx:
        return (await tx.groups.get(group_id)).lens(lens.id)


async def detach_lens(registry: Registry, group_id: str, lens_id: str) -> None:
    """Take a lens off its group and off the devices.

    Raises:
        NotFound: no such group or lens.
        Conflict: `IN_USE` when a forward holds it.
    """
    async with registry.store.transaction() as tx:
        group = await tx.groups.get(group_id)
        group.lens(lens_id)
        copies = await tx.placement.of_model(group.model_id)
    await take_lens_off(registry, copies, lens_id)
    async with registry.store.transaction() as tx:
        await tx.groups.remove_lens(lens_id)


async def switch_lens(
    registry: Registry, group_id: str, lens_id: str | None, *, began: float | None = None
) -> Switched:
    """Make a lens of a group the active one, or none. Switches on one base take turns, so that rows tell the truth.

    Args:
        registry: the registry.
        group_id: the group.
        lens_id: one of its lenses; None for the base alone.
        began: `time.perf_counter` when a switch from another group began; None for one within the group.

    Raises:
        NotFound: no such group or lens.
        Conflict: `GROUP_NOT_RESIDENT`.
        Exhausted: `INSUFFICIENT_MEMORY`: the lens is not on the device and has no room there.
    """
    start = time.perf_counter() if began is None else began
    wish = Wish(group_id, lens_id, began)
    while isinstance(done := await registry.turns.take(registry, wish), Absent):
        async with registry.store.transaction() as tx:
            group = await tx.groups.get(group_id)
        await bring(registry, group.lens(wish.lens_id or ""), done.copy)
    registry.gauges.switched(wish.kind, time.perf_counter() - start)
    return done


async def switch_extension(
    registry: Registry, model_id: str, extension_id: str | None, artifact_uri: str, base_digest: str
) -> Switched:
    """Activate an extension on its base, or the base alone; groups that hold it show it as their active lens.

    Raises:
        NotFound: no such model.
        Conflict: the base is not on a device; `LENS_INCOMPATIBLE`.
    """
    start = time.perf_counter()
    async with registry.store.transaction() as tx:
        model = await tx.models.get(model_id)
        groups = await tx.groups.of_model(model_id)
        copy = await serving(tx, model_id)
    if copy is None:
        raise Conflict(
            f"Model {model_id} is {model.status}, not on a device",
            metadata={"model_id": model_id, "status": model.status},
        )
    holders = [(g, lens) for g in groups for lens in g.lenses if extension_id and lens.extension_id == extension_id]
    lens_id = holders[0][1].id if holders else extension_id
    if lens_id is not None:
        artifact = LensArtifact(artifact_uri, base_digest, 0, model_id)
        await _bring_extension(registry, model, copy, lens_id, holders=holders, artifact=artifact)
    async with registry.store.transaction() as tx:
        await tx.groups.lock_of_model(model_id)
        switched = await registry.hosts.switch_lens(copy.address, model_id, lens_id)
        await tx.groups.activate_extension(model_id, extension_id)
        for group, lens in holders:
            await tx.groups.record_switch(group.id, "within", switched.seconds)
            await tx.emit_all(switch_events(group.id, lens.id, "within", switched))
    registry.gauges.switched("within", time.perf_counter() - start)
    return switched


async def _bring_extension(
    registry: Registry,
    model: Model,
    copy: Residency,
    lens_id: str,
    *,
    holders: Sequence[tuple[Group, Lens]],
    artifact: LensArtifact,
) -> None:
    """Have the extension's present files on the device; training gives it new ones under the same id."""
    stale = [lens.id for _, lens in holders if lens.artifact_uri != artifact.uri]
    if holders and not stale and lens_id in copy.lens_ids:
        return
    check_fit(model, artifact)
    async with registry.store.transaction() as tx:
        for stale_id in stale:
            await tx.groups.retarget_lens(stale_id, artifact.uri)
    for id_ in {lens_id, *stale}:
        await _place(registry, id_, "extension", artifact, copy)


async def bring(registry: Registry, lens: Lens, copy: Residency, *, evict: bool = True) -> int:
    """Bring a lens to a copy of its base, and the model whose activations it reads to the same device; its bytes.

    Idle lenses and models leave for it unless `evict` is false.

    Raises:
        Exhausted: `INSUFFICIENT_MEMORY`.
        LensmeshError: the host refused it; it is nowhere then.
    """
    if lens.activation_source_model_id:
        beside = Beside(sources=((copy.model_id, 0),), lenses=((lens.id, lens.size_bytes),))
        beside = beside if evict else replace(beside, spares="all")
        await ensure_resident(registry, copy.host_id, lens.activation_source_model_id, beside)
    return await _place(registry, lens.id, lens.kind, artifact_of(lens, copy), copy, evict=evict)


def artifact_of(lens: Lens, copy: Residency) -> LensArtifact:
    """A lens's files, for a copy of its base."""
    return LensArtifact(
        lens.artifact_uri or "",
        lens.base_digest or "",
        lens.size_bytes,
        copy.model_id,
        layer=lens.layer,
        activation_source_model_id=lens.activation_source_model_id or "",
    )


async def restore_lenses(registry: Registry, model_id: str, host_id: str, *, beside: bool = False) -> None:
    """After a load: attach the lenses of the base's groups, activate the altering one; a failure stays its own.

    Lenses that read a model which is not there wait until they are used, and so do those for which there is no room.
    A further copy of a base gets none, unless it was loaded to have some beside it.
    """
    async with registry.store.transaction() as tx:
        copies = [copy for copy in await tx.placement.of_model(model_id) if copy.state == "resident"]
        groups = await tx.groups.of_model(model_id)
    copy = next((copy for copy in copies if copy.host_id == host_id), None)
    if copy is None or (copy is not copies[0] and not beside):
        return
    wanted = [(group, lens) for group in groups for lens in group.lenses]
    for group, lens in sorted(wanted, key=lambda pair: pair[0].active_lens_id != pair[1].id):
        await _restore(registry, group, lens, copy)


async def _restore(registry: Registry, group: Group, lens: Lens, copy: Residency) -> None:
    code: str | None = None
    message: str | None = None
    if lens.activation_source_model_id:
        async with registry.store.transaction() as tx:
            sources = await tx.placement.of_model(lens.activation_source_model_id)
        if not any(source.host_id == copy.host_id and source.state == "resident" for source in sources):
            return
    try:
        await bring(registry, lens, copy, evict=False)
        if lens.alters and group.active_lens_id == lens.id:
            await registry.hosts.switch_lens(copy.address, copy.model_id, lens.id)
    except LensmeshError as error:
        if error.reason == "INSUFFICIENT_MEMORY":
            return
        code, message = error.reason, error.message
    async with registry.store.transaction() as tx:
        await tx.groups.lens_failed(lens.id, code, message)


async def take_lens_off(registry: Registry, copies: Sequence[Residency], lens_id: str) -> None:
    """Detach a lens from every copy of its base that has it; a parked copy, which cannot be checked, is dropped."""
    for copy in copies:
        if all(lens.lens_id != lens_id for lens in copy.lenses):
            continue
        if copy.state == "parked":
            await unload_copies(registry, copy.model_id, wait_seconds=0.0, cause="lens_gone", only=(copy.host_id,))
        elif copy.state == "resident":
            with suppress(NotFound):
                await registry.hosts.detach_lens(copy.address, copy.model_id, lens_id)


def check_fit(model: Model, artifact: LensArtifact) -> None:
    """Whether a lens was made for this base.

    Raises:
        Conflict: `LENS_INCOMPATIBLE`, with both values.
    """
    pairs = (
        ("base_digest", artifact.base_digest, model.digest),
        ("width", artifact.d_in, model.hidden_size),
    )
    for name, lens, base in pairs:
        if lens and base and lens != base:
            raise _incompatible(f"its {name} is {lens}, the base's is {base}", f"lens_{name}", lens, name, base)
    if artifact.layer is not None and model.num_layers and artifact.layer >= model.num_layers:
        text = f"it reads layer {artifact.layer}, the base has {model.num_layers} layers"
        raise _incompatible(text, "lens_layer", artifact.layer, "num_layers", model.num_layers)


def _incompatible(text: str, lens_name: str, lens: object, base_name: str, base: object) -> Conflict:
    return Conflict(
        f"The lens does not fit the base: {text}",
        reason="LENS_INCOMPATIBLE",
        metadata={lens_name: lens, base_name: base},
    )


async def _place(
    registry: Registry, lens_id: str, kind: str, artifact: LensArtifact, copy: Residency, *, evict: bool = True
) -> int:
    """Charge the ledger, attach, and correct the charge by what it really costs.

    Out of memory, whatever the ledger says, everything idle leaves and it is tried once more.
    """
    coming = await charge(registry, lens_id, artifact, copy, evict=evict)
    attach = partial(registry.hosts.attach_lens, copy.address, copy.model_id, lens_id, kind, artifact)
    try:
        try:
            size = await attach()
        except Exhausted as error:
            if error.reason != "DEVICE_OOM" or not evict:
                raise
            await make_all_room(registry, lens_id, artifact, copy)
            size = await _attach_or_refuse(attach, artifact, copy)
    except BaseException:
        async with registry.store.transaction() as tx:
            await coming.withdraw(tx)
        raise
    async with registry.store.transaction() as tx:
        await tx.groups.place_lens(lens_id, copy.model_id, copy.host_id, size)
    return size


async def _attach_or_refuse(attach: Callable[[], Awaitable[int]], artifact: LensArtifact, copy: Residency) -> int:
    try:
        return await attach()
    except Exhausted as error:
        if error.reason != "DEVICE_OOM":
            raise
        raise insufficient_memory(artifact.size_bytes, 0, f"{copy.host_id}/{copy.device}") from error


def _check_fields(new: NewLens) -> None:
    if new.kind == "text_lens":
        raise Unsupported("Lenses of kind text_lens are reserved", metadata={"kind": new.kind})
    wanted = _FIELDS.get(new.kind)
    for name in ("transcoder_id", "extension_id", "artifact_uri"):
        value = getattr(new, name)
        if name == wanted and not value:
            raise Invalid.of(name, f"must be given for kind {new.kind}")
        if name != wanted and value:
            raise Invalid.of(name, f"is not a field of kind {new.kind}")
    if new.kind == "extension" and new.activation_source_model_id:
        raise Invalid.of("activation_source_model_id", "is not a field of kind extension, which reads no activations")


async def _artifact(registry: Registry, new: NewLens) -> LensArtifact | None:
    if new.kind == "transcoder":
        return await registry.peers.transcoder(new.transcoder_id)
    if new.kind == "extension":
        return await registry.peers.extension(new.extension_id)
    return None


def _size(model: Model, new: NewLens, artifact: LensArtifact | None) -> int:
    """Bytes of a lens before it was loaded once; those of a tuned lens with a float32 translator for every layer."""
    if artifact is not None:
        return artifact.size_bytes
    if new.kind == "tuned_lens":
        width = model.hidden_size or 0
        return 4 * (model.num_layers or 0) * width * (width + 1)
    return 0


def _row(caller: Caller, group_id: str, model: Model, new: NewLens, artifact: LensArtifact | None) -> dict[str, object]:
    source = new.activation_source_model_id or None
    return {
        "id": new_id("lens"),
        "group_id": group_id,
        "kind": new.kind,
        "transcoder_id": new.transcoder_id or None,
        "extension_id": new.extension_id or None,
        "artifact_uri": (artifact.uri if artifact else new.artifact_uri) or None,
        "activation_source_model_id": source if source != model.id else None,
        "base_digest": (artifact.base_digest if artifact else "") or None,
        "layer": artifact.layer if artifact else None,
        "size_bytes": _size(model, new, artifact),
        "created_by": caller.subject,
    }
