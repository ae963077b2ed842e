"""Decisions about other tools' files: exports, imports."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from services.kit import errors
from services.kit.files import chunks
from services.kit.requests import RequestKey
from services.residency.families import SITES, Family, locate, site_of
from services.residency.lenses.transcoder import Transcoder as Weights
from services.training.cache_rows import CacheRows
from services.training.compute import ConfigError, Export, export, load_foreign
from services.training.domain import BaseModel, NewTranscoder, Training, Transcoder
from services.training.feature_files import FeatureSample, Samples, write_dashboards
from services.training.job_ports import Extractions, Files, LeasedModel, Models
from services.training.ports import Catalogue

ROWS = 4096
SEED = 1
"""Of the rows that an export is calibrated and judged on."""

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class WantedImport:
    """Files that somebody wants as a transcoder; what is empty or None is not said."""

    model_id: str
    format: str
    source: Literal["huggingface", "local"]
    identifier: str
    revision: str = ""
    subfolder: str = ""
    layer: int | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Published:
    """A folder of files that anybody may read."""

    uri: str
    files: Sequence[tuple[str, int]]
    """Names and bytes."""


@dataclass(frozen=True, slots=True)
class FileBytes:
    """A part of a file."""

    total: int
    chunks: AsyncIterator[bytes]


class Store(Protocol):
    """Transcoders, their trainings, and folders made of them."""

    async def transcoder(self, transcoder_id: str) -> Transcoder:
        """One transcoder.

        Raises:
            errors.NotFound: there is none.
        """

    async def training(self, job_id: str) -> Training:
        """One training.

        Raises:
            errors.NotFound: there is none.
        """

    def staging(self) -> AbstractContextManager[Path]:
        """An empty directory that can be published."""

    async def publish_export(self, transcoder_id: str, folder: Path) -> str:
        """Keep a folder for as long as its transcoder; its uri."""

    def reading_export(self, digest: str) -> AbstractAsyncContextManager[Path]:
        """An export's folder.

        Raises:
            errors.NotFound: there is none.
        """

    def reading_samples(self, transcoder_id: str) -> AbstractAsyncContextManager[Path]:
        """The newest feature samples of a transcoder.

        Raises:
            errors.NotFound: there are none.
        """

    async def add_imported(self, new: NewTranscoder, folder: Path, key: RequestKey) -> Transcoder:
        """Make a folder a transcoder, or answer what the same request got before.

        Raises:
            errors.Conflict: `REQUEST_ID_REUSED`.
        """


class Sources(Protocol):
    """Where files of other tools come from."""

    async def folder(self, wanted: WantedImport) -> Path:
        """The folder on this machine; downloaded where it has to be.

        Raises:
            errors.Invalid: `identifier`: there is no such folder.
            errors.Unavailable: the hub does not answer.
        """


class Exchange:
    """What the servicer calls; raises `services.kit.errors` only."""

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        extractions: Extractions,
        *,
        files: Files,
        models: Models,
        sources: Sources,
    ) -> None:
        self._store, self._catalogue, self._extractions = store, catalogue, extractions
        self._files, self._models, self._sources = files, models, sources

    async def export(
        self, transcoder_id: str, format_: str, *, prefix: int, cache_id: str, rows: int
    ) -> tuple[Export, Published]:
        """Write a transcoder as another tool's files; thresholds are calibrated where a cache is there.

        Raises:
            errors.NotFound: there is no such transcoder or cache.
            errors.Invalid: the format cannot hold it, or the prefix does not exist; the field is named.
        """
        transcoder = await self._store.transcoder(transcoder_id)
        if prefix > len(transcoder.group_sizes):
            raise errors.Invalid.of("prefix", f"the transcoder has {len(transcoder.group_sizes)} groups")
        async with self._files.reading(transcoder.artifact_uri) as folder:
            weights = await asyncio.to_thread(Weights.load, folder)
        gain = await self._gain(transcoder, weights) if format_ == "gemma_scope" else None
        found = await self._rows(transcoder, weights, cache_id, rows or ROWS)
        weights.info = {**weights.info, "layer": transcoder.layer}
        calibrate = found[0][0] if found is not None and transcoder.activation != format_native(format_) else None
        with self._store.staging() as staged:
            try:
                done = await asyncio.to_thread(
                    export,
                    weights,
                    format_,
                    staged,
                    calibrate=calibrate,
                    held_out=None if found is None else found[1],
                    prefix=prefix or None,
                    gain=gain,
                )
            except ConfigError as error:
                raise errors.Invalid.of(error.field, error.description) from error
            files = [(path.name, path.stat().st_size) for path in sorted(staged.iterdir())]
            uri = await self._store.publish_export(transcoder_id, staged)
        return done, Published(uri, files)

    async def dashboards(self, transcoder_id: str) -> Published:
        """Write the newest feature samples as feature dashboards.

        Raises:
            errors.NotFound: there is no such transcoder, or it has no samples.
        """
        await self._store.transcoder(transcoder_id)
        async with self._store.reading_samples(transcoder_id) as folder:
            with self._store.staging() as staged:
                await asyncio.to_thread(lambda: write_dashboards(Samples(folder), staged))
                files = [(path.name, path.stat().st_size) for path in sorted(staged.iterdir())]
                return Published(await self._store.publish_export(transcoder_id, staged), files)

    async def feature(self, transcoder_id: str, feature: int) -> tuple[FeatureSample, int, int]:
        """One latent's sample, its first prefix from 1, and the tokens that were looked at.

        Raises:
            errors.NotFound: there is no such transcoder, or it has no samples.
            errors.Invalid: `feature`: the dictionary is smaller.
        """
        transcoder = await self._store.transcoder(transcoder_id)
        if feature >= transcoder.dict_size:
            raise errors.Invalid.of("feature", f"the transcoder has {transcoder.dict_size} latents")
        prefix = bisect_right(list(accumulate(transcoder.group_sizes)), feature) + 1
        async with self._store.reading_samples(transcoder_id) as folder:
            samples = await asyncio.to_thread(Samples, folder)
            return await asyncio.to_thread(samples.of, feature), prefix, samples.facts["rows"]

    @asynccontextmanager
    async def read(self, digest: str, name: str, offset: int, length: int) -> AsyncIterator[FileBytes]:
        """Bytes of an exported file in chunks of at most 1 MiB; to its end where `length` is 0.

        Raises:
            errors.NotFound: there is no such export here, or no such file in it.
            errors.Invalid: `offset` is behind the end.
        """
        async with self._store.reading_export(digest) as folder:
            path = folder / name
            if path.parent != folder or not path.is_file():
                raise errors.NotFound(f"The export has no file {name}", metadata={"name": name})
            total = path.stat().st_size
            if offset > total:
                raise errors.Invalid.of("offset", f"the file has {total} bytes", size_bytes=total)
            yield FileBytes(total, chunks(path, offset, min(total, offset + length) if length else total, what="file"))

    async def load(self, wanted: WantedImport, key: RequestKey) -> Transcoder:
        """Make a transcoder of another tool's files.

        Raises:
            errors.NotFound: there is no such model.
            errors.Invalid: the files cannot be read, or do not say which layer they are of; the field is named.
            errors.Conflict: `LENS_INCOMPATIBLE`: they are of another width; or the model's files were not read yet.
        """
        model = await self._catalogue.model(wanted.model_id)
        if not model.digest:
            raise errors.Conflict("the model's files were not read yet; load it once", metadata={"model_id": model.id})
        folder = await self._sources.folder(wanted)
        try:
            weights = await asyncio.to_thread(load_foreign, folder, wanted.format, layer=wanted.layer)
        except ConfigError as error:
            raise errors.Invalid.of(error.field, error.description) from error
        except ValueError as error:
            raise errors.Invalid.of("identifier", str(error)) from error
        layer = _checked(weights, model, wanted)
        new = NewTranscoder(
            coder="",
            name=wanted.name or f"{wanted.format} {wanted.identifier} layer {layer}"[:500],
            model_id=model.id,
            layer=layer,
            source_hook_point=weights.info["source_hook_point"],
            target_hook_point=weights.info["target_hook_point"],
            d_in=weights.d_in,
            d_out=weights.d_out,
            dict_size=weights.dict_size,
            group_sizes=weights.shape.group_sizes,
            top_k=weights.shape.top_k,
            activation=weights.shape.activation,
            base_digest=model.digest,
            tokens_seen=0,
            train_fvu=0.0,
        )
        with self._store.staging() as staged:
            await asyncio.to_thread(weights.save, staged)
            return await self._store.add_imported(new, staged, key)

    async def _rows(
        self, transcoder: Transcoder, weights: Weights, cache_id: str, rows: int
    ) -> tuple[Rows, Rows] | None:
        """Pairs to calibrate and to judge on; None where no cache is named and the training's own is gone."""
        try:
            own = cache_id or (await self._store.training(transcoder.job_id)).cache_id
            if not own:
                return None
            cache = await self._extractions.open(own)
            async with self._files.reading(cache.storage_uri) as folder:
                return await asyncio.to_thread(_pairs, folder, weights, rows)
        except (errors.NotFound, errors.Failed):
            if cache_id:
                raise
            return None

    async def _gain(self, transcoder: Transcoder, weights: Weights) -> Tensor | None:
        """Gain of the norm before the MLP, where the transcoder's input has it applied."""
        if site_of(weights.reads)[1] != "mlp_in":
            return None
        await self._models.bring(transcoder.model_id)
        async with self._models.lease(transcoder.model_id) as leased:
            return await leased.run(_gain_of, leased, transcoder.layer)


def format_native(format_: str) -> str:
    """The activation that needs no calibration in a format, where it has a top-k."""
    return "topk" if format_ in ("sparsify", "circuit_tracer") else ""


def _gain_of(leased: LeasedModel, layer: int) -> Tensor:
    family: Family = leased.family
    if not family.rms_norm:
        raise errors.Invalid.of("format", f"Gemma Scope's input is that of an RMSNorm, which {family.name} has not")
    norm, _ = locate(leased.model, family, f"blocks.{layer}.{SITES['ln2_normalized']}")
    assert isinstance(norm, nn.Module), "a hook point is in a module"
    return norm.get_parameter("weight").detach().float().cpu() + family.gain_offset


def _pairs(folder: Path, weights: Weights, rows: int) -> tuple[Rows, Rows]:
    point = str(weights.info["target_hook_point"])
    try:
        source = CacheRows(folder, {"pair": (weights.reads, point)})
    except KeyError as error:
        raise errors.Invalid.of("cache_id", f"the cache does not hold {weights.reads} and {point}") from error
    half = min(rows, source.rows // 2)
    if half < 2:
        raise errors.Invalid.of("cache_id", f"the cache has {source.rows} rows")
    x, y = next(source.batches(2 * half, SEED, 0))["pair"]
    x, y = x.float(), y.float()
    if x.shape[1] != weights.d_in or y.shape[1] != weights.d_out:
        raise errors.Invalid.of("cache_id", f"the cache is {x.shape[1]} wide, the transcoder {weights.d_in}")
    return (x[:half], y[:half]), (x[half:], y[half:])


def _checked(weights: Weights, model: BaseModel, wanted: WantedImport) -> int:
    """The layer; the weights' info names model, base and both hook points from here on."""
    info = weights.info
    if wanted.layer is None and "source_hook_point" not in info:
        raise errors.Invalid.of("layer", "the files do not say it")
    if "source_hook_point" not in info or "target_hook_point" not in info:
        points = {"source_hook_point": SITES["mlp_in"], "target_hook_point": SITES["mlp_out"]}
        info |= {name: f"blocks.{wanted.layer}.{suffix}" for name, suffix in points.items()}
    try:
        layer, _ = site_of(weights.reads)
        site_of(str(info["target_hook_point"]))
    except ValueError as error:
        raise errors.Invalid.of("identifier", str(error)) from error
    if not isinstance(layer, int) or layer >= model.num_layers:
        raise errors.Invalid.of("layer", f"layer {layer} is not one of the model's, 0 to {model.num_layers - 1}")
    if wanted.layer is not None and wanted.layer != layer:
        raise errors.Invalid.of("layer", f"the files are of layer {layer}")
    for name, width in (("input", weights.d_in), ("output", weights.d_out)):
        if width != model.hidden_size:
            raise errors.Conflict(
                f"the transcoder's {name} has another width than the model",
                reason="LENS_INCOMPATIBLE",
                metadata={"expected": model.hidden_size, "found": width},
            )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.buffers()):
        raise errors.Invalid.of("identifier", "the weights hold values that are not finite")
    weights.info = {**info, "model": model.id, "base_digest": model.digest, "layer": layer}
    weights.info["imported_from"] = {"format": wanted.format, "identifier": wanted.identifier}
    return layer
