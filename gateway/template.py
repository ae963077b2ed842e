"""Path templates of `google.api.http` (google/api/http.proto, "Path template syntax").

    Template = "/" Segments [ ":" LITERAL ]        Segments = Segment { "/" Segment }
    Segment  = "*" | "**" | LITERAL | Variable     Variable = "{" FieldPath [ "=" Segments ] "}"

One `**` may stand anywhere, and takes at least one segment: an empty id is no id.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

STAR = "*"
REST = "**"
_VARIABLE = re.compile(r"\{(?P<field>[a-z_][a-z0-9_]*(?:\.[a-z_][a-z0-9_]*)*)(?:=(?P<segments>[^{}]+))?\}")
_LITERAL = re.compile(r"[A-Za-z0-9._~-]+")
_TOKEN = re.compile(r"\{[^{}]*\}|[^/{}]+|/")


@dataclass(frozen=True, slots=True)
class Variable:
    """A field of the request that takes the template's segments `start` to `stop`."""

    field: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Template:
    """One parsed path template; `segments` holds literals, `*` and at most one `**`."""

    text: str
    segments: tuple[str, ...]
    variables: tuple[Variable, ...]
    verb: str

    @property
    def shape(self) -> tuple[tuple[str, ...], str]:
        """Equal for two templates that match the same paths."""
        return self.segments, self.verb

    @property
    def precedence(self) -> tuple[object, ...]:
        """Sort key: a verb before none, then literals before `*` before `**`, from the left."""
        return (not self.verb, [(segment == REST, segment == STAR) for segment in self.segments])

    def match(self, path: list[str]) -> dict[str, str] | None:
        """Field values when the raw (percent-encoded) path segments match, else None.

        Values are decoded whole, an encoded slash under `**` too, so that an id with a slash may be written either way.

        Raises:
            UnicodeDecodeError: a percent-encoded segment is not UTF-8.
        """
        raw = list(path)
        if self.verb:
            if not raw or not raw[-1].endswith(":" + self.verb):
                return None
            raw[-1] = raw[-1][: -len(self.verb) - 1]
        spare = len(raw) - len(self.segments)
        rest = self.segments.index(REST) if REST in self.segments else len(self.segments)
        if (spare != 0 and rest == len(self.segments)) or spare < 0 or not all(raw):
            return None
        wanted = (*self.segments[:rest], *(STAR,) * (spare + 1), *self.segments[rest + 1 :])
        for segment, given in zip(wanted, raw, strict=False):
            if segment not in (STAR, unquote(given, errors="strict")):
                return None
        made = {}
        for variable in self.variables:
            start = variable.start + (spare if variable.start > rest else 0)
            stop = variable.stop + (spare if variable.stop > rest else 0)
            made[variable.field] = unquote("/".join(raw[start:stop]), errors="strict")
        return made


def parse(text: str) -> Template:
    """The template that `text` writes down.

    Raises:
        ValueError: the text does not follow the grammar above; the message says where.
    """
    path, verb = _split_verb(text)
    tokens = _TOKEN.findall(path)
    if "".join(tokens) != path or not tokens or len(tokens) % 2 or set(tokens[::2]) != {"/"}:
        raise ValueError(f"path template {text!r}: slashes and segments do not alternate")
    segments: list[str] = []
    variables: list[Variable] = []
    for token in tokens[1::2]:
        variable = _VARIABLE.fullmatch(token)
        parts = (variable["segments"] or STAR).split("/") if variable else [token]
        for part in parts:
            if part not in (STAR, REST) and not _LITERAL.fullmatch(part):
                raise ValueError(f"path template {text!r}: {part!r} is not a segment")
        if variable:
            variables.append(Variable(variable["field"], len(segments), len(segments) + len(parts)))
        segments += parts
    if segments.count(REST) > 1:
        raise ValueError(f"path template {text!r}: ** may stand once")
    return Template(text, tuple(segments), tuple(variables), verb)


def _split_verb(text: str) -> tuple[str, str]:
    head, colon, verb = text.rpartition(":")
    if colon and _LITERAL.fullmatch(verb):
        return head, verb
    return text, ""
