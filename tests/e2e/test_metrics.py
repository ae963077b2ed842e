"""The list of metrics, the alerts and the dashboard speak of what a running mesh serves, and of nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from services.runtime.topology import DEPLOY
from tests.e2e.conftest import Up

LISTED = re.compile(
    r"^\| `(?P<name>\w+)` \| (?P<type>\w+) \| (?P<labels>[^|]*) \| (?P<processes>[^|]*) \|", re.MULTILINE
)
IDENTIFIER = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")
SCRAPED = {"up"}
"""Metrics that Prometheus itself makes."""


def listed() -> dict[str, tuple[str, set[str]]]:
    """Type and processes of every metric in METRICS.md."""
    text = (DEPLOY / "prometheus" / "METRICS.md").read_text()
    return {row["name"]: (row["type"], set(row["processes"].split(", "))) for row in LISTED.finditer(text)}


def served(mesh: Up) -> dict[str, tuple[str, set[str]]]:
    """The same of what the mesh serves, without the client library's own."""
    found: dict[str, tuple[str, set[str]]] = {}
    for process, url in mesh.mesh.metrics.items():
        for family in text_string_to_metric_families(httpx.get(url).text):
            if family.name.startswith(("process_", "python_")) or family.name.endswith("_created"):
                continue
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found.setdefault(name, (family.type, set()))[1].add("device" if process == "device-0" else process)
    return found


def expressions(path: Path) -> list[str]:
    if path.suffix == ".json":
        return [
            target["expr"] for panel in json.loads(path.read_text())["panels"] for target in panel.get("targets", [])
        ]
    return [rule["expr"] for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def metrics_of(expression: str) -> set[str]:
    """Names in a PromQL expression that are neither labels nor functions."""
    bare = re.sub(r"\{[^}]*\}|\b(?:by|on)\s*\([^)]*\)|\w+\s*(?=\()", " ", expression)
    return {re.sub(r"_(?:bucket|sum|count)$", "", name) for name in IDENTIFIER.findall(bare)}


def test_the_list_is_what_is_served(mesh: Up):
    assert listed() == served(mesh)


@pytest.mark.parametrize("name", ["prometheus/rules.yml", "grafana/dashboards/overview.json"])
def test_alerts_and_panels_use_metrics_that_exist(name: str):
    used = {metric for expression in expressions(DEPLOY / name) for metric in metrics_of(expression)}
    assert used - set(listed()) - SCRAPED == set()
    assert len(used) > 10
