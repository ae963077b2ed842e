"""Interventions in what a host generates and reads; the model itself stays as it is."""

from __future__ import annotations

import pytest
import torch
from lensmesh.common.v1 import types_pb2
from lensmesh.residency.v1 import residency_pb2

from services.residency.splice import logits
from tests import models
from tests.wire.residency_support import Host, extension, hosting, publish, wrong_fields

TEXT = models.TEXTS[0]


@pytest.fixture
async def host(database, tmp_path):
    models.copied(tmp_path / "models", "gpt2")
    with models.one_thread():
        async with hosting(database, tmp_path / "state", tmp_path / "models") as host:
            yield host


async def base_logits(host: Host, model_id: str) -> torch.Tensor:
    async with host.pool.lease(model_id) as lease:
        return await lease.run(logits, lease.model, models.batch())


async def test_interventions_change_a_generation_and_leave_the_model_alone(host):
    await host.load("m", "gpt2")
    before = await base_logits(host, "m")

    async def generate(*interventions):
        request = residency_pb2.GenerateRequest(
            model_id="m", prompt=TEXT, max_new_tokens=8, interventions=interventions
        )
        return list((await host.stub.Generate(request)).token_ids)

    plain = await generate()
    harmless = types_pb2.InterventionSpec(site="mlp_out", layer=1, op="OP_SCALE", factor=1.0)
    zeroed = types_pb2.InterventionSpec(site="resid_post", layer=3, op="OP_ZERO")
    assert await generate(harmless) == plain
    assert await generate(zeroed) != plain
    # with the last residual stream zero, every position predicts from the final norm's bias alone
    assert len(set(await generate(zeroed))) == 1
    early = types_pb2.InterventionSpec(site="resid_post", layer=3, op="OP_ZERO", positions=[0])
    assert await generate(early) == plain
    wrong = types_pb2.InterventionSpec(site="mlp_out", layer=1, op="OP_ADD", vector=[1.0, 2.0])
    assert await wrong_fields(generate(wrong)) == ["interventions.vector"]
    assert torch.equal(await base_logits(host, "m"), before)


async def test_texts_are_read_under_interventions_and_a_wrong_one_is_named(host):
    await host.load("m", "gpt2")
    before = await base_logits(host, "m")
    base = host.pool.get("m").base
    uri = await publish(host, "extension", extension(base.model, base.digest, 1))
    logit = types_pb2.LensSpec(lens_id="logit", kind=types_pb2.LENS_KIND_LOGIT_LENS)
    extended = types_pb2.LensSpec(lens_id="x", kind=types_pb2.LENS_KIND_EXTENSION, artifact_uri=uri)
    for lens in (logit, extended):
        await host.stub.AttachLens(residency_pb2.AttachLensRequest(model_id="m", lens=lens))

    async def read(*interventions):
        request = residency_pb2.AnalyzeRequest(
            model_id="m", lens_ids=["logit", "x"], text=TEXT, top_k=1, interventions=interventions
        )
        readout, compared = (await host.stub.Analyze(request)).readings
        last = [token.layers[-1].predictions[0].token_id for token in readout.tokens]
        assert [token.base_predictions[0].token_id for token in compared.tokens] == last
        return last, [token.predictions[0].probability for token in compared.tokens]

    plain, with_extension = await read()
    zeroed = types_pb2.InterventionSpec(site="mlp_out", layer=1, op="OP_ZERO")
    handle = base.model.transformer.h[1].mlp.register_forward_hook(lambda _, __, y: torch.zeros_like(y))
    async with host.pool.lease("m", "x") as lease:
        ids = torch.tensor([lease.tokenizer(TEXT)["input_ids"]])
        expected = (await lease.run(logits, lease.model, ids))[0].softmax(-1).max(-1).values.tolist()
        by_hand = (await host.pool.run(logits, base.model, ids))[0].argmax(-1).tolist()
    handle.remove()
    changed, extended_and_changed = await read(zeroed)
    assert changed == by_hand != plain
    assert extended_and_changed == pytest.approx(expected) != with_extension
    for wrong, field in (
        ({"site": "mlp_out", "layer": 9, "op": "OP_ZERO"}, "interventions.layer"),
        ({"site": "nowhere", "layer": 1, "op": "OP_ZERO"}, "interventions.site"),
        ({"site": "pattern", "layer": 1, "op": "OP_ZERO"}, "interventions.site"),
        ({"site": "mlp_out", "layer": 1, "op": "OP_ADD"}, "interventions.vector"),
        ({"site": "mlp_out", "layer": 1, "op": "OP_ZERO", "positions": [100]}, "interventions.positions"),
        ({"site": "mlp_out", "layer": 1, "op": "OP_REPLACE", "transcoder_id": "no"}, "interventions.transcoder_id"),
    ):
        spec = types_pb2.InterventionSpec(**wrong)
        assert await wrong_fields(read(spec)) == [field]
        generated = residency_pb2.GenerateRequest(model_id="m", prompt=TEXT, max_new_tokens=2, interventions=[spec])
        if field != "interventions.positions":  # a text that grows may reach them
            assert await wrong_fields(host.stub.Generate(generated)) == [field]
    assert torch.equal(await base_logits(host, "m"), before)
