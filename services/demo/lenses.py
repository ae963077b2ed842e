"""Step `group`: one base, three lenses, and how long it takes to switch between them."""

from __future__ import annotations

import statistics
import time
from typing import Any

from services.demo.journey import Journey, Step, pick

SENTENCE = "def read(self, size=-1):\n    return self.buffer.read(size)\n"
_SWITCHES = 31
_MOST_SWITCH_SECONDS = 0.02


def group(journey: Journey, step: Step) -> None:
    """Load the base anew, attach both transcoders and the logit lens, switch, and read a sentence."""
    api = journey.api
    cold = _cold_load(journey)
    journey.group_id = api.call("CreateGroup", name="demo", model_id=journey.model_id)["id"]
    lens_ids = [_attach(journey, kind="transcoder", transcoder_id=one) for one in journey.transcoders.values()]
    journey.logit_lens_id = _attach(journey, kind="logit_lens")
    lens_ids.append(journey.logit_lens_id)
    seconds = _switch_round(journey, lens_ids)
    status = api.call("GetGroupStatus", id=journey.group_id)
    readings = api.call("AnalyzeText", id=journey.group_id, text=SENTENCE, lens_ids=lens_ids, top_k=5)["readings"]
    step.figures = {
        "cold_load_seconds": cold,
        "switch_seconds": statistics.median(seconds),
        "switches": len(seconds),
        **pick(status, "fully_loaded", "shared_bytes", "lens_bytes", "saved_bytes", "estimated_switch_seconds"),
        "readings": [_shorten(reading) for reading in readings],
    }
    journey.say(f"cold load {cold:.3f} s, lens switch {step.figures['switch_seconds'] * 1000:.1f} ms (median)")
    _show(journey, readings)
    step.check(status["fully_loaded"], "the base and every lens are on the device")
    if journey.thresholds:
        step.check(step.figures["switch_seconds"] <= _MOST_SWITCH_SECONDS, "a resident lens is switched in 20 ms")
    step.check([one["lens_id"] for one in readings] == lens_ids, "every lens reads the sentence")
    step.check(all(_says_something(one) for one in readings), "every lens says something about every token")


def _cold_load(journey: Journey) -> float:
    journey.unload()
    start = time.perf_counter()
    journey.load("none")
    return time.perf_counter() - start


def _attach(journey: Journey, **fields: str) -> str:
    return str(journey.api.call("AttachLens", group_id=journey.group_id, **fields)["id"])


def _switch_round(journey: Journey, lens_ids: list[str]) -> list[float]:
    """Seconds of each switch, end to end as the client sees it; the first one, which opens connections, left out."""
    seconds = []
    for index in range(_SWITCHES + 1):
        start = time.perf_counter()
        journey.api.call("SwitchLens", id=journey.group_id, lens_id=lens_ids[index % len(lens_ids)])
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _shorten(reading: dict[str, Any]) -> dict[str, Any]:
    """A reading's strongest feature, or likeliest token after the last layer, per token."""
    tokens = []
    for token in reading["tokens"]:
        said = pick(token, "token") | {"features": token.get("features", [])[:1]}
        if token.get("layers"):
            said = pick(token, "token") | {"predictions": token["layers"][-1]["predictions"][:1]}
        tokens.append(said)
    return pick(reading, "lens_id", "kind") | {"tokens": tokens}


def _says_something(reading: dict[str, Any]) -> bool:
    read = [token.get("features") or token.get("layers") for token in reading["tokens"]]
    return sum(map(bool, read)) >= len(read) - 1  # a special token at the start may be masked


def _show(journey: Journey, readings: list[dict[str, Any]]) -> None:
    tokens = [token for reading in readings if reading["kind"] == "transcoder" for token in reading["tokens"]]
    for token in tokens[:8]:
        top = "  ".join(f"{one['feature']}:{one['activation']:.2f}" for one in token.get("features", [])[:3])
        journey.say(f"  {token['token']!r:<14} {top}")
