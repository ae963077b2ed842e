"""Models that a training splits over its devices: their files, the dataset's tokens, and what goes where."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lensmesh.common.v1 import types_pb2
from lensmesh.registry.v1 import models_pb2
from lensmesh.residency.v1 import residency_pb2
from transformers import PreTrainedTokenizerBase

from services.kit import errors
from services.residency.catalogue import Catalogue
from services.residency.estimate import Estimate, laid_out
from services.residency.failures import for_callers
from services.residency.families import Facts, facts
from services.residency.gang import CUDA_CONTEXT_BYTES
from services.residency.loading import Prepared, load_tokenizer, prepare
from services.residency.messages import source
from services.residency.sources import digest, fetch
from services.residency.split import device_map
from services.residency.texts import special_ids
from services.residency.tokens import TokenStore
from services.training.adapters.datasets import RegisteredTexts
from services.training.dialogue import Split, Spread
from services.training.domain import Cache, Plan
from services.training.split_rows import POOLS_AT_ONCE, TOKENS, pool_bytes


@dataclass(frozen=True, slots=True)
class LaidOut:
    """Implements the port `LaidOutModel`."""

    digest: str
    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase | None
    facts: Facts
    estimate: Estimate
    device: str

    @property
    def weight_bytes(self) -> int:
        """As they will be."""
        return self.estimate.weights

    def over(self, devices: int, work_bytes: int) -> tuple[Spread, int]:
        """By accelerate's device map."""
        prepared, cuda = self.prepared, self.device.startswith("cuda")
        with for_callers():
            spread, held = device_map(prepared, devices, work_bytes, self.device)
        each = self.estimate.activations + self.estimate.overhead
        first, *others = [weights + each for weights in held]
        found = Spread(
            directory=str(prepared.directory),
            quantization=prepared.quantization,
            spread=spread,
            devices=[f"cuda:{number}" if cuda else "cpu" for number in range(devices)],
        )
        return found, max(first + work_bytes, *(size + CUDA_CONTEXT_BYTES * cuda for size in others))


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """Implements the port `SplitModel`."""

    cache: Cache
    model: LaidOut
    folder: Path
    uncounted: Sequence[int]

    def over(self, devices: int, work_bytes: int) -> tuple[Split, int]:
        """With the pools of its rows on the first device."""
        row_bytes = len(self.cache.widths) * max(self.cache.widths.values()) * self.model.prepared.dtype.itemsize
        pools = POOLS_AT_ONCE * pool_bytes(self.cache.tokens, row_bytes)
        spread, bytes_each = self.model.over(devices, work_bytes + pools)
        return Split(**asdict(spread), folder=str(self.folder), uncounted=self.uncounted), bytes_each


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
        """A model, and a dataset's tokens in `folder`."""
        model = await self.laid_out(model_id)
        sequences = await self._texts.sequences(dataset_id, model.tokenizer, model.facts)
        uncounted = special_ids(model.tokenizer) if model.tokenizer is not None else ()
        tokens = int(sequences.counted(uncounted).sum())
        await asyncio.to_thread(TokenStore(folder).save, TOKENS, sequences)
        widths = dict.fromkeys(plan.hook_points, model.facts.hidden_size)
        return OpenedModel(Cache("", model_id, model.digest, "", tokens, widths), model, folder, uncounted)

    async def laid_out(self, model_id: str) -> LaidOut:
        """The model's files are read but for their weights."""
        record = await self._catalogue.model(model_id)
        with for_callers():
            return await asyncio.to_thread(self._laid_out, record)

    def _laid_out(self, record: models_pb2.Model) -> LaidOut:
        spec = residency_pb2.SourceSpec(
            source=record.source, identifier=record.model_identifier, revision=record.revision
        )
        directory = fetch(source(spec), self._roots, self._hub_dir)
        found = digest(directory)
        if record.digest not in ("", found):  # empty where nobody has read the files yet
            raise errors.Failed("the model's files are not those that were registered", reason="CHECKSUM_MISMATCH")
        quantization = types_pb2.Quantization.Name(record.quantization).removeprefix("QUANTIZATION_").lower()
        prepared = prepare(directory, quantization)
        known, form = facts(prepared.model.config.to_dict()), (prepared.quantization, prepared.dtype, self._device)
        estimate = laid_out(prepared.model, prepared.entries, *form)
        return LaidOut(found, prepared, load_tokenizer(directory), known, estimate, self._device)
