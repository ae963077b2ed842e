"""ExtractionService over real gRPC and PostgreSQL, on a tiny GPT-2 in a real residency pool."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lensmesh.common.v1 import types_pb2
from lensmesh.extraction.v1 import extraction_pb2 as pb
from lensmesh.registry.v1 import groups_pb2
from peft import PeftModel
from safetensors.torch import load, load_file, save_file
from tokenizers import normalizers

from services.extensions.compute.blueprint import Blueprint
from services.extensions.compute.config import ExtensionConfig
from services.extraction.adapters.tokenizers import Tokenizers
from services.extraction.compute import capture
from services.kit.database import Database
from services.kit.events import EventLog
from services.residency import sources
from services.residency.hooks import Capture
from services.residency.lenses.extension_files import ADAPTER_FILE, LORA_FOLDER
from services.residency.shards import ShardReader
from services.residency.texts import special_ids
from services.residency.tokens import tokenizer_digest
from tests import models
from tests.wire.extraction_support import DATASET, MODEL, Mesh, meshing

POINTS = ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"]


def texts(count: int) -> list[str]:
    """Different texts of different lengths."""
    return [f"{models.TEXTS[number % 5]} {number} " * (1 + number % 3) for number in range(count)]


@pytest.fixture
async def mesh(database: Database, tmp_path: Path) -> AsyncIterator[Mesh]:
    torch.set_num_threads(1)
    async with meshing(database, tmp_path / "state") as mesh:
        mesh.registry.texts = {DATASET: texts(200), "ds_some": texts(70), "ds_few": texts(5), "ds_empty": [""]}
        mesh.registry.texts["ds_special"] = ["<eos>"]
        yield mesh


async def refused(call: Any) -> tuple[grpc.StatusCode, str, list[str]]:
    """(code, reason, named fields) of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in rpc_status.from_call(caught.value).details:
        detail.Unpack(info)
        detail.Unpack(bad)
    return caught.value.code(), info.reason, [violation.field for violation in bad.field_violations]


async def read(mesh: Mesh, cache_id: str, index: int, **part: int) -> tuple[bytes, int, list[int]]:
    """(bytes, bytes of the whole file, sizes of the messages)."""
    call = mesh.stub.ReadShard(pb.ReadShardRequest(id=cache_id, index=index, **part))
    parts = [body.data async for body in call]
    total = dict(await call.initial_metadata())["x-total-size"]
    return b"".join(parts), int(total), [len(part) for part in parts]


async def test_activations_of_two_layers_come_out_of_one_request(mesh: Mesh) -> None:
    started = await mesh.extract()
    assert started.extraction_id.startswith("ext_act_")
    assert started.status == pb.EXTRACTION_STATUS_QUEUED
    assert started.message == "Activation extraction queued"
    assert started.estimated_time_seconds > 0
    async with mesh.working():
        done = await mesh.ended(started.extraction_id)
    cache = await mesh.cache(done.cache_id)
    assert done.status == pb.EXTRACTION_STATUS_COMPLETED
    assert (done.progress, done.samples_processed, done.total_samples) == (100, 200, 200)
    assert done.storage_uri == cache.storage_uri == f"artifact://activation_cache/{done.storage_uri[-64:]}"
    assert list(done.activation_shape) == [cache.tokens, models.WIDTH]
    assert (done.tokens, done.reused, done.identity_error) == (cache.tokens, False, 0.0)
    assert done.tokens_per_second > 0
    assert done.extraction_time_seconds > 0
    assert list(cache.hook_points) == POINTS
    assert (cache.layout, cache.dtype) == (pb.LAYOUT_ROWS, types_pb2.DTYPE_FLOAT32)
    assert (cache.model_id, cache.dataset_id, cache.samples) == (MODEL, DATASET, 200)
    assert sum(shard.rows for shard in cache.shards) == cache.tokens
    assert [point.width for point in cache.statistics] == [models.WIDTH] * 4
    assert mesh.unfinished() == []


async def test_every_row_leads_back_to_its_text_and_to_the_modules_values(mesh: Mesh) -> None:
    done = await mesh.extracted(batch_size=7, dataset_id="ds_some")
    reader = ShardReader(mesh.folder_of(done))
    model, tokenizer, table = models.tiny("gpt2"), models.tokenizer(), reader.sequences()
    lengths, seen = table["offset"].diff(), 0
    values: dict[tuple[int, int], torch.Tensor] = {}
    for index in range(len(reader.manifest.shards)):
        shard = load((await read(mesh, done.cache_id, index))[0])
        for row in range(len(shard["tok"])):
            key = (int(shard["seq"][row]), int(shard["pos"][row]))
            values[key] = shard[POINTS[3]][row]
            assert table["ids"][table["offset"][key[0]] + key[1]] == shard["tok"][row]
            seen += 1
    assert seen == len(values) == done.tokens
    for number in range(int(table["batch"].max()) + 1):
        members = (table["batch"] == number).nonzero().flatten()
        members = members[torch.argsort(-lengths[members], stable=True)]
        encoded = [tokenizer(mesh.registry.texts["ds_some"][int(table["row"][m])])["input_ids"] for m in members]
        ids = torch.tensor([[*row, *[0] * (len(encoded[0]) - len(row))] for row in encoded])
        mask = torch.tensor([[1] * len(row) + [0] * (len(encoded[0]) - len(row)) for row in encoded])
        found: list[torch.Tensor] = []
        handle = model.transformer.h[3].mlp.register_forward_hook(
            lambda _, __, output, found=found: found.append(output)
        )
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        handle.remove()
        for row, member in enumerate(members.tolist()):
            for column in range(len(encoded[row])):
                assert torch.equal(values[member, column], found[0][row, column])


async def test_the_second_request_is_answered_from_the_cache(mesh: Mesh) -> None:
    first = await mesh.extracted()
    again = await mesh.extract()  # nobody works: only a cache can answer
    assert again.status == pb.EXTRACTION_STATUS_COMPLETED
    assert (again.message, again.estimated_time_seconds) == ("Using cached activations", 0)
    found = await mesh.get(again.extraction_id)
    assert (found.reused, found.cache_id, found.job_id) == (True, first.cache_id, "")
    assert (found.tokens, found.progress, found.samples_processed) == (first.tokens, 100, 200)
    subset = await mesh.get((await mesh.extract(layer_indices=[3])).extraction_id)
    assert (subset.reused, subset.cache_id, list(subset.hook_points)) == (True, first.cache_id, POINTS[2:])
    for other in (
        {"layer_indices": [0, 1]},
        {"seed": 1},
        {"max_length": 9},
        {"batch_size": 2},
        {"dtype": types_pb2.DTYPE_BFLOAT16},
    ):
        assert (await mesh.extract(**other)).status == pb.EXTRACTION_STATUS_QUEUED


async def test_a_cache_made_while_a_request_waited_serves_it(mesh: Mesh) -> None:
    both = [(await mesh.extract()).extraction_id for _ in range(2)]
    async with mesh.working(slots=1):
        first, second = [await mesh.ended(extraction_id) for extraction_id in both]
    assert (first.reused, second.reused) == (False, True)
    assert second.cache_id == first.cache_id
    assert mesh.registry.loads == 1


async def test_a_cache_is_forgotten_when_it_is_too_old_or_the_data_or_the_tokenizer_changed(mesh: Mesh) -> None:
    await mesh.extracted()
    resident = mesh.context.residency.get(MODEL)
    own, resident.tokenizer = resident.tokenizer, models.tokenizer()
    resident.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert (await mesh.extract()).status == pb.EXTRACTION_STATUS_QUEUED
    resident.tokenizer = own
    mesh.registry.texts[DATASET].append("one more")
    assert (await mesh.extract()).status == pb.EXTRACTION_STATUS_QUEUED
    mesh.registry.texts[DATASET].pop()
    assert (await mesh.extract()).status == pb.EXTRACTION_STATUS_COMPLETED
    await mesh.context.database.pool.execute("UPDATE activation_cache SET created_at = now() - interval '25 hours'")
    assert (await mesh.extract()).status == pb.EXTRACTION_STATUS_QUEUED


async def test_a_plan_changes_nothing_and_gets_exact_after_one_run(mesh: Mesh) -> None:
    before = await mesh.extract(validate_only=True)
    assert (before.extraction_id, before.cache, before.fits_limit) == ("", pb.CACHE_MATCH_MISS, True)
    assert before.estimated_bytes > 0
    assert (await mesh.stub.ListExtractions(pb.ListExtractionsRequest())).total == 0
    done = await mesh.extracted()
    assert (await mesh.extract(validate_only=True)).cache == pb.CACHE_MATCH_HIT
    assert (await mesh.extract(layer_indices=[1], validate_only=True)).cache == pb.CACHE_MATCH_SUBSET
    after = await mesh.extract(seed=5, validate_only=True)
    assert after.cache == pb.CACHE_MATCH_MISS
    assert after.estimated_bytes == pytest.approx(done.file_size_bytes, rel=0.25)
    assert after.estimated_time_seconds == pytest.approx(done.extraction_time_seconds, rel=0.25)


async def test_the_layout_sequences_keeps_the_datasets_order(mesh: Mesh) -> None:
    done = await mesh.extracted(sites=None, layer_indices=[2], dataset_id="ds_few")
    cache = await mesh.cache(done.cache_id)
    assert list(cache.hook_points) == ["blocks.2.hook_resid_post"]
    assert cache.layout == pb.LAYOUT_SEQUENCES
    assert list(done.activation_shape) == [5, cache.max_length, models.WIDTH]
    shard = ShardReader(mesh.folder_of(done)).shard(0)
    assert shard["seq"].tolist() == [0, 1, 2, 3, 4]
    for row, text in enumerate(texts(5)):
        ids = models.tokenizer()(text)["input_ids"]
        assert shard["tok"][row][shard["mask"][row].bool()].tolist() == ids


async def test_options_are_kept(mesh: Mesh) -> None:
    done = await mesh.extracted(
        sample_count=20,
        max_length=10,
        dtype=types_pb2.DTYPE_BFLOAT16,
        max_tokens=100,
        seed=9,
        layout=pb.LAYOUT_SEQUENCES,
    )
    manifest = ShardReader(mesh.folder_of(done)).manifest
    assert (manifest.tokens, manifest.max_length, manifest.dtype, manifest.layout) == (100, 10, "bfloat16", "sequences")
    assert (manifest.plan["seed"], manifest.plan["batch_size"]) == (9, 4)
    assert manifest.dataset["rows_read"] == 20
    assert manifest.dataset["truncated_rows"] == 20
    assert (manifest.model["quantization"], manifest.model["revision"]) == ("none", "")
    assert manifest.model["digest"] == sources.digest(mesh.registry.folder)
    assert manifest.tokenizer == {"digest": tokenizer_digest(models.tokenizer())}
    assert manifest.uncounted_ids == special_ids(models.tokenizer()) == (0, 1, 2)
    assert not manifest.shuffled
    kept = await mesh.extracted(dataset_id="ds_few", keep_order=True)
    assert not ShardReader(mesh.folder_of(kept)).manifest.shuffled


async def test_a_local_file_is_a_dataset_too(mesh: Mesh) -> None:
    folder = mesh.settings.dataset_roots[0]
    folder.mkdir(parents=True)
    (folder / "some.txt").write_text("\n".join(["one two three", "", "four five"]))
    mesh.registry.files["ds_file"] = "some.txt"
    done = await mesh.extracted(dataset_id="ds_file")
    manifest = ShardReader(mesh.folder_of(done)).manifest
    assert (manifest.samples, manifest.dataset["bad_rows"]) == (2, 1)
    assert (await mesh.extract(dataset_id="ds_file")).status == pb.EXTRACTION_STATUS_COMPLETED
    (folder / "some.txt").write_text("something else")
    assert (await mesh.extract(dataset_id="ds_file")).status == pb.EXTRACTION_STATUS_QUEUED


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layer_indices": [0, 4]}, "layer_indices"),
        ({"layer_indices": None}, "layer_indices"),
        ({"layer_indices": [-1]}, "layer_indices[0]"),
        ({"sites": ["mlp"]}, "sites"),
        ({"hook_points": POINTS, "sites": None}, "layer_indices"),
        ({"hook_points": POINTS, "layer_indices": None}, "sites"),
        ({"hook_points": ["blocks.9.hook_mlp_out"], "layer_indices": None, "sites": None}, "hook_points"),
        ({"hook_points": ["blocks.1.hook_nothing"], "layer_indices": None, "sites": None}, "hook_points"),
        ({"hook_points": ["blocks.x1.hook_mlp_out"], "layer_indices": None, "sites": None}, "hook_points"),
        ({"sample_count": 0}, "sample_count"),
        ({"sample_count": 201}, "sample_count"),
        ({"max_length": models.CONTEXT + 1}, "max_length"),
        ({"batch_size": -1}, "batch_size"),
        ({"dtype": 77}, "dtype"),
        ({"extension_id": "x_unknown"}, "extension_id"),
        ({"model_id": ""}, "model_id"),
        ({"dataset_id": "ds_empty"}, "dataset_id"),
        ({"if_unloaded": 77}, "if_unloaded"),
        ({"mode": 77}, "mode"),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_started(mesh: Mesh, changes: dict[str, Any], field: str) -> None:
    for validate_only in (False, True):
        code, reason, fields = await refused(mesh.extract(**changes, validate_only=validate_only))
        expected = "DATASET_UNUSABLE" if field == "dataset_id" else "VALIDATION_ERROR"
        assert (code, reason, fields) == (grpc.StatusCode.INVALID_ARGUMENT, expected, [field])
    assert (await mesh.stub.ListExtractions(pb.ListExtractionsRequest())).total == 0


async def test_what_does_not_exist(mesh: Mesh) -> None:
    assert (await refused(mesh.extract(model_id="m_none")))[:2] == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert (await refused(mesh.extract(dataset_id="ds_none")))[:2] == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    for call in (
        mesh.get("ext_act_none"),
        mesh.cache("act_cache_none"),
        mesh.stub.CancelExtraction(pb.CancelExtractionRequest(id="ext_act_none")),
        mesh.stub.DeleteExtraction(pb.DeleteExtractionRequest(id="ext_act_none")),
        mesh.stub.DeleteActivationCache(pb.DeleteActivationCacheRequest(id="act_cache_none")),
        mesh.stub.VerifyActivationCache(pb.VerifyActivationCacheRequest(id="act_cache_none")),
        mesh.stub.OpenCache(pb.OpenCacheRequest(id="act_cache_none")),
        read(mesh, "act_cache_none", 0),
    ):
        assert (await refused(call))[0] == grpc.StatusCode.NOT_FOUND


async def test_a_dataset_without_a_row_is_refused_before_anything_starts(mesh: Mesh) -> None:
    folder = mesh.settings.dataset_roots[0]
    folder.mkdir(parents=True)
    unusable = {
        "special.txt": "<eos>\n" * 3,
        "special.jsonl": '{"input_ids": [0, 2, 2]}\n' * 3,
        "wrong.jsonl": '{"input_ids": [-1]}\n{"input_ids": [512]}\n{"input_ids": []}\n',
    }
    for name, content in unusable.items():
        (folder / name).write_text(content)
        mesh.registry.files[name] = name
    for dataset_id in (*unusable, "ds_special"):
        for validate_only in (True, False):
            code, reason, fields = await refused(mesh.extract(dataset_id=dataset_id, validate_only=validate_only))
            assert (code, reason, fields) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_UNUSABLE", ["dataset_id"])
    assert (await mesh.stub.ListExtractions(pb.ListExtractionsRequest())).total == 0
    assert mesh.registry.loads == 0
    (folder / "wrong.jsonl").write_text('{"input_ids": [-1]}\n{"input_ids": [2, 5]}\n')
    assert (await mesh.extract(dataset_id="wrong.jsonl")).status == pb.EXTRACTION_STATUS_QUEUED


async def test_a_dataset_whose_tokens_are_all_special_fails_the_job_where_only_that_can_tell(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizers, "find", lambda *_: None)  # as of a hub model that is not here yet
    async with mesh.working():
        failed = await mesh.ended((await mesh.extract(dataset_id="ds_special")).extraction_id)
    assert failed.status == pb.EXTRACTION_STATUS_FAILED
    assert failed.error_code == "DATASET_UNUSABLE"
    assert failed.message == failed.error_message
    assert mesh.unfinished() == []


async def test_the_same_request_id_starts_one_extraction(mesh: Mesh) -> None:
    one, two = [await mesh.extract(request_id="r1") for _ in range(2)]
    assert one.extraction_id == two.extraction_id
    assert (await mesh.stub.ListExtractions(pb.ListExtractionsRequest())).total == 1
    code, reason, _ = await refused(mesh.extract(request_id="r1", seed=3))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REQUEST_ID_REUSED")


async def test_events_tell_the_whole_story(mesh: Mesh) -> None:
    done = await mesh.extracted()
    topic = f"extraction:{done.extraction_id}"
    events = await EventLog(mesh.context.database).after([topic], {})
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    names = [event.event for event in events]
    assert names[:2] == ["extraction:queued", "extraction:started"]
    assert set(names[2:-1]) == {"extraction:progress"}
    assert names[-1] == "extraction:completed"
    assert events[-1].data["cache_id"] == done.cache_id
    progress = [event.data for event in events[2:-1]]
    percents = [data["progress"] for data in progress]
    assert percents == sorted(percents)
    assert len({int(percent // 5) for percent in percents}) == len(percents) >= 3
    for data in progress:
        assert data["status"] == "extracting"
        assert (data["extraction_id"], data["model_id"]) == (done.extraction_id, MODEL)
        assert data["total_samples"] == 200
        assert data["progress"] == pytest.approx(data["samples_processed"] / 2)
        assert {"sequence", "timestamp"} <= data.keys()


async def test_a_shard_is_streamed_in_parts(mesh: Mesh) -> None:
    done = await mesh.extracted(sites=["mlp_hidden", "resid_pre", "resid_mid", "resid_post"])
    cache = await mesh.cache(done.cache_id)
    whole = (mesh.folder_of(done) / "shard-00000.safetensors").read_bytes()
    assert cache.shards[0].size_bytes == len(whole) > 1 << 20
    content, total, sizes = await read(mesh, done.cache_id, 0)
    assert (content == whole, total) == (True, len(whole))
    assert max(sizes) == 1 << 20
    for offset, length in [(0, 100), (8, 1), (len(whole) - 5, 0), (1000, 1 << 21), (len(whole), 0)]:
        part, total, _ = await read(mesh, done.cache_id, 0, offset=offset, length=length)
        assert part == whole[offset : offset + length if length else None]
        assert total == len(whole)
    assert (await refused(read(mesh, done.cache_id, 0, offset=len(whole) + 1)))[2] == ["offset"]
    assert (await refused(read(mesh, done.cache_id, 999)))[0] == grpc.StatusCode.NOT_FOUND


async def test_a_flipped_bit_is_found_and_never_served(mesh: Mesh) -> None:
    done = await mesh.extracted()
    verify = pb.VerifyActivationCacheRequest(id=done.cache_id)
    assert (await mesh.stub.VerifyActivationCache(verify)).ok
    await read(mesh, done.cache_id, 1)
    path = mesh.folder_of(done) / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    found = await mesh.stub.VerifyActivationCache(verify)
    assert not found.ok
    assert [(problem.index, problem.problem, problem.file) for problem in found.problems] == [(1, "corrupt", path.name)]
    assert (await refused(read(mesh, done.cache_id, 1)))[1] == "CHECKSUM_MISMATCH"
    await read(mesh, done.cache_id, 0)
    path.unlink()
    assert (await mesh.stub.VerifyActivationCache(verify)).problems[0].problem == "missing"
    assert (await refused(read(mesh, done.cache_id, 1)))[1] == "CHECKSUM_MISMATCH"
    manifest = path.with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    found = await mesh.stub.VerifyActivationCache(verify)
    assert [(problem.index, problem.file) for problem in found.problems] == [(-1, "manifest.json")]


async def test_lists_are_paged_and_filtered(mesh: Mesh) -> None:
    ids = [(await mesh.extract(seed=seed)).extraction_id for seed in range(3)]
    await mesh.stub.CancelExtraction(pb.CancelExtractionRequest(id=ids[0]))
    first = await mesh.stub.ListExtractions(pb.ListExtractionsRequest(limit=2))
    assert [item.extraction_id for item in first.extractions] == ids[:0:-1]
    assert (first.total, first.limit) == (3, 2)
    rest = await mesh.stub.ListExtractions(pb.ListExtractionsRequest(limit=2, page_token=first.next_page_token))
    assert [item.extraction_id for item in rest.extractions] == ids[:1]
    assert rest.next_page_token == ""
    queued = await mesh.stub.ListExtractions(pb.ListExtractionsRequest(status=pb.EXTRACTION_STATUS_QUEUED))
    assert {item.extraction_id for item in queued.extractions} == set(ids[1:])
    assert (await mesh.stub.ListExtractions(pb.ListExtractionsRequest(model_id="m_other"))).total == 0
    broken = mesh.stub.ListExtractions(pb.ListExtractionsRequest(page_token="???"))
    assert (await refused(broken))[2] == ["page_token"]


async def test_deleting(mesh: Mesh) -> None:
    done = await mesh.extracted()
    waiting = await mesh.extract(seed=1)
    code, reason, _ = await refused(mesh.stub.DeleteExtraction(pb.DeleteExtractionRequest(id=waiting.extraction_id)))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    await mesh.stub.DeleteExtraction(pb.DeleteExtractionRequest(id=done.extraction_id))
    listed = await mesh.stub.ListActivationCaches(pb.ListActivationCachesRequest(model_id=MODEL))
    assert [(cache.id, len(cache.shards)) for cache in listed.activation_caches] == [(done.cache_id, 0)]
    folder = mesh.folder_of(done)
    delete = pb.DeleteActivationCacheRequest(id=done.cache_id)
    async with mesh.context.artifacts.reading(mesh.context.database, done.storage_uri):
        assert (await refused(mesh.stub.DeleteActivationCache(delete)))[1] == "IN_USE"
        assert folder.is_dir()
    await mesh.stub.DeleteActivationCache(delete)
    assert not folder.exists()
    assert (await refused(mesh.cache(done.cache_id)))[0] == grpc.StatusCode.NOT_FOUND


async def test_a_cache_is_opened_by_its_handle(mesh: Mesh) -> None:
    done = await mesh.extracted()
    before = (await mesh.cache(done.cache_id)).last_accessed_at.ToDatetime()
    opened = await mesh.stub.OpenCache(pb.OpenCacheRequest(id=done.cache_id))
    assert list(opened.widths) == [models.WIDTH] * 4
    assert len(opened.cache.shards) > 1
    assert (await mesh.cache(done.cache_id)).last_accessed_at.ToDatetime() > before
    batch = next(ShardReader(mesh.folder_of(opened.cache)).iter_rows(POINTS[:2], 64))
    assert batch.rows[POINTS[0]].shape == (64, models.WIDTH)
    fetched = await mesh.stub.GetModelExtraction(
        pb.GetModelExtractionRequest(model_id=MODEL, extraction_id=done.extraction_id)
    )
    assert fetched.cache_id == done.cache_id
    wrong = pb.GetModelExtractionRequest(model_id="m_other", extraction_id=done.extraction_id)
    assert (await refused(mesh.stub.GetModelExtraction(wrong)))[0] == grpc.StatusCode.NOT_FOUND


async def test_an_extension_is_in_force_for_its_own_extraction_only(mesh: Mesh, tmp_path: Path) -> None:
    store, database = mesh.context.artifacts, mesh.context.database
    with store.staging("extension") as folder:
        blueprint = Blueprint(
            kind="lora",
            task_name="other words",
            config=ExtensionConfig(lora_r=4, lora_target_modules=("c_proj",)),
            base_parameters=1,
            base_digest="",
        )
        blueprint.prepare(models.tiny("gpt2"))(folder)
        adapter = folder / LORA_FOLDER / ADAPTER_FILE
        random = torch.Generator().manual_seed(0)
        save_file({key: 0.3 * torch.randn(t.shape, generator=random) for key, t in load_file(adapter).items()}, adapter)
        async with database.transaction() as conn:
            artifact = await store.publish(conn, "extension", folder, {})
    lens = groups_pb2.Lens(id="lens_1", extension_id="x_1", artifact_uri=artifact.uri)
    mesh.registry.groups.append(groups_pb2.Group(id="grp_1", lenses=[lens]))
    extended = await mesh.extracted(extension_id="x_1", dataset_id="ds_few")
    plain = await mesh.extracted(dataset_id="ds_few")
    assert (await mesh.cache(extended.cache_id)).extension_id == "x_1"
    assert not (await mesh.cache(plain.cache_id)).HasField("extension_id")
    assert not mesh.context.residency.get(MODEL).lenses, "it is taken off behind the job"
    assert (await mesh.extract(extension_id="x_1", dataset_id="ds_few")).status == pb.EXTRACTION_STATUS_COMPLETED
    adapted = PeftModel.from_pretrained(models.tiny("gpt2"), store.path(artifact.uri) / LORA_FOLDER).eval()
    for done, model in ((extended, adapted), (plain, models.tiny("gpt2"))):
        shard = ShardReader(mesh.folder_of(done)).shard(0)
        for number, text in enumerate(texts(5)):
            ids = torch.tensor([models.tokenizer()(text)["input_ids"]])
            expected = next(capture(model, [ids], [POINTS[3]]))[POINTS[3]]
            rows = (shard["seq"] == number).nonzero().flatten()
            torch.testing.assert_close(
                shard[POINTS[3]][rows], expected[shard["pos"][rows].long()], rtol=1e-5, atol=1e-5
            )


async def test_every_mode_gives_the_same_bytes_and_safe_runs_fewer_sequences_at_once(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris, sizes = set[str](), dict[int, set[int]]()
    watch = Capture.watch

    def counted(self: Capture, input_ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes[mode].add(len(input_ids))
        return watch(self, input_ids, *arguments, **options)

    monkeypatch.setattr(Capture, "watch", counted)
    for mode in (pb.EXTRACTION_MODE_FULL, pb.EXTRACTION_MODE_SAFE, pb.EXTRACTION_MODE_CPU, pb.EXTRACTION_MODE_AUTO):
        sizes[mode] = set()
        done = await mesh.extracted(mode=mode, batch_size=16)
        uris.add(done.storage_uri)
        await mesh.stub.DeleteActivationCache(pb.DeleteActivationCacheRequest(id=done.cache_id))
    assert len(uris) == 1
    assert max(sizes[pb.EXTRACTION_MODE_FULL]) == 16
    assert max(sizes[pb.EXTRACTION_MODE_SAFE]) < 16
