"""The catalogue of datasets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from blake3 import blake3

from services.kit.errors import Conflict, Invalid
from services.kit.ids import new_id
from services.kit.requests import RequestKey
from services.registry.dataset_ports import Dataset
from services.registry.domain import Caller
from services.registry.identifiers import check_dataset_identifier
from services.registry.listing import Listed, Page
from services.registry.operations.registry import Registry

TEXTS_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class NewDataset:
    """What a caller says about a dataset."""

    name: str
    source: str
    identifier: str
    texts: Sequence[str]
    split: str
    text_field: str
    prompt_field: str
    target_field: str


async def create_dataset(registry: Registry, caller: Caller, new: NewDataset, request: RequestKey) -> Dataset:
    """Register text: files below a dataset root, texts of the request, or a name on the hub.

    Raises:
        Invalid: an identifier that leaves its root or names nothing; texts with another source, or none.
        Conflict: `REQUEST_ID_REUSED`.
    """
    size, digest, rows = await _measure(registry, new)
    row = {
        "id": new_id("ds", new.identifier.rpartition("/")[2] or new.name),
        "name": new.name,
        "source": new.source,
        "identifier": new.identifier,
        "split": new.split or "train",
        "text_field": new.text_field or "text",
        "prompt_field": new.prompt_field or None,
        "target_field": new.target_field or None,
        "size_bytes": size,
        "rows": rows,
        "digest": digest,
        "created_by": caller.subject,
    }
    async with registry.store.transaction() as tx, tx.once(request) as once:
        if once.answer is None:
            once.answer = {"id": (await tx.datasets.insert(row, new.texts)).id}
        return await tx.datasets.get(once.answer["id"])


async def get_dataset(registry: Registry, dataset_id: str) -> Dataset:
    """One dataset.

    Raises:
        NotFound: there is none.
    """
    async with registry.store.transaction() as tx:
        return await tx.datasets.get(dataset_id)


async def list_datasets(registry: Registry, page: Page) -> Listed:
    """Datasets, newest first."""
    async with registry.store.transaction() as tx:
        return await tx.datasets.page(page)


async def delete_dataset(registry: Registry, dataset_id: str) -> None:
    """Delete a dataset; files below a root stay.

    Raises:
        NotFound: there is none.
        Conflict: `IN_USE`: jobs that have not ended read it.
    """
    async with registry.store.transaction() as tx:
        await tx.datasets.get(dataset_id)
        users = await tx.datasets.users(dataset_id)
        if users:
            named = ", ".join(f"job {user}" for user in users)
            raise Conflict(
                f"Dataset {dataset_id} is in use by {named}",
                reason="IN_USE",
                metadata={"dataset_id": dataset_id, "users": named},
            )
        await tx.datasets.delete(dataset_id)


async def read_inline_texts(registry: Registry, dataset_id: str) -> AsyncIterator[list[str]]:
    """The texts of an inline dataset, some at a time.

    Raises:
        NotFound: there is none.
        Invalid: it is not inline.
    """
    dataset = await get_dataset(registry, dataset_id)
    if dataset.source != "inline":
        raise Invalid.of("id", f"dataset {dataset_id} is {dataset.source}, not inline")
    after = 0
    while True:
        async with registry.store.transaction() as tx:
            texts = await tx.datasets.texts(dataset_id, after, TEXTS_AT_ONCE)
        if not texts:
            return
        yield texts
        after += len(texts)


async def _measure(registry: Registry, new: NewDataset) -> tuple[int, str | None, int | None]:
    """Bytes, content digest and rows, as far as they are known without a download."""
    if new.source == "inline":
        if not new.texts:
            raise Invalid.of("texts", "must be given for source inline")
        if new.identifier:
            raise Invalid.of("identifier", "is not a field of source inline")
        content = [text.encode() for text in new.texts]
        digest = blake3()
        for text in content:
            digest.update(len(text).to_bytes(8, "little") + text)
        return sum(map(len, content)), digest.hexdigest(), len(content)
    if new.texts:
        raise Invalid.of("texts", f"is not a field of source {new.source}")
    check_dataset_identifier(new.source, new.identifier)
    if new.source == "huggingface":
        return 0, None, None
    size, found = await registry.files.measure(new.identifier)
    return size, found, None
