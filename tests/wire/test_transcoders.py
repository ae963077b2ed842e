"""TranscoderService over real gRPC and PostgreSQL: exports, imports and comparisons of what was trained there."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from lensmesh.extraction.v1 import extraction_pb2
from lensmesh.training.v1 import training_pb2 as pb
from lensmesh.training.v1 import transcoders_pb2 as tpb

from services.kit.database import Database
from services.residency.lenses.transcoder import Transcoder
from services.training.cache_rows import CacheRows
from services.training.compute import load_foreign
from services.training.compute.formats import judged
from tests import models
from tests.support import eventually
from tests.wire.extraction_support import DATASET, MODEL
from tests.wire.test_training_requests import refused, texts
from tests.wire.training_support import HELD_OUT, Mesh, meshing


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LENSMESH_MODEL_ROOTS", str(tmp_path / "roots"))
    (tmp_path / "roots").mkdir()
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: texts(60), HELD_OUT: texts(24, 1000)}
        yield mesh


async def downloaded(mesh: Mesh, export: tpb.TranscoderExport, folder: Path) -> Path:
    await asyncio.to_thread(folder.mkdir, parents=True)
    for file in export.files:
        request = tpb.ReadExportedFileRequest(digest=export.digest, name=file.name)
        content = b"".join([part.data async for part in mesh.transcoders.ReadExportedFile(request)])
        assert len(content) == file.size_bytes
        (folder / file.name).write_bytes(content)
    return folder


async def export(mesh: Mesh, transcoder_id: str, name: str, **fields: Any) -> tpb.TranscoderExport:
    format_ = tpb.TranscoderFormat.Value(f"TRANSCODER_FORMAT_{name.upper()}")
    return await mesh.transcoders.ExportTranscoder(
        tpb.ExportTranscoderRequest(id=transcoder_id, format=format_, **fields)
    )


def assert_picture(parts: list[Any]) -> None:
    assert [part.content_type for part in parts] == ["image/png"]
    assert parts[0].data.startswith(b"\x89PNG")


async def feature(mesh: Mesh, transcoder_id: str, number: int) -> tpb.Feature:
    return await mesh.transcoders.GetFeature(tpb.GetFeatureRequest(id=transcoder_id, feature=number))


async def held_out(mesh: Mesh, cache_id: str, transcoder: Transcoder, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    cache = await mesh.extraction.GetActivationCache(extraction_pb2.GetActivationCacheRequest(id=cache_id))
    pairs = {"pair": (transcoder.reads, transcoder.info["target_hook_point"])}
    x, y = next(CacheRows(mesh.folder(cache.storage_uri), pairs).batches(2 * half, 1, 0))["pair"]
    return x[half:].float(), y[half:].float()


async def test_exports_are_downloaded_judged_imported_and_deleted(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    job = await mesh.trained(layers=[1], tracker="wandb")
    (own,) = job.transcoder_ids
    kept = mesh.context.settings.state_dir / "trackers"
    assert [path.name for path in kept.rglob("*.wandb")] == [f"run-{job.id}.wandb"]
    original = Transcoder.load(mesh.folder((await mesh.transcoder(own)).artifact_uri))

    sae_lens = await export(mesh, own, "sae_lens", rows=200)
    assert sae_lens.activation == pb.ACTIVATION_JUMPRELU
    assert sae_lens.thresholds in ("scalar", "per_latent")
    assert sae_lens.calibrated_l0 == pytest.approx(sae_lens.wanted_l0, rel=0.01)
    x, y = await held_out(mesh, job.cache_id, original, 200)
    folder = await downloaded(mesh, sae_lens, tmp_path / "roots" / "mine" / "sae")
    for figures, transcoder in ((sae_lens.original, original), (sae_lens.converted, load_foreign(folder, "sae_lens"))):
        expected = judged(transcoder, x, y)
        assert (figures.l0, figures.fvu) == pytest.approx((expected.l0, expected.fvu), rel=1e-5)
    half = await export(mesh, own, "sae_lens", rows=200, prefix=2)
    assert half.digest != sae_lens.digest
    assert (await export(mesh, own, "sae_lens", rows=200)).digest == sae_lens.digest  # the same, once

    sparsify = await export(mesh, own, "sparsify")
    assert (sparsify.activation, sparsify.thresholds) == (pb.ACTIVATION_TOPK, "")
    await downloaded(mesh, sparsify, tmp_path / "roots" / "layers.1.mlp")
    assert (await export(mesh, own, "circuit_tracer")).activation == pb.ACTIVATION_TOPK
    assert (await refused(export(mesh, own, "gemma_scope")))[2] == ["format"]  # no RMSNorm
    assert (await refused(export(mesh, own, "sparsify", prefix=1)))[2] == ["format"]
    assert (await refused(export(mesh, own, "sae_lens", prefix=9)))[2] == ["prefix"]
    assert (await refused(export(mesh, own, "sae_lens", cache_id="act_cache_none")))[0] == grpc.StatusCode.NOT_FOUND

    wanted = {"model_id": MODEL, "format": tpb.TRANSCODER_FORMAT_SPARSIFY, "identifier": "layers.1.mlp"}
    imported = await mesh.transcoders.ImportTranscoder(tpb.ImportTranscoderRequest(**wanted, request_id="one"))
    again = await mesh.transcoders.ImportTranscoder(tpb.ImportTranscoderRequest(**wanted, request_id="one"))
    assert again.id == imported.id
    assert (imported.layer, imported.job_id, imported.tokens_seen) == (1, "", 0)
    assert list(imported.group_sizes) == list(original.shape.group_sizes)
    stored = Transcoder.load(mesh.folder(imported.artifact_uri))
    assert all(torch.equal(a, b) for a, b in zip(stored.buffers(), original.buffers(), strict=True))
    sae = await mesh.transcoders.ImportTranscoder(
        tpb.ImportTranscoderRequest(
            model_id=MODEL, format=tpb.TRANSCODER_FORMAT_SAE_LENS, identifier="mine", subfolder="sae", name="theirs"
        )
    )
    assert (sae.name, sae.activation, sae.base_digest) == ("theirs", pb.ACTIVATION_JUMPRELU, imported.base_digest)

    async with mesh.working():
        request = tpb.CompareTranscodersRequest(
            transcoder_ids=[own, imported.id, sae.id], dataset_id=HELD_OUT, num_batches=2, batch_size=4, request_id="c"
        )
        queued = (await mesh.transcoders.CompareTranscoders(request)).compared
        assert (await mesh.transcoders.CompareTranscoders(request)).compared == queued
        assert [one.transcoder_id for one in queued] == [own, imported.id, sae.id]
        assert len({one.job_id for one in queued}) == 3
        ids = tpb.GetEvaluationsRequest(ids=[one.evaluation_id for one in queued])

        async def all_ended() -> Any:
            found = (await mesh.transcoders.GetEvaluations(ids)).evaluations
            return found if len(found) == 3 else None

        found = await eventually(all_ended, timeout=60)
    assert [one.transcoder_id for one in found] == [own, imported.id, sae.id]
    assert found[0].fvu == pytest.approx(found[1].fvu)
    assert found[0].ce_spliced == pytest.approx(found[1].ce_spliced)
    assert found[2].fvu > found[0].fvu  # another activation

    assert (await refused(feature(mesh, own, 1)))[0] == grpc.StatusCode.NOT_FOUND  # nothing was sampled yet
    async with mesh.working():
        request = pb.EvaluateTranscoderRequest(id=own, dataset_id=HELD_OUT, num_batches=4, samples_per_feature=3)
        job_id = (await mesh.stub.EvaluateTranscoder(request)).job_id

        async def sampled() -> Any:
            found = (await mesh.stub.ListEvaluations(pb.ListEvaluationsRequest(id=own))).evaluations
            return next((one for one in found if one.job_id == job_id), None)

        evaluation = await eventually(sampled, timeout=60)
    dashboards = await export(mesh, own, "neuronpedia")
    folder = await downloaded(mesh, dashboards, tmp_path / "dashboards")
    batch = json.loads((folder / "batch-0.json").read_text())
    shown = max(batch["features"], key=lambda one: one["frac_nonzero"])
    busiest = await feature(mesh, own, shown["feature_index"])
    assert busiest.tokens == evaluation.tokens
    assert busiest.density == shown["frac_nonzero"]
    ends = list((await mesh.transcoder(own)).prefix_widths)
    assert ends[busiest.prefix - 1] > busiest.feature
    assert busiest.prefix == 1 or ends[busiest.prefix - 2] <= busiest.feature
    assert len(busiest.contexts) == len(shown["activations"]) == 3
    everything = "".join(texts(24, 1000))
    for context in busiest.contexts:
        assert context.values[context.peak] == max(context.values) > 0
        assert "".join(token for token in context.tokens if token[:1] != "<") in everything
    assert len(busiest.top_logits) == len(busiest.bottom_logits) == 10
    assert busiest.top_logits[0].value > busiest.bottom_logits[0].value
    assert len(busiest.nearest) == 5
    assert (await refused(feature(mesh, own, 256)))[2] == ["feature"]
    for name in ("loss", "fvu"):
        drawn = mesh.transcoders.GetTrainingPlot(tpb.GetTrainingPlotRequest(id=job.id, plot=name))
        assert_picture([part async for part in drawn])
    drawn = mesh.transcoders.GetTranscoderPlot(tpb.GetTranscoderPlotRequest(id=own, plot="density"))
    assert_picture([part async for part in drawn])

    await mesh.stub.DeleteTranscoder(pb.DeleteTranscoderRequest(id=own))
    left = {path.relative_to(mesh.context.artifacts.root) for path in mesh.context.artifacts.root.glob("*/*")}
    assert {path.name for path in left if path.parts[0] in ("feature-samples", "transcoder-export")} == set()
    gone = tpb.ReadExportedFileRequest(digest=half.digest, name="cfg.json")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [part async for part in mesh.transcoders.ReadExportedFile(gone)]
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert mesh.staged() == []


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("identifier", {"identifier": "nowhere"}),
        ("identifier", {"identifier": "../roots/layers.1.mlp"}),
        ("identifier", {"identifier": "empty"}),
        ("layer", {"identifier": "plain"}),
        ("layer", {"layer": 99}),
        ("format", {"format": 0}),
    ],
)
async def test_what_cannot_be_imported_is_refused_by_field(
    mesh: Mesh, tmp_path: Path, field: str, changes: dict[str, Any]
) -> None:
    roots = tmp_path / "roots"
    (roots / "empty").mkdir()
    write_sparsify(roots / "layers.1.mlp", models.WIDTH)
    shutil.copytree(roots / "layers.1.mlp", roots / "plain")
    wanted = {"model_id": MODEL, "format": tpb.TRANSCODER_FORMAT_SPARSIFY, "identifier": "layers.1.mlp", **changes}
    code, _, fields = await refused(mesh.transcoders.ImportTranscoder(tpb.ImportTranscoderRequest(**wanted)))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
    assert (await mesh.stub.ListTranscoders(pb.ListTranscodersRequest())).total == 0


async def test_a_transcoder_of_another_width_does_not_fit(mesh: Mesh, tmp_path: Path) -> None:
    write_sparsify(tmp_path / "roots" / "layers.1.mlp", models.WIDTH // 2)
    wanted = {"model_id": MODEL, "format": tpb.TRANSCODER_FORMAT_SPARSIFY, "identifier": "layers.1.mlp"}
    code, reason, _ = await refused(mesh.transcoders.ImportTranscoder(tpb.ImportTranscoderRequest(**wanted)))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LENS_INCOMPATIBLE")


def write_sparsify(folder: Path, width: int) -> None:
    """Files as sparsify writes them itself, without ours beside them."""
    from services.residency.lenses.transcoder import TranscoderShape
    from services.training.compute import export as write

    weights = {"W_enc": (width, 16), "b_enc": (16,), "W_dec": (16, width), "b_dec": (width,), "threshold": (16,)}
    tensors = {name: torch.ones(shape) for name, shape in weights.items()}
    write(Transcoder(TranscoderShape("topk", 2, (16,)), tensors), "sparsify", folder)
    for file in folder.glob("transcoder*"):
        file.unlink()
