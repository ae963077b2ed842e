"""Two tasks over one layer on the T5 of spec/004: trained, stopped, moved, and the same to the bit. Minutes long."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5ForConditionalGeneration

from services.client.api import follow_job
from services.client.http import HttpApi
from services.extensions.compute.compare import spec_config
from tests.e2e.conftest import Up, run_up
from tests.extended import by_peft, ours, t5_logits, trained_numbers
from tests.models import TEXTS, tokenizer

GOLDEN = {"base": 76_961_152, "lora": 716_800, "layer": 2_360_320}
STEPS = 6


def made(root: Path) -> Path:
    """Random weights of the published shape, with a head of its own in the file."""
    directory = root / "spec-t5"
    config = spec_config()
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 0, 2
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(directory)
    file = directory / "model.safetensors"
    head = 0.05 * torch.randn(config.vocab_size, config.d_model)
    save_file(load_file(file) | {"lm_head.weight": head}, file, {"format": "pt"})
    tokenizer().save_pretrained(directory)
    lines = [json.dumps({"question": text[:40], "answer": text[40:60]}) for text in TEXTS * 4]
    (root / "pairs.jsonl").write_text("\n".join(lines))
    return directory


def loaded(directory: Path) -> Any:
    model = T5ForConditionalGeneration.from_pretrained(directory).eval()
    head = load_file(directory / "model.safetensors")["lm_head.weight"]
    model.lm_head.weight = torch.nn.Parameter(head.clone())
    return model


def train(api: HttpApi, extension_id: str, dataset_id: str) -> dict[str, Any]:
    fields = {"dataset_id": dataset_id, "steps": STEPS, "batch_size": 2, "max_length": 32, "learning_rate": 1e-2}
    job_id = api.call("TrainExtension", id=extension_id, **fields)["job_id"]
    *_, last = follow_job(api, job_id)
    assert last.name == "extension:completed", last.data
    return dict(api.call("GetJob", id=job_id)["result"])


def answers(api: HttpApi, extension_id: str, dataset_id: str) -> list[Any]:
    judged = api.call("EvaluateExtension", id=extension_id, dataset_id=dataset_id, max_length=32, sample_count=8)
    text = api.call("GenerateWithExtension", id=extension_id, prompt="def add", max_new_tokens=6)
    return [judged["base_loss"], judged["loss"], judged["base_unchanged"], text["token_ids"]]


def folder_of(state: Path, extension: dict[str, Any]) -> Path:
    return state / "artifacts" / "extension" / extension["digest"]


def connected(up: Up) -> HttpApi:
    return HttpApi(up.mesh.gateway, up.mesh.token)


@pytest.mark.demo
@pytest.mark.timeout(3000)
def test_the_published_t5_with_two_tasks_over_one_layer(directory: Path, cache: Path) -> None:
    root = directory / "models"
    root.mkdir()
    model_dir = made(root)
    environment = {"LENSMESH_MODEL_ROOTS": str(root), "LENSMESH_DATASET_ROOTS": str(root)}
    with run_up(directory / "state", environment=environment) as up:
        api = connected(up)
        model = api.call("CreateModel", name="t5", source="local", model_identifier="spec-t5")
        assert model["parameter_count"] == GOLDEN["base"]
        fields = {"source": "local", "identifier": "pairs.jsonl"}
        dataset = api.call("CreateDataset", name="pairs", prompt_field="question", target_field="answer", **fields)
        hybrid = {"model_id": model["id"], "kind": "hybrid"}
        first = api.call("CreateExtension", task_name="task-a", layer={"position": "encoder"}, **hybrid)
        second = api.call("CreateExtension", task_name="task-b", shared_layer_of=first["id"], **hybrid)
        ids = [first["id"], second["id"]]
        assert [first["parameter_counts"][name] for name in GOLDEN] == list(GOLDEN.values())
        train(api, first["id"], dataset["id"])
        untouched = answers(api, first["id"], dataset["id"])
        result = train(api, second["id"], dataset["id"])
        assert "shared" not in result
        assert answers(api, first["id"], dataset["id"]) == untouched, "training B changed nothing of A"
        kept = [api.call("GetExtension", id=extension_id) for extension_id in ids]
        said = [answers(api, extension_id, dataset["id"]) for extension_id in ids]
        base = loaded(model_dir)
        bare = t5_logits(base)
        logits = [ours(base, folder_of(up.state, extension)) for extension in kept]
    (directory / "state").rename(directory / "moved")
    with run_up(directory / "moved", environment=environment) as up:
        api = connected(up)
        assert [api.call("GetExtension", id=extension_id) for extension_id in ids] == kept
        assert [answers(api, extension_id, dataset["id"]) for extension_id in ids] == said
        again = loaded(model_dir)
        numbers = []
        for extension, before in zip(kept, logits, strict=True):
            folder = folder_of(up.state, extension)
            after = ours(again, folder)
            assert torch.equal(after, before)
            assert not torch.equal(after, bare)
            assert torch.equal(by_peft(model_dir, folder), after)
            numbers.append(trained_numbers(again, folder))
        assert torch.equal(t5_logits(again), bare)
        assert numbers == [GOLDEN["lora"] + GOLDEN["layer"], GOLDEN["lora"]]
        third = api.call(
            "CreateExtension", task_name="task-c", shared_layer_of=first["id"], train_shared_layer=True, **hybrid
        )
        told = train(api, third["id"], dataset["id"])["shared"]
        assert set(told) == set(ids)
        sys.stdout.write(json.dumps({"requires_grad": numbers, "shared_layer_trained": told}) + "\n")
