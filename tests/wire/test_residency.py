"""ModelHostService over real gRPC, with tiny models on the CPU."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc
import pytest
import torch
from lensmesh.common.v1 import types_pb2
from lensmesh.residency.v1 import residency_pb2
from prometheus_client import generate_latest

from services.extensions.adapters.residency import PooledBases
from services.extraction.adapters.residency import PooledModels
from services.residency.families import SITES
from services.residency.lenses import tuned_lens
from services.residency.lenses.transcoder import Transcoder, TranscoderShape
from services.residency.splice import logits
from tests import models
from tests.hub import serving_hub
from tests.support import eventually
from tests.wire.residency_support import Host, extension, hosting, local, publish, refused

TEXT = models.TEXTS[0]


@pytest.fixture
async def host(database, tmp_path):
    for family in ("gpt2", "gemma2", "t5"):
        models.copied(tmp_path / "models", family)
    with models.one_thread():
        async with hosting(database, tmp_path / "state", tmp_path / "models") as host:
            yield host


async def base_logits(host: Host, model_id: str) -> torch.Tensor:
    async with host.pool.lease(model_id) as lease:
        return await lease.run(logits, lease.model, models.batch())


def transcoder(width: int = models.WIDTH, dict_size: int = 96, **info) -> Transcoder:
    make = torch.Generator().manual_seed(1)
    weights = {
        "W_enc": torch.randn(width, dict_size, generator=make),
        "b_enc": torch.zeros(dict_size),
        "W_dec": torch.randn(dict_size, width, generator=make) / width,
        "b_dec": torch.zeros(width),
        "threshold": torch.zeros(dict_size),
    }
    return Transcoder(TranscoderShape("topk", 8, (32, 64)), weights, info)


async def test_inspect_reads_config_headers_and_digest_and_no_path_leaves(host):
    facts = await host.stub.Inspect(residency_pb2.InspectRequest(source=local("gpt2")))
    assert (facts.model_type, facts.num_layers, facts.hidden_size) == ("gpt2", 4, models.WIDTH)
    assert facts.parameter_count == sum(p.numel() for p in models.tiny("gpt2").parameters())
    assert (facts.context_length, facts.vocab_size, facts.architecture) == (128, models.VOCAB, "GPT2LMHeadModel")
    assert list(facts.defaults.group_sizes) == [64, 128, 256, 576]
    assert (facts.defaults.dict_size, facts.defaults.top_k, facts.defaults.model_batch_size) == (1024, 32, 32)
    points = {point.site: point.name for point in facts.defaults.hook_points}
    assert (points.keys(), points["mlp_in"]) == (SITES.keys(), "blocks.{layer}.mlp.hook_in")
    assert not facts.defaults.experimental
    assert len(facts.digest) == 64
    again = await host.stub.Inspect(residency_pb2.InspectRequest(source=local("gemma2")))
    assert again.digest != facts.digest


@pytest.mark.parametrize("identifier", ["../models/gpt2", "/etc", "gpt3", ".", "gpt2/../../..", "a%2fb"])
async def test_nothing_outside_the_roots_is_found(host, identifier):
    code, reason, _ = await refused(host.stub.Inspect(residency_pb2.InspectRequest(source=local(identifier))))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_ERROR")


@pytest.mark.parametrize("quantization", ["NONE", "BF16", "INT8", "INT4"])
async def test_the_estimate_is_what_the_load_then_takes(host, quantization):
    found = await host.stub.Estimate(
        residency_pb2.EstimateRequest(source=local("gemma2"), quantization=f"QUANTIZATION_{quantization}")
    )
    steps = await host.load("m", "gemma2", quantization)
    assert steps[-1].model.memory_bytes == found.breakdown.weights + found.breakdown.quantization_state
    assert found.required_bytes > steps[-1].model.memory_bytes


async def test_a_load_tells_its_progress_and_its_result(host):
    steps = await host.load("m", "gpt2")
    percents = [step.percent for step in steps]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(percents) > 20
    assert [step.HasField("model") for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].bytes_done == steps[-1].bytes_total > 0
    state = await host.stub.GetState(residency_pb2.GetStateRequest())
    assert state.models[0].fingerprint == steps[-1].model.fingerprint
    assert state.used_bytes == steps[-1].model.memory_bytes
    expected = {"expected_digest": steps[-1].digest, "expected_fingerprint": steps[-1].model.fingerprint}
    await host.stub.Unload(residency_pb2.UnloadRequest(model_id="m"))
    assert (await host.load("m", "gpt2", **expected))[-1].model.fingerprint == steps[-1].model.fingerprint


async def test_a_hub_model_tells_its_download_and_then_its_reading(host, tmp_path, monkeypatch):
    source = residency_pb2.SourceSpec(source=types_pb2.MODEL_SOURCE_HUGGINGFACE, identifier="org/tiny")
    request = residency_pb2.LoadRequest(model_id="m", source=source, quantization=types_pb2.QUANTIZATION_NONE)
    with serving_hub(tmp_path / "models" / "gpt2", monkeypatch) as hub:
        steps = [step async for step in host.stub.Load(request)]
    weights = (hub.files / "model.safetensors").stat().st_size
    percents = [step.percent for step in steps]
    assert percents == sorted(percents)
    assert steps[0].percent <= 50
    assert steps[-1].bytes_done == steps[-1].bytes_total > 2 * weights - 10_000  # downloaded, then its tensors read
    assert steps[-1].HasField("model")


async def test_an_unload_gives_the_bytes_back(host):
    steps = await host.load("m", "gpt2")
    released = await host.stub.Unload(residency_pb2.UnloadRequest(model_id="m"))
    assert released.freed_bytes == steps[-1].model.memory_bytes
    state = await host.stub.GetState(residency_pb2.GetStateRequest())
    assert (state.used_bytes, list(state.models)) == (0, [])
    assert (await host.stub.Unload(residency_pb2.UnloadRequest(model_id="m"))).freed_bytes == 0


async def test_a_corrupt_checkpoint_leaves_nothing_and_names_no_path(host, tmp_path):
    file = tmp_path / "models" / "gpt2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await host.load("m", "gpt2")
    assert "MODEL_LOAD_FAILED" in str(caught.value.trailing_metadata())
    assert "truncated" in caught.value.details()
    assert str(tmp_path) not in str(caught.value)
    state = await host.stub.GetState(residency_pb2.GetStateRequest())
    assert (state.used_bytes, list(state.models)) == (0, [])
    assert b'residency_loads_total{result="MODEL_LOAD_FAILED"} 1.0' in generate_latest(host.context.metrics)


async def test_a_model_that_does_not_fit_is_refused_with_both_numbers(host):
    host.pool.budget_bytes = 100_000
    code, reason, facts = await refused(host.load("m", "gpt2"))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "INSUFFICIENT_MEMORY")
    assert float(facts["required_memory_gb"]) > float(facts["available_memory_gb"])
    assert host.pool.used_bytes == host.pool.reserved_bytes == 0


async def test_a_client_that_goes_away_ends_its_load(host):
    request = residency_pb2.LoadRequest(model_id="m", source=local("gpt2"), quantization=types_pb2.QUANTIZATION_NONE)
    call = host.stub.Load(request)
    await call.read()
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call.read()
    await eventually(lambda: not host.pool.reserved_bytes and not host.pool._loading)
    assert host.pool.used_bytes == sum(resident.total_bytes for resident in host.pool.residents)


async def test_lenses_are_attached_switched_and_read(host):
    await host.load("m", "gpt2")
    before = await base_logits(host, "m")
    uri = await publish(host, "transcoder", transcoder().save)
    logit = types_pb2.LensSpec(lens_id="logit", kind=types_pb2.LENS_KIND_LOGIT_LENS)
    coder = types_pb2.LensSpec(lens_id="tc", kind=types_pb2.LENS_KIND_TRANSCODER, artifact_uri=uri, layer=2)
    for lens in (logit, coder):
        await host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens))
    state = await host.stub.GetState(residency_pb2.GetStateRequest())
    assert {lens.lens_id: lens.memory_bytes > 0 for lens in state.models[0].lenses} == {"logit": False, "tc": True}
    switched = await host.stub.SwitchLens(residency_pb2.SwitchLensRequest(model_id="m", lens_id="tc"))
    assert switched.memory_before_bytes == switched.memory_after_bytes == state.used_bytes
    answer = await host.stub.Analyze(
        residency_pb2.AnalyzeRequest(model_id="m", lens_ids=["tc", "logit"], text=TEXT, top_k=5)
    )
    features, readout = answer.readings
    ids = [token.token_id for token in features.tokens]
    assert "".join(token.token for token in features.tokens) == TEXT
    expected = await expected_features(host, ids, uri)
    assert [[f.feature for f in token.features] for token in features.tokens] == expected
    assert features.fvu > 0
    assert all(token.features[0].activation >= token.features[-1].activation > 0 for token in features.tokens)
    async with host.pool.lease("m") as lease:
        own = await lease.run(logits, lease.model, torch.tensor([ids]))
    last = [token.layers[-1] for token in readout.tokens]
    assert [layer.layer for layer in readout.tokens[0].layers] == [0, 1, 2, 3]
    assert [layer.predictions[0].token_id for layer in last] == own[0].argmax(-1).tolist()
    assert last[0].predictions[0].probability == pytest.approx(own[0, 0].softmax(-1).max().item(), rel=1e-5)
    assert torch.equal(await base_logits(host, "m"), before)
    freed = await host.stub.DetachLens(residency_pb2.DetachLensRequest(model_id="m", lens_id="tc"))
    assert freed.freed_bytes == transcoder_bytes()
    assert host.pool.used_bytes == state.used_bytes - freed.freed_bytes


async def test_a_lens_reads_another_models_activations_and_both_are_leased(host, tmp_path):
    """Its reading is what the same lens reads when that model is its own base."""
    models.copied(tmp_path / "models" / "tuned", "gpt2", seed=1)
    await host.load("m", "gpt2")
    await host.load("s", "tuned/gpt2")
    uri = await publish(host, "transcoder", transcoder().save)

    async def read(model_id, lens_id, **more):
        lens = types_pb2.LensSpec(
            lens_id=lens_id, kind=types_pb2.LENS_KIND_TRANSCODER, artifact_uri=uri, layer=2, **more
        )
        await host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id=model_id, lens=lens))
        request = residency_pb2.AnalyzeRequest(model_id=model_id, lens_ids=[lens_id], text=TEXT, top_k=5)
        tokens = (await host.stub.Analyze(request)).readings[0].tokens
        return [[(feature.feature, feature.activation) for feature in token.features] for token in tokens]

    own, other = await read("m", "own"), await read("m", "other", activation_source_model_id="s")
    assert other == await read("s", "there")
    assert other != own
    await host.stub.Unload(residency_pb2.UnloadRequest(model_id="s"))
    request = residency_pb2.AnalyzeRequest(model_id="m", lens_ids=["other"], text=TEXT, top_k=5)
    assert (await refused(host.stub.Analyze(request)))[1] == "WRONG_STATE"


async def test_a_tuned_lens_that_somebody_brings_is_read_and_a_corrupt_one_fails_alone(host, tmp_path):
    await host.load("m", "gpt2")
    folder = tmp_path / "models" / "lens"
    tuned_lens.save(folder, {1: (torch.eye(models.WIDTH), torch.zeros(models.WIDTH))})
    kind = types_pb2.LENS_KIND_TUNED_LENS
    lens = types_pb2.LensSpec(lens_id="l", kind=kind, artifact_uri="local:lens")
    attached = await host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens))
    assert attached.memory_bytes == 4 * models.WIDTH * (models.WIDTH + 1)
    (folder / tuned_lens.FILE).write_bytes(b"nothing of the kind")
    for uri, reason in (("local:lens", "CHECKSUM_MISMATCH"), ("local:../models", "VALIDATION_ERROR")):
        wrong = types_pb2.LensSpec(lens_id="wrong", kind=kind, artifact_uri=uri)
        refusal = await refused(host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=wrong)))
        assert refusal[1] == reason
    request = residency_pb2.AnalyzeRequest(model_id="m", lens_ids=["l"], text=TEXT, top_k=3)
    (reading,) = (await host.stub.Analyze(request)).readings
    assert reading.kind == kind
    assert [layer.layer for layer in reading.tokens[0].layers] == [1, 3]


async def test_services_of_one_process_hold_one_copy(host):
    """What extraction and extensions lease are the same bytes, not equal ones."""

    async def here(model_id: str) -> None:
        """It is."""

    await host.load("m", "gpt2")
    extraction = PooledModels(host.pool, here, host.context.artifacts)
    extensions = PooledBases(host.pool, here)
    async with extraction.lease("m", "") as one, extensions.lease("m") as two:
        pointers = [{n: p.data_ptr() for n, p in each.model.named_parameters()} for each in (one, two)]
    assert pointers[0] == pointers[1]
    assert host.pool.used_bytes == host.pool.get("m").nbytes


def transcoder_bytes() -> int:
    return sum(t.numel() * t.element_size() for t in transcoder().state_dict().values())


async def expected_features(host: Host, ids: list[int], uri: str) -> list[list[int]]:
    """The five strongest latents of each token by the dense code, computed by hand."""
    seen = {}
    async with host.pool.lease("m") as lease:
        mlp = lease.model.transformer.h[2].mlp
        handle = mlp.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
        await lease.run(logits, lease.model, torch.tensor([ids]))
        handle.remove()
    code = Transcoder.load(host.context.artifacts.path(uri)).encode(seen["x"][0])
    return [row.topk(5).indices.tolist() for row in code]


@pytest.mark.parametrize("quantization", ["NONE", "INT8"])
async def test_extensions_alter_the_model_only_while_they_are_used(host, quantization):
    await host.load("m", "gpt2", quantization)
    before, used = await base_logits(host, "m"), host.pool.used_bytes
    base = host.pool.get("m").base
    for seed in (1, 2):
        uri = await publish(host, "extension", extension(base.model, base.digest, seed))
        lens = types_pb2.LensSpec(lens_id=f"x{seed}", kind=types_pb2.LENS_KIND_EXTENSION, artifact_uri=uri)
        await host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens))
    assert host.pool.used_bytes > used
    for lens_id in ("x1", "x2", "x1"):
        await host.stub.SwitchLens(residency_pb2.SwitchLensRequest(model_id="m", lens_id=lens_id))
        assert torch.equal(await base_logits(host, "m"), before)
        async with host.pool.lease("m", lens_id) as lease:
            altered = await lease.run(logits, lease.model, models.batch())
        assert not torch.allclose(altered, before, atol=1e-3)
    await host.stub.SwitchLens(residency_pb2.SwitchLensRequest(model_id="m"))
    answer = await host.stub.Analyze(
        residency_pb2.AnalyzeRequest(model_id="m", lens_ids=["x1", "x2"], text=TEXT, top_k=3)
    )
    one, two = (reading.tokens[-1] for reading in answer.readings)
    assert [p.token_id for p in one.base_predictions] == [p.token_id for p in two.base_predictions]
    assert [p.probability for p in one.predictions] != [p.probability for p in two.predictions]
    request = residency_pb2.GenerateRequest(model_id="m", prompt=TEXT, max_new_tokens=6)
    plain = await host.stub.Generate(request)
    request.extension.CopyFrom(types_pb2.LensSpec(lens_id="x1", kind=types_pb2.LENS_KIND_EXTENSION))
    extended = await host.stub.Generate(request)
    assert list(plain.token_ids) != list(extended.token_ids)
    for lens_id in ("x1", "x2"):
        await host.stub.DetachLens(residency_pb2.DetachLensRequest(model_id="m", lens_id=lens_id))
    assert host.pool.used_bytes == used
    assert torch.equal(await base_logits(host, "m"), before)


async def test_an_extension_that_computes_something_else_after_a_restore_is_found(host):
    await host.load("m", "gpt2")
    base = host.pool.get("m").base
    uri = await publish(host, "extension", extension(base.model, base.digest, 1))
    lens = types_pb2.LensSpec(lens_id="x", kind=types_pb2.LENS_KIND_EXTENSION, artifact_uri=uri)
    await host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens))
    await host.stub.Park(residency_pb2.ParkRequest(model_id="m"))
    await host.stub.Restore(residency_pb2.RestoreRequest(model_id="m"))
    await host.stub.Park(residency_pb2.ParkRequest(model_id="m"))
    with torch.no_grad():
        next(iter(base.extensions["x"].parameters.values())).mul_(1.5)
    code, reason, _ = await refused(host.stub.Restore(residency_pb2.RestoreRequest(model_id="m")))
    assert (code, reason) == (grpc.StatusCode.INTERNAL, "FINGERPRINT_MISMATCH")
    assert host.pool.residents == []


async def test_an_extension_of_another_base_is_refused(host):
    await host.load("m", "gpt2")
    base = host.pool.get("m").base
    uri = await publish(host, "extension", extension(base.model, "f" * 64, 1))
    lens = types_pb2.LensSpec(lens_id="x", kind=types_pb2.LENS_KIND_EXTENSION, artifact_uri=uri)
    code, reason, facts = await refused(host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens)))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LENS_INCOMPATIBLE")
    assert (facts["what"], facts["expected"], facts["found"]) == ("base", "f" * 64, base.digest)


async def test_an_extension_in_use_is_not_detached(host):
    await host.load("m", "gpt2")
    base = host.pool.get("m").base
    uri = await publish(host, "extension", extension(base.model, base.digest, 1))
    lens = types_pb2.LensSpec(lens_id="x", kind=types_pb2.LENS_KIND_EXTENSION, artifact_uri=uri)
    await host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens))
    detach = residency_pb2.DetachLensRequest(model_id="m", lens_id="x")
    async with host.pool.lease("m", "x"):
        _, reason, _ = await refused(host.stub.DetachLens(detach))
        assert reason == "IN_USE"
    assert (await host.stub.DetachLens(detach)).freed_bytes > 0


async def test_a_lens_of_another_width_or_layer_is_refused_and_the_rest_stays(host):
    await host.load("m", "gpt2")
    wide = await publish(host, "transcoder", transcoder(width=48).save)
    lens = types_pb2.LensSpec(lens_id="tc", kind=types_pb2.LENS_KIND_TRANSCODER, artifact_uri=wide, layer=2)
    code, reason, facts = await refused(host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens)))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LENS_INCOMPATIBLE")
    assert (facts["expected"], facts["found"]) == ("48", "64")
    lens.layer = 9
    _, reason, facts = await refused(host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens)))
    assert (reason, facts["expected"]) == ("LENS_INCOMPATIBLE", "9")
    state = await host.stub.GetState(residency_pb2.GetStateRequest())
    assert list(state.models[0].lenses) == []


async def test_a_corrupt_lens_fails_alone(host):
    await host.load("m", "gpt2")
    before = await base_logits(host, "m")

    def write(folder):
        transcoder().save(folder)
        weights = folder / "sae_weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])

    uri = await publish(host, "transcoder", write)
    lens = types_pb2.LensSpec(lens_id="tc", kind=types_pb2.LENS_KIND_TRANSCODER, artifact_uri=uri, layer=2)
    code, reason, _ = await refused(host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens)))
    assert (code, reason) == (grpc.StatusCode.INTERNAL, "CHECKSUM_MISMATCH")
    assert torch.equal(await base_logits(host, "m"), before)


async def test_encode_reads_through_a_transcoder_that_stays_off_the_ledger(host):
    await host.load("m", "gpt2")
    used = host.pool.used_bytes
    uri = await publish(host, "transcoder", transcoder(layer=2).save)
    whole = await host.stub.Encode(residency_pb2.EncodeRequest(model_id="m", artifact_uri=uri, text=TEXT, top_k=5))
    first = await host.stub.Encode(
        residency_pb2.EncodeRequest(model_id="m", artifact_uri=uri, text=TEXT, top_k=5, prefix=1)
    )
    ids = [token.token_id for token in whole.tokens]
    assert [[f.feature for f in token.features] for token in whole.tokens] == await expected_features(host, ids, uri)
    assert max(f.feature for token in first.tokens for f in token.features) < 32
    assert host.pool.used_bytes == used
    code, reason, _ = await refused(
        host.stub.Encode(residency_pb2.EncodeRequest(model_id="m", artifact_uri=uri, text=TEXT, top_k=5, prefix=3))
    )
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_ERROR")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"text": TEXT, "token_ids": [3]},
        {"token_ids": [models.VOCAB]},
        {"token_ids": [3] * 129},
        {"text": "word " * 500},
    ],
)
async def test_texts_that_the_model_cannot_take_are_named(host, wrong):
    await host.load("m", "gpt2")
    lens = types_pb2.LensSpec(lens_id="logit", kind=types_pb2.LENS_KIND_LOGIT_LENS)
    await host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens))
    request = residency_pb2.AnalyzeRequest(model_id="m", lens_ids=["logit"], top_k=3, **wrong)
    code, _, _ = await refused(host.stub.Analyze(request))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_generation_is_greedy_at_temperature_zero_and_repeats_with_a_seed(host):
    await host.load("m", "gpt2")

    async def generate(**more):
        request = residency_pb2.GenerateRequest(model_id="m", prompt=TEXT, max_new_tokens=20, **more)
        return list((await host.stub.Generate(request)).token_ids)

    async with host.pool.lease("m") as lease:
        ids = torch.tensor([lease.tokenizer(TEXT)["input_ids"]])
        expected = lease.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert await generate() == expected[0, ids.shape[1] :].tolist()
    assert await generate(temperature=1.5, seed=1) == await generate(temperature=1.5, seed=1)
    assert await generate(temperature=1.5, seed=1) != await generate(temperature=1.5, seed=2)


async def test_an_encoder_decoder_generates_too(host):
    await host.load("m", "t5")
    async with host.pool.lease("m") as lease:
        ids = torch.tensor([lease.tokenizer(TEXT)["input_ids"]])
        expected = lease.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    request = residency_pb2.GenerateRequest(model_id="m", prompt=TEXT, max_new_tokens=12)
    assert list((await host.stub.Generate(request)).token_ids) == expected[0, 1:].tolist()


async def test_perplexity_is_measured_on_a_registered_dataset(host):
    host.registry.texts = list(models.TEXTS)
    await host.load("m", "gpt2")
    request = residency_pb2.MeasurePerplexityRequest(model_id="m", dataset_id="ds_1", sample_count=3, max_length=16)
    found = await host.stub.MeasurePerplexity(request)
    losses = []
    async with host.pool.lease("m") as lease:
        for text in models.TEXTS[:3]:
            ids = torch.tensor([lease.tokenizer(text)["input_ids"][:16]])
            scores = logits(lease.model, ids)[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="none"))
    expected = torch.cat(losses).double()
    assert (found.samples, found.tokens) == (3, len(expected))
    assert found.loss == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(expected.mean().exp().item(), rel=1e-4)
    assert found.quantization == types_pb2.QUANTIZATION_NONE


async def test_the_host_announces_itself_and_registers_again_when_asked(host):
    await host.load("m", "gpt2")
    task = asyncio.create_task(host.part.background[0]())
    try:
        await eventually(lambda: host.registry.heartbeats)
        host.registry.forgets = True
        await eventually(lambda: len(host.registry.registrations) == 2)
    finally:
        task.cancel()
    first, again = host.registry.registrations
    assert (first.host_id, first.incarnation, first.device) == ("device-0", "incarnation-1", "cpu")
    assert first.budget_bytes == host.pool.budget_bytes < first.total_bytes
    assert again.models[0].model_id == "m"
    assert host.registry.heartbeats[0].used_bytes == host.pool.used_bytes


async def test_the_devices_memory_is_in_the_metrics(host):
    await host.load("m", "gpt2")
    shown = generate_latest(host.context.metrics).decode()
    used = next(line for line in shown.splitlines() if line.startswith("device_memory_used_bytes{"))
    assert float(used.split()[-1]) == host.pool.used_bytes
    assert 'device="cpu"' in used
    for name in ("device_memory_budget_bytes", "device_memory_total_bytes", "device_utilization_ratio"):
        assert f"\n{name}{{" in shown


async def test_a_deleted_models_files_go_when_a_job_made_them(host):
    uri = await publish(host, "model", lambda folder: (folder / "config.json").write_text("{}"))
    theirs = [path for path in host.context.settings.model_roots[0].iterdir() if path.is_dir()]
    for path in theirs:
        await host.stub.Forget(residency_pb2.ForgetRequest(source=local(path.name), digest="d"))
    assert host.context.artifacts.exists(uri)
    request = residency_pb2.ForgetRequest(source=local(uri.rpartition("/")[2]), digest="d")
    await host.stub.Forget(request)
    assert not host.context.artifacts.exists(uri)
    assert await host.context.database.pool.fetchval("SELECT count(*) FROM artifacts") == 0
    await host.stub.Forget(request)
    assert theirs
    assert all(path.is_dir() for path in theirs)
