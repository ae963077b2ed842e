"""Downloaded rows run again by a script that has only Transformers and safetensors: the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from services.client.progress import wait_for_job, wait_for_load
from services.demo.run import connect
from services.runtime.keys import mint_token
from tests import models
from tests.e2e.conftest import own_directory, run_up

SCRIPT = Path(__file__).with_name("rerun.py")
ROWS = 1000
PAIR = ["mlp_in", "mlp_out"]


def rerun(gateway: str, token: str, cache_id: str, *arguments: str | Path) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", SCRIPT, gateway, cache_id, *map(str, arguments), "--rows", str(ROWS)],
        env=environment | {"TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class Remote:
    """The mesh over HTTP, as a user has it."""

    def __init__(self, api: Any, texts: Path, few: Path) -> None:
        self.api = api
        self.quiet = Console(quiet=True)
        made = [
            api.call("CreateDataset", name=path.stem, source="local", identifier=path.name) for path in (texts, few)
        ]
        self.dataset_id, self.few_id = (one["id"] for one in made)

    def model(self, family: str, quantization: str) -> str:
        made = self.api.call(
            "CreateModel",
            name=f"{family} {quantization}",
            source="local",
            model_identifier=models.saved(family).name,
            quantization=quantization,
        )
        started = self.api.call("LoadModel", id=made["id"], quantization=quantization)
        if started["status"] == "loading":
            wait_for_load(self.api, made["id"], started["task_id"], self.quiet)
        return str(made["id"])

    def cache(self, model_id: str, **fields: Any) -> str:
        wanted = {"dataset_id": self.dataset_id, "layer_indices": [2], "sites": PAIR, "max_length": 48}
        started = self.api.call("ExtractActivations", model_id=model_id, **wanted, **fields)
        extraction = self.api.call("GetExtraction", id=started["extraction_id"])
        wait_for_job(self.api, extraction["job_id"], "extract", self.quiet)
        return str(self.api.call("GetExtraction", id=started["extraction_id"])["cache_id"])

    def extension(self, model_id: str) -> tuple[str, str]:
        """A trained LoRA and the group of the model that it is in."""
        made = self.api.call("CreateExtension", model_id=model_id, task_name="words", kind="lora", lora={"r": 4})
        job = self.api.call(
            "TrainExtension", id=made["id"], dataset_id=self.few_id, steps=5, batch_size=4, max_length=32
        )
        wait_for_job(self.api, job["job_id"], "train", self.quiet)
        group = self.api.call("CreateGroup", name="words", model_id=model_id)
        self.api.call("AttachLens", group_id=group["id"], kind="extension", extension_id=made["id"])
        return made["id"], group["id"]


@pytest.mark.demo
@pytest.mark.timeout(600)
def test_a_thousand_rows_of_every_kind_of_model_have_the_same_bits_again() -> None:
    with own_directory() as directory:
        data = directory / "data"
        data.mkdir()
        words = " ".join(models.TEXTS).split(" ")
        texts, few = data / "texts.jsonl", data / "few.jsonl"
        lines = [" ".join(words[(7 * row + place) % len(words)] for place in range(3 + row % 40)) for row in range(200)]
        for path, part in ((texts, lines), (few, lines[:40])):
            path.write_text("".join(json.dumps({"text": line}) + "\n" for line in part), encoding="utf-8")
        roots = {
            "LENSMESH_MODEL_ROOTS": str(models.saved("gpt2").parent),
            "LENSMESH_DATASET_ROOTS": str(data),
        }
        with run_up(directory / "state", environment=roots) as up:
            token = mint_token(up.state / "keys", subject="test", loads_per_hour=1000)
            api = connect(up.mesh, token, "http")
            remote = Remote(api, texts, few)
            cases: dict[str, tuple[str, str, tuple[str | Path, ...]]] = {}
            for family, quantization in (("gpt2", "none"), ("llama", "none"), ("gemma2", "none"), ("gemma2", "int8")):
                model_id = remote.model(family, quantization)
                cases[f"{family} {quantization}"] = (remote.cache(model_id), family, ())
                if family == "gpt2":
                    extension_id, group_id = remote.extension(model_id)
                    lens = api.call("GetGroup", id=group_id)["lenses"][0]
                    (adapter,) = up.state.glob(f"**/{lens['artifact_uri'].rpartition('/')[2]}/lora/adapter_config.json")
                    extended = remote.cache(model_id, extension_id=extension_id)
                    cases["gpt2 lora"] = (extended, family, ("--adapter", adapter.parent))
            api.close()
            for name, (cache_id, family, more) in cases.items():
                figures = rerun(up.mesh.gateway, token, cache_id, models.saved(family), texts, *more)
                assert figures["rows"] == figures["characters"] == ROWS, (name, figures)
                assert figures["x"] == figures["y"] == ROWS, (name, figures)
