"""Steps `doctor`, `load` and `dataset`: the machine, the model as int8 beside its own dtype, the text."""

from __future__ import annotations

import platform
from typing import Any

from services.demo.journey import Journey, Step, pick
from services.runtime.doctor import installed_versions

_INT8_TOLERANCE = 0.01
_PERPLEXITY_SAMPLES = 64


def doctor(journey: Journey, step: Step) -> None:
    """Devices of the mesh with their memory, versions here."""
    devices = journey.api.call("ListDevices")["devices"]
    alive = [device for device in devices if device["alive"]]
    names = ("name", "kind", "services", "total_bytes", "budget_bytes", "used_bytes", "reserved_bytes")
    step.figures = {
        "python": platform.python_version(),
        "versions": installed_versions(),
        "devices": [pick(device, *names) for device in alive],
    }
    offered = {service for device in alive for service in device["services"]}
    for device in alive:
        journey.say(f"{device['name']}: {device['kind']}, budget {_gib(device['budget_bytes'])}")
    step.check({"extraction", "training", "extensions"} <= offered, "a device offers every service")


def load(journey: Journey, step: Step) -> None:
    """Plan and load the model as int8, then in its own dtype; compare bytes, seconds and held-out perplexity."""
    api = journey.api
    journey.model_id = api.call(
        "CreateModel",
        name="demo",
        source=journey.model_source,
        model_identifier=journey.model_identifier,
        quantization="int8",
    )["id"]
    journey.held_out_dataset_id = _register(journey, "demo held-out", journey.corpus.held_out)["id"]
    plan = api.call("LoadModel", id=journey.model_id, quantization="int8", validate_only=True)["plan"]
    step.figures["plan"] = plan
    fits = [place["device"] for place in plan["placements"] if place["fits"]]
    journey.say(f"int8 needs {_mib(plan['required_memory_bytes'])}; it fits {', '.join(fits) or 'nowhere'}")
    step.check(bool(fits), "the int8 model fits a device")
    step.figures["int8"] = int8 = _measure(journey, "int8")
    journey.unload()
    step.figures["none"] = none = _measure(journey, "none")
    step.figures["perplexity_ratio"] = ratio = int8["perplexity"] / none["perplexity"]
    step.check(abs(ratio - 1) <= _INT8_TOLERANCE, f"int8 perplexity is within 1 % (it is off by {ratio - 1:+.2%})")
    step.check(int8["memory_usage_bytes"] < none["memory_usage_bytes"], "int8 takes fewer bytes")


def dataset(journey: Journey, step: Step) -> None:
    """Register the train files; the held-out ones are registered already."""
    train = _register(journey, "demo train", journey.corpus.train)
    held_out = journey.api.call("GetDataset", id=journey.held_out_dataset_id)
    journey.train_dataset_id = train["id"]
    names = ("id", "identifier", "size_bytes", "rows", "digest")
    step.figures = {"train": pick(train, *names), "held_out": pick(held_out, *names)}
    journey.say(
        f"train {_mib(train['size_bytes'])}, held out {_mib(held_out['size_bytes'])} of Python's standard library"
    )
    step.check(train.get("digest") != held_out.get("digest"), "train and held-out text differ")


def _measure(journey: Journey, quantization: str) -> dict[str, Any]:
    model = journey.load(quantization)
    measured = journey.api.call(
        "MeasurePerplexity",
        id=journey.model_id,
        dataset_id=journey.held_out_dataset_id,
        sample_count=_PERPLEXITY_SAMPLES,
    )
    figures = pick(model, "memory_usage_bytes", "load_time_seconds", "parameter_count", "fingerprint")
    journey.say(
        f"{quantization}: {_mib(model['memory_usage_bytes'])}, loaded in {model['load_time_seconds']:.2f} s, "
        f"held-out perplexity {measured['perplexity']:.3f}"
    )
    return figures | pick(measured, "perplexity", "loss", "tokens")


def _register(journey: Journey, name: str, identifier: str) -> dict[str, Any]:
    return journey.api.call("CreateDataset", name=name, source="local", identifier=identifier, text_field="text")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
