"""The OpenAPI document against the running gateway: what it allows is accepted, other bodies are refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.wire.gateway_support import Mesh, running

POSITIVE = ["CreateAnimal", "ListAnimals", "UpdateAnimal", "DeleteAnimal", "Switch", "Clear", "Echo"]
NEGATIVE = ["CreateAnimal", "UpdateAnimal", "Echo"]


def described(mesh: Mesh) -> dict[str, Any]:
    """The document without what the check supplies or cannot know: tokens, headers that repeat fields, masks."""
    made: dict[str, Any] = httpx.get(f"http://{mesh.address}/openapi.json", trust_env=False).json()
    for item in made["paths"].values():
        for operation in item.values():
            operation.pop("security", None)
            parameters = operation["parameters"]
            operation["parameters"] = [p for p in parameters if p["in"] != "header" and p["name"] != "read_mask"]
    return made


def check(mesh: Mesh, name: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(described(mesh))
    schema.config.update(base_url=f"http://{mesh.address}")
    operations = [result.ok() for result in schema.get_all_operations()]
    (operation,) = [one for one in operations if one.definition.raw["operationId"] == f"ZooService_{name}"]
    headers = mesh.bearer()

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=headers)

    run()


@pytest.mark.parametrize("name", POSITIVE)
async def test_what_the_document_allows_is_accepted(tmp_path: Path, name: str) -> None:
    async with running(tmp_path) as mesh:
        await asyncio.to_thread(check, mesh, name, GenerationMode.POSITIVE)


@pytest.mark.parametrize("name", NEGATIVE)
async def test_what_the_document_forbids_is_refused(tmp_path: Path, name: str) -> None:
    async with running(tmp_path) as mesh:
        await asyncio.to_thread(check, mesh, name, GenerationMode.NEGATIVE)
