"""One mesh on which the specification's examples are played once, in the order in which a client would send them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from tests import models
from tests.e2e.conftest import own_directory, run_up

EXAMPLES = json.loads((Path(__file__).parent / "examples.json").read_text())
MEMORY_LIMIT = "100MB"
"""Room for the small model, and not for the demo's."""
FINAL = ("completed", "failed", "cancelled")


@dataclass
class Played:
    """What the mesh answered to each example, and the events it told meanwhile; the mesh still runs."""

    client: httpx.Client
    token: str
    answers: dict[str, httpx.Response] = field(default_factory=dict)
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@pytest.fixture(scope="session")
def played() -> Iterator[Played]:
    with own_directory() as directory:
        shutil.copytree(models.saved("llama"), directory / "models" / "small")
        roots = f"{directory / 'models'}"
        environment = {"LENSMESH_MODEL_ROOTS": roots, "LENSMESH_DEVICE_MEMORY_LIMIT": MEMORY_LIMIT}
        environment["XDG_CACHE_HOME"] = str(directory / "cache")
        with run_up(directory / "state", environment=environment) as up:
            address = up.mesh.gateway.removeprefix("http://")
            headers = {"authorization": f"Bearer {up.mesh.token}"}
            with (
                httpx.Client(base_url=up.mesh.gateway, headers=headers, timeout=60, trust_env=False) as client,
                connect(f"ws://{address}/api/events", proxy=None) as socket,
            ):
                socket.send(json.dumps({"token": up.mesh.token, "topics": ["model:*", "extraction:*"]}))
                played = Played(client, up.mesh.token)
                _play(played, client, socket)
                yield played


def _play(played: Played, client: httpx.Client, socket: ClientConnection) -> None:
    names: dict[str, str] = {"model_type": "llama"}

    def send(example: str, **changes: Any) -> dict[str, Any]:
        told = EXAMPLES[example]
        body = None if told["request"] is None else told["request"] | changes
        answer = client.request(told["method"], told["path"].format(**names), json=body)
        played.answers[example] = answer
        made: dict[str, Any] = answer.json()
        return made

    def until(event: str, **wanted: str) -> None:
        while True:
            frame = json.loads(socket.recv(timeout=60))
            played.events.setdefault(frame["event"], []).append(frame["data"])
            if frame["event"] == event and wanted.items() <= frame["data"].items():
                return

    small = {"source": "local", "model_identifier": "small", "model_type": "llama"}
    names["model_id"] = send("create_model", **small)["id"]
    until("model:ready", model_id=names["model_id"])
    client.post(f"/api/models/{names['model_id']}/unload", json={}).raise_for_status()
    send("load_model")
    until("model:ready", model_id=names["model_id"])
    texts = [f"text number {number} of a small dataset" for number in range(64)]
    dataset = client.post("/api/datasets", json={"name": "texts", "source": "inline", "texts": texts}).json()
    extraction = send(
        "extract_activations", dataset_id=dataset["id"], layer_indices=[0, 2], sample_count=64, batch_size=4
    )
    names["extraction_id"] = extraction["extraction_id"]
    until("extraction:completed", extraction_id=names["extraction_id"])
    send("get_extraction")
    send("list_models")
    large = client.post("/api/models", json=EXAMPLES["create_model"]["request"] | {"name": "x"} | LARGE).json()
    names["large_model_id"] = large["id"]
    send("load_failure")


LARGE = {"source": "local", "model_identifier": "tiny-gpt2", "quantization": "none", "auto_load": False}
