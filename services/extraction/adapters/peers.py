"""The registry's models and datasets as extraction sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from blake3 import blake3
from lensmesh.common.v1 import types_pb2
from lensmesh.registry.v1 import datasets_pb2, groups_pb2, groups_pb2_grpc, models_pb2

from services.extraction.adapters.tokenizers import Tokenizers
from services.extraction.domain import BaseModel, Options, Survey
from services.extraction.ports import Tokenized
from services.kit import errors
from services.residency.catalogue import LOOK_UP_SECONDS, Catalogue, json_of, translated_calls
from services.residency.families import facts
from services.residency.texts import (
    DatasetError,
    DatasetRecord,
    content_digest,
    open_rows,
    special_ids,
    tokenize,
)
from services.residency.tokens import TokenStore
from services.residency.usable import require_usable

GROUPS_PAGE = 500
DEFAULT_BATCH_SIZE = 8


class RegisteredModels:
    """Implements the port `Catalogue`."""

    def __init__(self, catalogue: Catalogue, registry: grpc.aio.Channel) -> None:
        self._catalogue = catalogue
        self._groups = groups_pb2_grpc.GroupServiceStub(registry)

    async def model(self, model_id: str) -> BaseModel:
        """The registry's row."""
        model = await self._catalogue.model(model_id)
        return BaseModel(
            id=model.id,
            model_type=model.model_type,
            identifier=model.model_identifier,
            revision=model.revision,
            digest=model.digest,
            quantization=types_pb2.Quantization.Name(model.quantization).removeprefix("QUANTIZATION_").lower(),
            config=json_of(model.config),
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            context_length=model.context_length,
            parameter_count=model.parameter_count,
            batch_size=model.defaults.model_batch_size or DEFAULT_BATCH_SIZE,
            loaded=model.status == models_pb2.MODEL_STATUS_READY,
            source=types_pb2.ModelSource.Name(model.source).removeprefix("MODEL_SOURCE_").lower(),
        )

    async def extension_uri(self, model_id: str, extension_id: str) -> str:
        """Looked up in the groups of the model."""
        request = groups_pb2.ListGroupsRequest(model_id=model_id, limit=GROUPS_PAGE)
        while True:
            with translated_calls():
                page = await self._groups.ListGroups(request, timeout=LOOK_UP_SECONDS)
            for lens in (lens for group in page.groups for lens in group.lenses):
                if lens.extension_id == extension_id:
                    return lens.artifact_uri
            if not page.next_page_token:
                raise errors.Invalid.of("extension_id", "the extension is no lens of any group of this model")
            request.page_token = page.next_page_token


class RegisteredDatasets:
    """Implements the port `Datasets`."""

    def __init__(self, catalogue: Catalogue, tokenizers: Tokenizers, roots: Sequence[Path], cache_dir: Path) -> None:
        """Use these.

        Args:
            catalogue: the registry's datasets.
            tokenizers: of models that are not loaded yet.
            roots: directories below which local datasets lie.
            cache_dir: where downloads and conversions are kept.
        """
        self._tokenizers = tokenizers
        self._catalogue = catalogue
        self._roots = roots
        self._cache_dir = cache_dir
        self._store = TokenStore(cache_dir / "tokens")

    async def survey(self, dataset_id: str, model: BaseModel) -> Survey:
        """A local or inline dataset is opened and hashed; of a hub dataset the registry's row must do."""
        row, record = await self._record(dataset_id)
        rows = row.rows if row.HasField("rows") else None
        tokens_by = await asyncio.to_thread(lambda: self._tokenizers.digest(self._tokenizers.find(model)))
        if record.source == "huggingface":
            name = f"{record.identifier}/{record.split}/{record.text_field}"
            return Survey(digest=f"{record.digest or name} {tokens_by}", size_bytes=row.size_bytes, rows=rows)
        try:
            digest, rows = await asyncio.to_thread(self._inspect, record)
        except DatasetError as error:
            raise _unusable("dataset_id", error) from error
        return Survey(digest=f"{digest} {tokens_by}", size_bytes=row.size_bytes, rows=rows)

    async def require_usable(self, dataset_id: str, options: Options, model: BaseModel) -> None:
        """A hub dataset counts as usable until it was tokenised once: looking at it would mean to download it."""
        _, record = await self._record(dataset_id)
        try:
            await asyncio.to_thread(self._require_usable, record, options, model)
        except DatasetError as error:
            raise _unusable(error.field, error) from error

    async def tokenize(self, dataset_id: str, options: Options, tokenizer: Any, vocab_size: int) -> Tokenized:
        """Beside the event loop."""
        _, record = await self._record(dataset_id)
        try:
            return await asyncio.to_thread(self._tokenize, record, options, tokenizer, vocab_size)
        except DatasetError as error:
            raise _unusable(error.field, error) from error

    async def _record(self, dataset_id: str) -> tuple[datasets_pb2.Dataset, DatasetRecord]:
        row = await self._catalogue.dataset(dataset_id)
        return row, await self._catalogue.readable(row)

    def _inspect(self, record: DatasetRecord) -> tuple[str, int]:
        rows = open_rows(record, self._roots, self._cache_dir)
        if not rows.tokenized and not any(rows.texts()):
            raise DatasetError("dataset_id", "no row of the dataset has any text")
        columns = (record.split, record.text_field, record.prompt_field, record.target_field)
        return f"{content_digest(record, self._roots)} {columns}", len(rows)

    def _require_usable(self, record: DatasetRecord, options: Options, model: BaseModel) -> None:
        tokenizer, vocab_size = self._tokenizers.find(model), facts(model.config).vocab_size
        uncounted = special_ids(tokenizer) if tokenizer is not None else ()
        if record.source == "huggingface":
            name = self._name(record, options, tokenizer, vocab_size) if tokenizer is not None else None
            if name is not None and self._store.counted(name) == 0:
                raise DatasetError("dataset_id", "every token of the dataset is a special token")
            return
        rows = open_rows(record, self._roots, self._cache_dir)
        if tokenizer is None and not rows.tokenized:
            return  # the job will know
        require_usable(
            rows,
            tokenizer,
            options.encoding,
            row_limit=options.sample_count,
            vocab_size=vocab_size,
            uncounted_ids=uncounted,
        )

    def _name(self, record: DatasetRecord, options: Options, tokenizer: Any, vocab_size: int) -> str | None:
        """Digest of whatever decides the tokens; None where only the hub knows the dataset's content."""
        if record.source == "huggingface" and not record.digest:
            return None
        content = record.digest if record.source == "huggingface" else content_digest(record, self._roots)
        columns = (record.identifier, record.split, record.text_field, record.prompt_field, record.target_field)
        told = (
            content,
            columns,
            self._tokenizers.digest(tokenizer),
            options.encoding,
            options.sample_count,
            vocab_size,
        )
        return blake3(repr(told).encode()).hexdigest()

    def _tokenize(self, record: DatasetRecord, options: Options, tokenizer: Any, vocab_size: int) -> Tokenized:
        rows = open_rows(record, self._roots, self._cache_dir)
        if tokenizer is None and not rows.tokenized:
            raise DatasetError("model_id", "the model has no tokenizer; give a dataset that is tokenised already")
        name = self._name(record, options, tokenizer, vocab_size)
        sequences = self._store.load(name) if name else None
        if sequences is None:
            sequences = tokenize(rows, tokenizer, options.encoding, options.sample_count, vocab_size)
            if name:
                special = special_ids(tokenizer) if tokenizer is not None else ()
                self._store.save(name, sequences, special)
        description = {
            "id": record.id,
            "digest": record.digest or "",
            "source": record.source,
            "identifier": record.identifier,
            "split": record.split,
            "text_field": record.text_field,
            "rows_read": sequences.rows_read,
            "bad_rows": sequences.bad_rows,
            "truncated_rows": sequences.truncated_rows,
            "truncated_tokens": sequences.truncated_tokens,
            "special_tokens": "as given" if rows.tokenized else options.special_tokens,
            "packing": options.packing,
        }
        if options.max_tokens:
            sequences = sequences.limited(options.max_tokens, special_ids(tokenizer) if tokenizer is not None else ())
        return Tokenized(sequences, description)


def _unusable(field: str, error: DatasetError) -> errors.Invalid:
    return errors.Invalid(error.message, reason="DATASET_UNUSABLE", violations=[(field, error.message)])
