"""Compares a reply with an example of the specification: keys, types, and the forms of ids, words and times."""

from __future__ import annotations

import re
from typing import Any

RENAMED = {"storage_path": "storage_uri"}
"""Where a later document says otherwise: a real path never leaves the service."""
WORDS = ("status", "quantization")
"""Keys whose value is the example's own word."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_ID = re.compile(r"(m|ds|ext_act|act_cache)_[A-Za-z0-9_]+")


def differences(example: Any, actual: Any, at: str = "") -> list[str]:
    """What the reply lacks of the example, or has in another form; more keys than the example's are allowed."""
    if isinstance(example, dict):
        if not isinstance(actual, dict):
            return [f"{at}: {actual!r} is not an object"]
        found = []
        for key, value in example.items():
            name = RENAMED.get(key, key)
            if name not in actual:
                found.append(f"{at}.{name} is missing")
            elif name in WORDS and actual[name] != value:
                found.append(f"{at}.{name} is {actual[name]!r}, not {value!r}")
            else:
                found += differences(value, actual[name], f"{at}.{name}")
        return found
    if isinstance(example, list):
        if not isinstance(actual, list) or not actual:
            return [f"{at}: {actual!r} is not a list with items"]
        return [one for index, item in enumerate(actual) for one in differences(example[0], item, f"{at}[{index}]")]
    return [] if _alike(example, actual) else [f"{at}: {actual!r} has not the form of {example!r}"]


def _alike(example: Any, actual: Any) -> bool:
    if isinstance(example, bool):
        return isinstance(actual, bool)
    if isinstance(example, int | float):
        return isinstance(actual, int | float) and not isinstance(actual, bool)
    if not isinstance(actual, str) or not actual:
        return False
    if _TIME.fullmatch(example):
        return bool(_TIME.fullmatch(actual))
    wanted = _ID.fullmatch(example)
    if wanted:
        given = _ID.fullmatch(actual)
        return given is not None and given[1] == wanted[1]
    return True
