"""The decisions of the extension service: one function per rpc."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import cast, get_args

from transformers import PreTrainedModel

from services.extensions import errors as translated
from services.extensions.compute.blueprint import Blueprint
from services.extensions.compute.config import ExtensionConfig, Position, Variant, require_task_name
from services.extensions.compute.count import skeleton_of
from services.extensions.compute.kinds import KINDS
from services.extensions.domain import (
    Evaluation,
    Extension,
    Filter,
    Generated,
    Layer,
    Lora,
    NewExtension,
    NewTraining,
    Prompt,
    Switch,
)
from services.extensions.measuring import attached, compare, examples_for, row_length
from services.extensions.ports import Bases, Catalogue, Datasets, Store
from services.kit import errors
from services.kit.paging import Page
from services.kit.requests import RequestKey

DEFAULT_SAMPLES = 64
DEFAULT_NEW_TOKENS = 64


class Operations:
    """What the servicer calls; raises `services.kit.errors` only."""

    def __init__(self, store: Store, catalogue: Catalogue, bases: Bases, datasets: Datasets) -> None:
        self._store = store
        self._catalogue = catalogue
        self._bases = bases
        self._datasets = datasets

    async def create(self, new: NewExtension, *, key: RequestKey, validate_only: bool) -> Extension:
        """Make an extension from its base's shapes; only kinds that copy weights bring the base to this process.

        Raises:
            errors.Invalid: a field is wrong, or does not fit the model; nothing was created.
            errors.NotFound: there is no such model.
        """
        _require_supported(new)
        model = await self._catalogue.model(new.model_id)
        with translated.requests():
            blueprint = Blueprint(
                kind=new.kind,
                task_name=new.task_name,
                config=config_of(new),
                base_parameters=model.parameter_count,
                base_digest=model.digest,
                seed=new.seed,
            )
            shapes = await asyncio.to_thread(skeleton_of, model.config)
            require_task_name(new.task_name, (path for path, _ in shapes.named_modules()))
            planned = _planned(new, blueprint, shapes, key.caller)
            if validate_only:
                return planned
            if blueprint.needs_base:
                async with self._bases.lease(new.model_id) as base:
                    write = await base.run(blueprint.prepare, base.model)
            else:
                write = await asyncio.to_thread(blueprint.prepare, shapes)
        return await self._store.insert(replace(planned, id=self._store.new_id()), write, key)

    async def get(self, extension_id: str) -> Extension:
        """One extension.

        Raises:
            errors.NotFound: there is none.
        """
        extension = await self._store.get(extension_id)
        active = await self._catalogue.active_extensions({extension.model_id})
        return replace(extension, active=extension.id in active)

    async def list(self, wanted: Filter) -> Page:
        """Extensions, newest first."""
        page = await self._store.list(wanted)
        active = await self._catalogue.active_extensions({extension.model_id for extension in page.items})
        marked = tuple(replace(extension, active=extension.id in active) for extension in page.items)
        return replace(page, items=marked)

    async def delete(self, extension_id: str) -> None:
        """Delete an extension and its files.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: a lens uses it, or it is being trained.
        """
        lenses = await self._catalogue.lenses_of(await self._store.get(extension_id))
        if lenses:
            raise errors.Conflict(
                f"lenses use {extension_id}: {', '.join(lenses)}",
                reason="IN_USE",
                metadata={"lenses": ", ".join(lenses)},
            )
        await self._store.delete(extension_id)

    async def train(self, training: NewTraining, *, key: RequestKey) -> str:
        """Queue a training; its job's id.

        Raises:
            errors.Invalid: neither or both of steps and epochs are given.
            errors.NotFound: there is no such extension.
            errors.Conflict: it is being trained already.
        """
        if bool(training.steps) == bool(training.epochs):
            raise errors.Invalid.of("steps", "give either steps or epochs")
        return await self._store.enqueue(training, key)

    async def activate(self, extension_id: str) -> Switch:
        """Make it the active lens of its base.

        Raises:
            errors.NotFound: there is none.
        """
        return await self._catalogue.switch(await self._store.get(extension_id), active=True)

    async def deactivate(self, extension_id: str) -> Switch:
        """Make the base alone active, if this extension is active; else nothing changes.

        Raises:
            errors.NotFound: there is none.
        """
        return await self._catalogue.switch(await self._store.get(extension_id), active=False)

    async def generate(self, extension_id: str, prompt: Prompt) -> Generated:
        """Continue a prompt with it, whether or not it is active.

        Raises:
            errors.NotFound: there is none.
        """
        return await self._catalogue.generate(await self._store.get(extension_id), _resolved(prompt))

    async def generate_stream(self, extension_id: str, prompt: Prompt) -> AsyncGenerator[Generated, None]:
        """The same, each part what came since the last one.

        Raises:
            errors.NotFound: there is none.
        """
        extension = await self._store.get(extension_id)
        async with aclosing(self._catalogue.generate_stream(extension, _resolved(prompt))) as parts:
            async for part in parts:
                yield part

    async def evaluate(self, extension_id: str, dataset_id: str, *, sample_count: int, max_length: int) -> Evaluation:
        """Its loss beside its base's, in this process, one batch at a time.

        Raises:
            errors.NotFound: there is no such extension or dataset.
            errors.Invalid: the dataset holds nothing usable.
        """
        extension = await self._store.get(extension_id)
        async with (
            self._store.reading(extension.artifact_uri) as folder,
            self._bases.lease(extension.model_id) as base,
            attached(base, folder) as key,
        ):
            length = row_length(base, max_length)
            documents = await self._datasets.documents(
                "dataset_id", dataset_id, base.tokenizer, base.model.config.vocab_size
            )
            examples = examples_for("dataset_id", base, documents, length)
            comparison = await compare(base, key, examples.take(slice(sample_count or DEFAULT_SAMPLES)))
        return Evaluation(extension_id=extension_id, **comparison)


def _resolved(prompt: Prompt) -> Prompt:
    return replace(prompt, max_new_tokens=prompt.max_new_tokens or DEFAULT_NEW_TOKENS)


def config_of(new: NewExtension) -> ExtensionConfig:
    """The configuration that a request asks for.

    Raises:
        ConfigInvalid: a value is out of range.
    """
    lora, layer = new.lora or Lora(), new.layers[0] if new.layers else Layer()
    return ExtensionConfig(
        lora_r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        lora_target_modules=lora.target_modules,
        lora_variant=cast(Variant, lora.variant),
        layer_index=layer.index,
        layer_position=cast(Position, layer.position or "encoder"),
        layer_initialization_scale=layer.initialization_scale,
        freeze_base=new.freeze_base,
    )


def _planned(new: NewExtension, blueprint: Blueprint, shapes: PreTrainedModel, caller: str) -> Extension:
    """The extension as it will be stored, every default resolved, without id and files."""
    if not shapes.config.is_encoder_decoder and any(layer.position == "encoder" for layer in new.layers):
        raise errors.Invalid.of("layer.position", "this model has no encoder")
    counts = blueprint.counts(shapes)
    return Extension(
        id="",
        model_id=new.model_id,
        task_name=new.task_name,
        kind=new.kind,
        lora=replace(new.lora or Lora(), target_modules=blueprint.config.targets(shapes)) if counts.lora else None,
        layers=tuple(
            Layer(operation["position"], operation["index"], blueprint.config.layer_initialization_scale)
            for operation in KINDS[new.kind].operations(shapes, blueprint.config)
            if operation["op"] == "insert"
        ),
        parameter_counts=counts.as_dict(),
        base_digest=blueprint.base_digest,
        created_by=caller,
    )


def _require_supported(new: NewExtension) -> None:
    """Refuse contradictions, and what the protocol has words for but this build does not make.

    Raises:
        errors.Invalid: a part is given that the kind does not have.
        errors.Unsupported: it is not built.
    """
    if new.layers and new.kind == "lora":
        raise errors.Invalid.of("layer", "does not belong to an extension of kind lora")
    if new.lora is not None and new.kind == "layer":
        raise errors.Invalid.of("lora", "does not belong to an extension of kind layer")
    if new.lora is not None and new.lora.variant not in get_args(Variant):
        raise errors.Unsupported(f"adapters of variant {new.lora.variant} are not supported")
    if len(new.layers) > 1:
        raise errors.Unsupported("several insertion points are not supported")
    if not new.freeze_base:
        raise errors.Unsupported("only freeze_base true is supported: the base is never trained")
    if new.shared_layer_of:
        raise errors.Unsupported("shared_layer_of is not supported")
