"""Decisions of the extension service, with fakes of its ports and a real tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.extensions.domain import Extension, Filter, Layer, Lora, NewExtension, NewTraining
from services.extensions.operations import Operations
from services.kit import errors
from services.residency.lenses.extension_files import attachable, read_manifest
from tests.models import WIDTH, batch, tiny
from tests.unit.extensions.fakes import KEY, MODEL, FakeBases, FakeCatalogue, FakeDatasets, FakeStore, documents

NEW = NewExtension(model_id=MODEL, task_name="task-one", kind="lora", lora=Lora(r=4))


class Service:
    """The operations and what they use."""

    def __init__(self, root: Path) -> None:
        self.store = FakeStore(root)
        self.catalogue = FakeCatalogue()
        self.bases = FakeBases()
        self.datasets = FakeDatasets({"ds_1": documents()})
        self.operations = Operations(self.store, self.catalogue, self.bases, self.datasets)

    async def create(self, new: NewExtension = NEW) -> Extension:
        return await self.operations.create(new, key=KEY, validate_only=False)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


async def test_validate_only_counts_and_stores_nothing(service: Service) -> None:
    planned = await service.operations.create(NEW, key=KEY, validate_only=True)
    trainable = 2 * 4 * (WIDTH + 3 * WIDTH)
    assert (planned.id, planned.lora.target_modules) == ("", ("c_attn",))
    assert planned.parameter_counts["lora"] == planned.parameter_counts["trainable"] == trainable
    base = sum(parameter.numel() for parameter in tiny("gpt2", 2).parameters())
    assert planned.parameter_counts["base"] == base
    assert planned.parameter_counts["trainable_over_total"] == trainable / (base + trainable)
    assert service.store.rows == {}
    assert service.store.folders == 0


async def test_a_new_extension_attaches_without_the_model_having_been_loaded(service: Service) -> None:
    extension = await service.create()
    assert service.bases.base is None
    manifest = read_manifest(service.store.path(extension.artifact_uri))
    assert (manifest.kind, manifest.task_name, manifest.base_digest) == ("lora", "task-one", "digest-of-tiny")
    attached = attachable(service.store.path(extension.artifact_uri), tiny("gpt2", 2), base_digest="digest-of-tiny")
    assert sum(p.numel() for p in attached.parameters.values()) == extension.parameter_counts["trainable"]


async def test_the_seed_decides_the_weights(service: Service) -> None:
    files = []
    for seed in (1, 1, 2):
        extension = await service.create(replace(NEW, seed=seed))
        files.append((service.store.path(extension.artifact_uri) / "lora/adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


async def test_dora_begins_with_the_norms_of_the_bases_weights(service: Service) -> None:
    extension = await service.create(replace(NEW, lora=Lora(r=4, variant="dora")))
    attached = attachable(service.store.path(extension.artifact_uri), tiny("gpt2", 2))
    magnitudes = [p for key, p in attached.parameters.items() if key.endswith("0.attn.c_attn.lora_magnitude_vector")]
    weight_IO = tiny("gpt2", 2).transformer.h[0].attn.c_attn.weight
    torch.testing.assert_close(magnitudes[0], weight_IO.norm(dim=0))
    assert service.bases.leases == 0


async def test_layers_and_hybrids_are_made_from_the_bases_weights(service: Service) -> None:
    for kind, lora in (("layer", None), ("hybrid", Lora(r=4))):
        layers = (Layer(index=1, initialization_scale=0.0),)
        extension = await service.create(replace(NEW, kind=kind, lora=lora, layers=layers))
        assert (extension.layers, extension.lora is None) == ((Layer("decoder", 1, 0.0),), lora is None)
        attached = attachable(service.store.path(extension.artifact_uri), tiny("gpt2", 2))
        assert sum(p.numel() for p in attached.parameters.values()) == extension.parameter_counts["trainable"]
        copied = attached.parameters["transformer.h.1.mlp.c_fc.weight"].detach()
        assert torch.equal(copied, tiny("gpt2", 2).transformer.h[0].mlp.c_fc.weight)
        evaluation = await service.operations.evaluate(extension.id, "ds_1", sample_count=1, max_length=16)
        assert evaluation.loss == evaluation.base_loss
    assert service.bases.leases == 0


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"lora": Lora(r=4, target_modules=("q_proj",))}, "lora.target_modules", "it has c_attn, c_fc, c_proj"),
        ({"lora": Lora(r=WIDTH + 1)}, "lora.r", "which is 64"),
        ({"lora": Lora(r=0)}, "lora.r", "at least 1"),
        ({"lora": Lora(alpha=0)}, "lora.alpha", "above 0"),
        ({"task_name": "c_attn"}, "task_name", "is the name of a module"),
        ({"task_name": "my-lora"}, "task_name", "must not contain"),
        ({"layers": (Layer(),)}, "layer", "does not belong"),
        ({"kind": "layer"}, "lora", "does not belong"),
        ({"kind": "hybrid", "layers": (Layer(index=3),)}, "layer.index", "must be 1 to 2"),
        ({"kind": "hybrid", "layers": (Layer(position="encoder"),)}, "layer.position", "has no encoder"),
        ({"kind": "hybrid", "layers": (Layer(position="both"),)}, "layer.position", "one stack only"),
    ],
)
async def test_wrong_fields_are_named_and_nothing_is_created(
    service: Service, changes: dict, field: str, text: str
) -> None:
    with pytest.raises(errors.Invalid, match=text) as invalid:
        await service.create(replace(NEW, **changes))
    assert [violation[0] for violation in invalid.value.violations] == [field]
    assert service.store.rows == {}
    assert service.store.folders == 0


async def test_freeing_a_quantised_base_is_refused(service: Service) -> None:
    service.catalogue.quantization = "int8"
    with pytest.raises(errors.Conflict, match="int8"):
        await service.create(replace(NEW, freeze_base=False))
    assert service.store.rows == {}


async def test_extensions_say_whether_they_are_active(service: Service) -> None:
    first, second = await service.create(), await service.create()
    await service.operations.activate(second.id)
    assert (await service.operations.get(second.id)).active
    assert not (await service.operations.get(first.id)).active
    page = await service.operations.list(Filter())
    assert [(extension.id, extension.active) for extension in page.items] == [(first.id, False), (second.id, True)]
    switch = await service.operations.deactivate(second.id)
    assert switch.active_extension_id == ""
    assert not (await service.operations.get(second.id)).active


async def test_an_extension_in_use_is_not_deleted(service: Service) -> None:
    extension = await service.create()
    service.catalogue.lenses = ["lens_1", "lens_2"]
    with pytest.raises(errors.Conflict, match="lens_1, lens_2") as conflict:
        await service.operations.delete(extension.id)
    assert conflict.value.reason == "IN_USE"
    service.catalogue.lenses = []
    await service.operations.delete(extension.id)
    assert service.store.rows == {}


@pytest.mark.parametrize("amount", [{}, {"steps": 1, "epochs": 1.0}])
async def test_training_needs_steps_or_epochs(service: Service, amount: dict) -> None:
    extension = await service.create()
    with pytest.raises(errors.Invalid, match="either steps or epochs"):
        await service.operations.train(NewTraining(extension.id, "ds_1", **amount), key=KEY)
    assert service.store.queued == []
    assert await service.operations.train(NewTraining(extension.id, "ds_1", steps=1), key=KEY) == "job_1"


async def test_evaluation_compares_with_the_base_and_leaves_it(service: Service) -> None:
    extension = await service.create()
    folder = service.store.path(extension.artifact_uri)
    fresh = await service.operations.evaluate(extension.id, "ds_1", sample_count=0, max_length=16)
    assert fresh.loss == fresh.base_loss
    disturb(folder)
    evaluation = await service.operations.evaluate(extension.id, "ds_1", sample_count=2, max_length=16)
    assert evaluation.loss != evaluation.base_loss
    assert evaluation.base_unchanged
    assert evaluation.tokens == 2 * 15
    assert list(service.bases.base.attached) == []
    with torch.no_grad():
        assert torch.equal(service.bases.base.model(batch()).logits, tiny("gpt2", 2)(batch()).logits)


async def test_evaluation_notices_a_base_that_changes(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = await service.create()

    async def measure_and_spoil(base, key, examples):
        with torch.no_grad():
            base.model.transformer.ln_f.bias.add_(1.0)
        return 1.0, 1

    monkeypatch.setattr("services.extensions.measuring.loss", measure_and_spoil)
    evaluation = await service.operations.evaluate(extension.id, "ds_1", sample_count=2, max_length=16)
    assert not evaluation.base_unchanged


async def test_rows_longer_than_the_context_are_refused(service: Service) -> None:
    extension = await service.create()
    with pytest.raises(errors.Invalid, match="context is 128 tokens"):
        await service.operations.evaluate(extension.id, "ds_1", sample_count=0, max_length=129)
    assert service.bases.leases == 0


async def test_files_of_another_base_are_refused(service: Service) -> None:
    extension = await service.create()
    async with service.bases.lease(MODEL) as base:
        base.digest = "another"
    with pytest.raises(errors.Conflict, match="this base is another") as conflict:
        await service.operations.evaluate(extension.id, "ds_1", sample_count=0, max_length=16)
    assert conflict.value.reason == "LENS_INCOMPATIBLE"
    assert service.bases.leases == 0


def disturb(folder: Path) -> None:
    """Give the adapter weights that do something."""
    file = folder / "lora" / "adapter_model.safetensors"
    make = torch.Generator().manual_seed(3)
    save_file({key: 0.3 * torch.randn(value.shape, generator=make) for key, value in load_file(file).items()}, file)
