"""Datasets over gRPC: files below the roots, inline texts, hub names, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from lensmesh.common.v1 import types_pb2 as types
from lensmesh.registry.v1 import datasets_pb2 as pb
from lensmesh.registry.v1 import datasets_pb2_grpc

from services.kit.database import Database
from tests.wire.registry_support import FakeHost, Mesh, refused, running

LOCAL, INLINE, HUB = pb.DATASET_SOURCE_LOCAL, pb.DATASET_SOURCE_INLINE, pb.DATASET_SOURCE_HUGGINGFACE


@pytest.fixture
async def mesh(database: Database, tmp_path: Path, nats_url: str) -> AsyncIterator[Mesh]:
    root = tmp_path / "datasets"
    (root / "many").mkdir(parents=True)
    (root / "one.txt").write_text("hello")
    (root / "many" / "b.txt").write_text("bb")
    (root / "many" / "a.txt").write_text("aaa")
    (root / "empty").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    async with running(database, tmp_path, nats_url) as mesh:
        yield mesh


async def create(mesh: Mesh, **fields: Any) -> pb.Dataset:
    return await mesh.datasets.CreateDataset(pb.CreateDatasetRequest(**{"name": "d", **fields}))


async def test_local_files_are_measured_and_digested_by_content(mesh: Mesh) -> None:
    one = await create(mesh, source=LOCAL, identifier="one.txt")
    assert one.id.startswith("ds_one_txt_")
    assert (one.size_bytes, one.split, one.text_field, one.created_by) == (5, "train", "text", "ada")
    many = await create(mesh, source=LOCAL, identifier="many", split="test", prompt_field="q", target_field="a")
    assert (many.size_bytes, many.split, many.prompt_field, many.target_field) == (5, "test", "q", "a")
    assert one.digest != many.digest
    assert (await create(mesh, source=LOCAL, identifier="many")).digest == many.digest
    (mesh.settings.dataset_roots[0] / "many" / "a.txt").write_text("aab")
    assert (await create(mesh, source=LOCAL, identifier="many")).digest != many.digest


@pytest.mark.parametrize(
    "identifier", ["../secret.txt", "/etc/passwd", "many/../../secret.txt", "link.txt", "none.txt", "empty", ""]
)
async def test_an_identifier_that_leaves_the_roots_or_names_nothing_is_refused(mesh: Mesh, identifier: str) -> None:
    failure = await refused(create(mesh, source=LOCAL, identifier=identifier))
    assert (failure.code, failure.reason, failure.fields) == ("INVALID_ARGUMENT", "VALIDATION_ERROR", ["identifier"])
    assert str(mesh.settings.state_dir) not in failure.message


async def test_inline_texts_are_kept_and_read_back_in_order_by_the_mesh_only(mesh: Mesh) -> None:
    texts = [f"text {n}" for n in range(250)]
    made = await create(mesh, source=INLINE, texts=texts)
    assert (made.rows, made.size_bytes) == (250, sum(map(len, texts)))
    inside = datasets_pb2_grpc.DatasetServiceStub(mesh.internal)
    read = [text async for part in inside.ReadInlineTexts(pb.ReadInlineTextsRequest(id=made.id)) for text in part.texts]
    assert read == texts
    outside = mesh.datasets.ReadInlineTexts(pb.ReadInlineTextsRequest(id=made.id))
    assert (await refused(outside.read())).reason == "INTERNAL_ONLY"
    local = await create(mesh, source=LOCAL, identifier="one.txt")
    assert (await refused(inside.ReadInlineTexts(pb.ReadInlineTextsRequest(id=local.id)).read())).fields == ["id"]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"source": INLINE}, "texts"),
        ({"source": INLINE, "texts": ["a"], "identifier": "x"}, "identifier"),
        ({"source": LOCAL, "identifier": "one.txt", "texts": ["a"]}, "texts"),
        ({"source": HUB, "identifier": "a/b/c"}, "identifier"),
    ],
)
async def test_fields_that_belong_to_another_source_are_refused(mesh: Mesh, fields: dict[str, Any], wrong: str) -> None:
    assert (await refused(create(mesh, **fields))).fields == [wrong]


async def test_hub_datasets_are_named_and_not_fetched(mesh: Mesh) -> None:
    made = await create(mesh, source=HUB, identifier="stas/openwebtext-10k")
    assert (made.size_bytes, made.HasField("digest"), made.HasField("rows")) == (0, False, False)


async def test_datasets_show_the_fields_that_are_asked_for(mesh: Mesh) -> None:
    made = await mesh.datasets.CreateDataset(
        pb.CreateDatasetRequest(name="d", source=pb.DATASET_SOURCE_INLINE, texts=["a"])
    )
    mask = {"paths": ["id", "prompt_field"]}  # the latter is unset, and stays so
    page = await mesh.datasets.ListDatasets(pb.ListDatasetsRequest(read_mask=mask))
    assert (list(page.datasets), page.total) == ([pb.Dataset(id=made.id)], 1)
    assert await mesh.datasets.GetDataset(pb.GetDatasetRequest(id=made.id, read_mask=mask)) == pb.Dataset(id=made.id)
    wrong = mesh.datasets.GetDataset(pb.GetDatasetRequest(id=made.id, read_mask={"paths": ["secret"]}))
    assert (await refused(wrong)).fields == ["read_mask"]


async def test_datasets_are_listed_repeated_and_deleted(mesh: Mesh) -> None:
    first = await create(mesh, source=INLINE, texts=["a"], request_id="r")
    assert (await create(mesh, source=INLINE, texts=["a"], request_id="r")).id == first.id
    second = await create(mesh, source=INLINE, texts=["b"])
    listed = await mesh.datasets.ListDatasets(pb.ListDatasetsRequest(limit=1))
    assert ([d.id for d in listed.datasets], listed.total) == ([second.id], 2)
    rest = await mesh.datasets.ListDatasets(pb.ListDatasetsRequest(limit=1, page_token=listed.next_page_token))
    assert [d.id for d in rest.datasets] == [first.id]
    async with mesh.database.transaction() as conn:
        payload = {"source": {"dataset_id": first.id}}
        await mesh.context.jobs.enqueue(
            conn, kind="x", payload=payload, created_by="ada", event_prefix="x", job_id="job_1"
        )
    failure = await refused(mesh.datasets.DeleteDataset(pb.DeleteDatasetRequest(id=first.id)))
    assert (failure.reason, failure.facts["users"]) == ("IN_USE", "job job_1")
    await mesh.context.jobs.request_cancel("job_1")
    await mesh.datasets.DeleteDataset(pb.DeleteDatasetRequest(id=first.id))
    assert (await refused(mesh.datasets.GetDataset(pb.GetDatasetRequest(id=first.id)))).code == "NOT_FOUND"


async def test_a_forward_on_a_loaded_model_goes_to_its_host_and_its_result_is_kept(mesh: Mesh) -> None:
    from lensmesh.extensions.v1 import extensions_pb2
    from lensmesh.registry.v1 import models_pb2

    host = await mesh.add_host(FakeHost())
    made = await create(mesh, source=INLINE, texts=["a"])
    model = await mesh.create()
    measure = models_pb2.MeasurePerplexityRequest(id=model.id, dataset_id=made.id)
    assert (await refused(mesh.models.MeasurePerplexity(measure))).reason == "WRONG_STATE"
    await mesh.load(model.id)
    await mesh.reaches(model.id, models_pb2.MODEL_STATUS_READY)
    measured = await mesh.models.MeasurePerplexity(measure)
    assert (measured.perplexity, measured.samples) == (12.5, 64)
    assert list((await mesh.get(model.id)).perplexities) == [measured]
    assert not measured.HasField("over_unquantized")
    host.perplexity, host.measures = 13.0, types.QUANTIZATION_INT8
    smaller = await mesh.ready(quantization=types.QUANTIZATION_INT8)
    measure.id = smaller.id
    assert (await mesh.models.MeasurePerplexity(measure)).over_unquantized == pytest.approx(0.04)
    assert (await mesh.get(smaller.id)).perplexities[0].over_unquantized == pytest.approx(0.04)
    unknown = models_pb2.MeasurePerplexityRequest(id=model.id, dataset_id="ds_none")
    assert (await refused(mesh.models.MeasurePerplexity(unknown))).code == "NOT_FOUND"
    host.extensions["x_1"] = extensions_pb2.Extension(id="x_1", model_id=model.id, artifact_uri="artifact://e/1")
    host.extensions["x_2"] = extensions_pb2.Extension(id="x_2", model_id="m_other")
    request = models_pb2.GenerateTextRequest(id=model.id, prompt="Hi", extension_id="x_1", temperature=0.5, seed=7)
    assert (await mesh.models.GenerateText(request)).text == "Hi!"
    sent = host.names("Generate")[0]
    assert (sent.max_new_tokens, sent.temperature, sent.seed) == (64, 0.5, 7)
    assert (sent.extension.lens_id, sent.extension.artifact_uri) == ("x_1", "artifact://e/1")
    other = models_pb2.GenerateTextRequest(id=model.id, prompt="Hi", extension_id="x_2")
    assert (await refused(mesh.models.GenerateText(other))).reason == "LENS_INCOMPATIBLE"
