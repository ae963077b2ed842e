"""Extensions from and for others: PEFT adapters in, archives out, and merges into models of their own."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.extensions import errors as translated
from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.count import skeleton_of
from services.extensions.compute.exchange import export, import_adapter
from services.extensions.compute.merge import Merged, merge, write_model
from services.extensions.domain import Extension, Lora
from services.extensions.measuring import attached
from services.extensions.ports import Base, Bases, Catalogue, Ledger, MergeRun, Store
from services.kit import errors
from services.kit.requests import RequestKey
from services.residency.sources import SourceNotFound, find_local

CHUNK = 1 << 20
"""Bytes of one message of an archive."""


class Exchange:
    """Imports and exports; raises `services.kit.errors` only."""

    def __init__(self, store: Store, catalogue: Catalogue, bases: Bases, roots: Sequence[Path]) -> None:
        """Use these; adapters are read below `roots` only."""
        self._store = store
        self._catalogue = catalogue
        self._bases = bases
        self._roots = roots

    async def bring_in(self, model_id: str, task_name: str, identifier: str, key: RequestKey) -> Extension:
        """Make an extension of a PEFT adapter.

        Raises:
            errors.Invalid: there is no such folder, or the adapter does not fit the model; nothing was created.
            errors.NotFound: there is no such model.
        """
        model = await self._catalogue.model(model_id)
        try:
            folder = find_local(identifier, self._roots)
        except SourceNotFound as error:
            raise errors.Invalid.of("identifier", "no such folder below the model roots") from error
        facts = {"base_parameters": model.parameter_count, "base_digest": model.digest}
        with translated.requests():
            shapes = await asyncio.to_thread(skeleton_of, model.config)
            config, counts, write = await asyncio.to_thread(_read, folder, shapes, task_name, facts)
            if config.lora_variant == "dora":
                async with self._bases.lease(model_id) as base:
                    config, counts, write = await base.run(_read, folder, base.model, task_name, facts)
        made = Extension(
            id=self._store.new_id(),
            model_id=model_id,
            task_name=task_name,
            kind="lora",
            lora=_lora(config),
            layers=(),
            parameter_counts=counts.as_dict(),
            base_digest=model.digest,
            created_by=key.caller,
        )
        return await self._store.insert(made, write, key)

    async def take_out(self, extension_id: str) -> AsyncGenerator[bytes, None]:
        """A zip archive of an extension, in parts.

        Raises:
            errors.NotFound: there is none.
        """
        extension = await self._store.get(extension_id)
        model = await self._catalogue.model(extension.model_id)
        async with self._store.reading(extension.artifact_uri) as folder:
            with tempfile.TemporaryDirectory(prefix="lensmesh-export-") as place, translated.stored():
                target = Path(place) / "extension.zip"
                await asyncio.to_thread(export, folder, target, base_model=model.name)
                with target.open("rb") as archive:
                    while part := await asyncio.to_thread(archive.read, CHUNK):
                        yield part

    async def merge(self, extension_id: str, name: str, *, key: RequestKey) -> str:
        """Queue a merge; its job's id.

        Raises:
            errors.NotFound: there is no such extension.
            errors.Conflict: the base is quantised, the extension is being trained, or no model has such layers.
        """
        extension = await self._store.get(extension_id)
        model = await self._catalogue.model(extension.model_id)
        require_mergeable(extension.layers, model.quantization)
        return await self._store.enqueue_merge(extension_id, name or f"{model.name} {extension.task_name}", key)


class MergeJob:
    """Handles jobs of kind `extension_merge`."""

    def __init__(self, store: Store, ledger: Ledger, bases: Bases, catalogue: Catalogue) -> None:
        self._store = store
        self._ledger = ledger
        self._bases = bases
        self._catalogue = catalogue

    async def run(self, run: MergeRun) -> dict[str, Any]:
        """Merge into a copy, publish and register it; done twice it makes the same model once.

        Raises:
            errors.LensmeshError: it cannot be merged; nothing was registered.
        """
        extension = await run.extension()
        await run.waiting(f"the model {extension.model_id}")
        async with (
            self._store.reading(extension.artifact_uri) as folder,
            self._bases.lease(extension.model_id) as base,
            attached(base, folder) as key,
        ):
            await run.waiting(None)
            uses = (extension.model_id,)
            size = await base.run(_bytes, base)
            try:
                reserving = self._ledger.reserve(run.job_id, size, waiting=run.waiting, uses=uses)
                await run.unless_stopped(reserving)
                merged = await base.run(_merge, base, key)
                digest = await run.publish(model_files(merged.model, base.tokenizer))
            finally:
                await self._ledger.release(run.job_id)
        model_id = await self._catalogue.register(run.name, digest, run.job_id)
        return {"model_id": model_id, "largest_logit_difference": merged.largest_logit_difference}


def require_mergeable(layers: Sequence[Any], quantization: str) -> None:
    """Refuse what `compute.merge` would refuse, before a job is queued.

    Raises:
        errors.Conflict: the base is quantised, or a layer is narrower than its neighbours.
    """
    if quantization in ("int8", "int4"):
        told = {"quantization": quantization}
        raise errors.Conflict(f"the base is {quantization}; its weights cannot take an extension in", metadata=told)
    if any(layer.mlp_width is not None for layer in layers):
        raise errors.Conflict("transformers has no model whose layers differ in width")


def model_files(model: Any, tokenizer: Any) -> Callable[[Path], None]:
    """Writes a model with its tokenizer into an empty folder."""

    def write(folder: Path) -> None:
        write_model(model)(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    return write


def _merge(base: Base, key: str) -> Merged:
    with translated.stored():
        return merge(base.model, base.attached, key)


def _bytes(base: Base) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())


def _read(folder: Path, model: Any, task_name: str, facts: dict[str, Any]) -> Any:
    return import_adapter(folder, model, task_name, **facts)


def _lora(config: ExtensionConfig) -> Lora:
    target = config.adalora_target if config.lora_variant == "adalora" else None
    lora = Lora(config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules, config.lora_variant)
    return replace(lora, target_r=target)
