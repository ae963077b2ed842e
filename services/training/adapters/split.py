"""Models that a training splits over its devices: their files, the dataset's tokens, and what goes where."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lensmesh.common.v1 import types_pb2
from lensmesh.registry.v1 import models_pb2
from lensmesh.residency.v1 import residency_pb2
from transformers import PreTrainedTokenizerBase

from services.kit import errors
from services.residency.catalogue import Catalogue
from services.residency.estimate import laid_out
from services.residency.failures import for_callers
from services.residency.families import facts
from services.residency.gang import CUDA_CONTEXT_BYTES
from services.residency.loading import Prepared, load_tokenizer, prepare
from services.residency.messages import source
from services.residency.sources import digest, fetch
from services.residency.split import device_map
from services.residency.texts import special_ids
from services.residency.tokens import TokenStore
from services.training.adapters.datasets import RegisteredTexts
from services.training.dialogue import Split
from services.training.domain import Cache, Plan
from services.training.split_rows import POOLS_AT_ONCE, TOKENS, pool_bytes


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """Implements the port `SplitModel`: a model that is laid out, without its weights."""

    cache: Cache
    prepared: Prepared
    device: str
    folder: Path
    uncounted: Sequence[int]

    def over(self, devices: int, work_bytes: int) -> tuple[Split, int]:
        """By accelerate's device map."""
        prepared, cuda = self.prepared, self.device.startswith("cuda")
        row_bytes = len(self.cache.widths) * max(self.cache.widths.values()) * prepared.dtype.itemsize
        work_bytes += POOLS_AT_ONCE * pool_bytes(self.cache.tokens, row_bytes)
        with for_callers():
            spread, held = device_map(prepared, devices, work_bytes, self.device)
        form = (prepared.model, prepared.entries, prepared.quantization, prepared.dtype, self.device)
        forward = laid_out(*form)
        each = forward.activations + forward.overhead
        first, *others = [weights + each for weights in held]
        split = Split(
            directory=str(prepared.directory),
            quantization=prepared.quantization,
            spread=spread,
            devices=[f"cuda:{number}" if cuda else "cpu" for number in range(devices)],
            folder=str(self.folder),
            uncounted=self.uncounted,
        )
        return split, max(first + work_bytes, *(size + CUDA_CONTEXT_BYTES * cuda for size in others))


class SplitModels:
    """Implements the port `Splits`."""

    def __init__(
        self, catalogue: Catalogue, texts: RegisteredTexts, roots: Sequence[Path], hub_dir: Path, device: str
    ) -> None:
        """Use these.

        Args:
            catalogue: the registry's models.
            texts: its datasets.
            roots: directories below which local models lie.
            hub_dir: where downloaded ones are kept.
            device: as torch names any of the devices in a process of its own.
        """
        self._catalogue, self._texts, self._roots, self._hub_dir = catalogue, texts, roots, hub_dir
        self._device = device

    async def open(self, model_id: str, dataset_id: str, plan: Plan, folder: Path) -> OpenedModel:
        """The model's files are read but for their weights."""
        record = await self._catalogue.model(model_id)
        with for_callers():
            found, prepared, tokenizer = await asyncio.to_thread(self._laid_out, record)
            known = facts(prepared.model.config.to_dict())
        sequences = await self._texts.sequences(dataset_id, tokenizer, known)
        uncounted = special_ids(tokenizer) if tokenizer is not None else ()
        tokens = int(sequences.counted(uncounted).sum())
        await asyncio.to_thread(TokenStore(folder).save, TOKENS, sequences)
        widths = dict.fromkeys(plan.hook_points, known.hidden_size)
        cache = Cache("", model_id, found, "", tokens, widths)
        return OpenedModel(cache, prepared, self._device, folder, uncounted)

    def _laid_out(self, record: models_pb2.Model) -> tuple[str, Prepared, PreTrainedTokenizerBase | None]:
        spec = residency_pb2.SourceSpec(
            source=record.source, identifier=record.model_identifier, revision=record.revision
        )
        directory = fetch(source(spec), self._roots, self._hub_dir)
        found = digest(directory)
        if record.digest not in ("", found):  # empty where nobody has read the files yet
            raise errors.Failed("the model's files are not those that were registered", reason="CHECKSUM_MISMATCH")
        quantization = types_pb2.Quantization.Name(record.quantization).removeprefix("QUANTIZATION_").lower()
        return found, prepare(directory, quantization), load_tokenizer(directory)
