"""The decisions of the extension service: one function per rpc."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, replace
from typing import Any, cast

from transformers import PreTrainedModel

from services.extensions import errors as translated
from services.extensions.compute.blueprint import Blueprint
from services.extensions.compute.config import (
    ExtensionConfig,
    LayerPlacement,
    Position,
    Variant,
    require_task_name,
)
from services.extensions.compute.count import skeleton_of
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
from services.extensions.exchanging import require_mergeable
from services.extensions.measuring import attached, compare, examples_for, row_length
from services.extensions.ports import Bases, Catalogue, Datasets, Store
from services.extensions.training import settings_of
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
        _require_parts(new)
        model = await self._catalogue.model(new.model_id)
        if not new.freeze_base:
            require_mergeable(new.layers, model.quantization)
        shared = await self._shared(new)
        async with AsyncExitStack() as stack:
            folder = await stack.enter_async_context(self._store.reading(shared.artifact_uri)) if shared else None
            with translated.requests():
                blueprint = Blueprint(
                    kind=new.kind,
                    task_name=new.task_name,
                    config=config_of(new, shared),
                    base_parameters=model.parameter_count,
                    base_digest=model.digest,
                    seed=new.seed,
                    shared=folder,
                )
                shapes = await asyncio.to_thread(skeleton_of, model.config)
                require_task_name(new.task_name, (path for path, _ in shapes.named_modules()))
                planned = _planned(new, blueprint, shapes, shared)
                if validate_only:
                    return replace(planned, created_by=key.caller)
                if blueprint.needs_base:
                    async with self._bases.lease(new.model_id) as base:
                        write = await base.run(blueprint.prepare, base.model)
                else:
                    write = await asyncio.to_thread(blueprint.prepare, shapes)
            made = replace(planned, id=self._store.new_id(), created_by=key.caller)
            return await self._store.insert(made, write, key)

    async def _shared(self, new: NewExtension) -> Extension | None:
        """The extension whose layers the new one shall use; the one that had them first stands for all.

        Raises:
            errors.Invalid: there is none, or it is of another model or has no layers.
        """
        if not new.shared_layer_of:
            return None
        try:
            found = await self._store.get(new.shared_layer_of)
        except errors.NotFound as error:
            raise errors.Invalid.of("shared_layer_of", f"there is no extension {new.shared_layer_of}") from error
        if found.model_id != new.model_id:
            raise errors.Invalid.of("shared_layer_of", f"is an extension of {found.model_id}")
        if any(layer.from_step for layer in found.layers) and found.trained_steps == 0:
            raise errors.Invalid.of("shared_layer_of", "has layers that its training inserts; train it first")
        return found

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
        """Delete an extension and its files, and give its memory back.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: a lens or a call uses it, or it is being trained.
        """
        extension = await self._store.get(extension_id)
        if extension.status == "training":
            raise errors.Conflict(f"{extension_id} is being trained", metadata={"job_id": extension.job_id or ""})
        lenses = await self._catalogue.lenses_of(extension)
        if lenses:
            raise errors.Conflict(
                f"lenses use {extension_id}: {', '.join(lenses)}",
                reason="IN_USE",
                metadata={"lenses": ", ".join(lenses)},
            )
        await self._catalogue.take_off(extension)
        await self._store.delete(extension_id)

    async def train(self, training: NewTraining, *, key: RequestKey) -> str:
        """Queue a training; its job's id.

        Raises:
            errors.Invalid: neither or both of steps and epochs are given, a setting is out of range, the devices cannot
                share the batch, or the dataset has no targets and the model needs them.
            errors.NotFound: there is no such extension or dataset.
            errors.Conflict: it is being trained already.
        """
        if bool(training.steps) == bool(training.epochs):
            raise errors.Invalid.of("steps", "give either steps or epochs")
        settings = settings_of(training, 1, "fp32")
        extension = await self._store.get(training.extension_id)
        _require_shareable(settings.batch_size, training.devices or 1, freeze_base=extension.freeze_base)
        model = await self._catalogue.model(extension.model_id)
        named = {"dataset_id": training.dataset_id, "held_out_dataset_id": training.held_out_dataset_id}
        for field, dataset_id in named.items():
            paired = not dataset_id or await self._datasets.paired(dataset_id)
            if not paired and model.config.get("is_encoder_decoder"):
                raise errors.Invalid.of(field, "has no targets; register it with a prompt_field and a target_field")
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

    async def generate_together(self, wanted: Sequence[tuple[str, Prompt]]) -> Sequence[Generated]:
        """Continue several prompts in the same forward passes, each with an extension of its own on one base.

        Raises:
            errors.NotFound: an extension is not there.
            errors.Invalid: they are on several bases, or one is more than LoRA.
        """
        asked = [(await self._store.get(extension_id), _resolved(prompt)) for extension_id, prompt in wanted]
        if len({extension.model_id for extension, _ in asked}) > 1:
            raise errors.Invalid.of("requests.id", "must be extensions of one base")
        return await self._catalogue.generate_together(asked)

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


def _require_shareable(batch_size: int, devices: int, *, freeze_base: bool) -> None:
    if batch_size % devices:
        raise errors.Invalid.of("batch_size", f"{batch_size} rows cannot be shared evenly by {devices} devices")
    if devices > 1 and not freeze_base:
        raise errors.Invalid.of("devices", "an extension that trains its base with it is trained on one device")


def config_of(new: NewExtension, shared: Extension | None = None) -> ExtensionConfig:
    """The configuration that a request asks for.

    Args:
        new: the request.
        shared: the extension whose layers it uses.

    Raises:
        ConfigInvalid: a value is out of range.
    """
    lora = new.lora or Lora()
    layers: dict[str, Any] = {}
    if len(new.layers) == 1 and new.layers[0].mlp_width is None and not new.layers[0].from_step:
        (layer,) = new.layers
        layers["layer_position"], layers["layer_index"] = layer.position or "encoder", layer.index
        layers["layer_initialization_scale"] = layer.initialization_scale
    elif new.layers:
        layers["layers"] = tuple(LayerPlacement(**_placement(layer)) for layer in new.layers)
    return ExtensionConfig(
        lora_r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        lora_target_modules=lora.target_modules,
        lora_variant=cast(Variant, lora.variant),
        lora_target_r=lora.target_r,
        **layers,
        freeze_base=new.freeze_base,
        shared_layer_of=_first_owner(shared) if shared else "",
        train_shared_layer=new.train_shared_layer,
    )


def _placement(layer: Layer) -> dict[str, Any]:
    return asdict(layer) | {"position": cast(Position, layer.position or "encoder")}


def _first_owner(extension: Extension) -> str:
    return extension.shared_layer_of or extension.id


def _planned(new: NewExtension, blueprint: Blueprint, shapes: PreTrainedModel, shared: Extension | None) -> Extension:
    """The extension as it will be stored, every default resolved, without id and files."""
    if not shapes.config.is_encoder_decoder and any(layer.position == "encoder" for layer in new.layers):
        raise errors.Invalid.of("layer.position", "this model has no encoder")
    counts = blueprint.counts(shapes)
    config = blueprint.config
    target = config.lora_target_r or (config.lora_r // 2 if config.lora_variant == "adalora" else None)
    return Extension(
        id="",
        model_id=new.model_id,
        task_name=new.task_name,
        kind=new.kind,
        lora=replace(new.lora or Lora(), target_modules=config.targets(shapes), target_r=target)
        if counts.lora
        else None,
        layers=shared.layers if shared else _layers(blueprint, shapes),
        parameter_counts=counts.as_dict(),
        base_digest=blueprint.base_digest,
        created_by="",
        freeze_base=new.freeze_base,
        shared_layer_of=config.shared_layer_of,
        train_shared_layer=new.train_shared_layer,
    )


def _layers(blueprint: Blueprint, shapes: PreTrainedModel) -> tuple[Layer, ...]:
    """Where layers are inserted, one entry a stack; those that training inserts as they were asked for."""
    made = iter([operation for operation in blueprint.operations(shapes) if operation["op"] == "insert"])
    found: list[Layer] = []
    for placement in blueprint.config.placements if blueprint.kind != "lora" else ():
        wanted = Layer(**asdict(placement))
        if placement.from_step:
            found.append(wanted)
            continue
        for _ in range(2 if placement.position == "both" else 1):
            operation = next(made)
            found.append(replace(wanted, position=operation["position"], index=operation["index"]))
    return tuple(found)


def _require_parts(new: NewExtension) -> None:
    """Refuse parts that the kind does not have.

    Raises:
        errors.Invalid: a part is given that the kind does not have.
    """
    if new.layers and new.kind == "lora":
        raise errors.Invalid.of("layer", "does not belong to an extension of kind lora")
    if new.lora is not None and new.kind == "layer":
        raise errors.Invalid.of("lora", "does not belong to an extension of kind layer")
