"""What a service and a process of its own say to each other: one JSON object a line, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Gone:
    """From the process: it cannot go on, and ends."""

    reason: str
    """Name of an ErrorReason."""
    message: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class Words:
    """The records that may be said, plain values in each; `Gone` always may."""

    def __init__(self, *kinds: type[Any]) -> None:
        self._kinds = {kind.__name__: kind for kind in (*kinds, Gone)}

    def to_line(self, said: Any) -> bytes:
        """One line, with its end."""
        return json.dumps([type(said).__name__, asdict(said)], default=_plain).encode() + b"\n"

    def from_line(self, line: bytes) -> Any:
        """What `to_line` was given.

        Raises:
            ValueError: it is no such line.
        """
        try:
            kind, values = json.loads(line)
            return self._kinds[kind](**values)
        except (KeyError, TypeError) as error:
            raise ValueError("not a line of ours") from error


def _plain(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(type(value).__name__)
