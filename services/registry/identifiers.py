"""What the identifiers of models and datasets may look like."""

from __future__ import annotations

import re

from services.kit.errors import Invalid

MAX_IDENTIFIER = 500


def check_identifier(source: str, identifier: str) -> None:
    """Refuse what could leave a root, before any path is joined.

    Raises:
        Invalid: names `model_identifier`.
    """
    _check_path("model_identifier", source, identifier)


def check_dataset_identifier(source: str, identifier: str) -> None:
    """The same for a dataset.

    Raises:
        Invalid: names `identifier`.
    """
    _check_path("identifier", source, identifier)


def _check_path(name: str, source: str, identifier: str) -> None:
    if not identifier:
        raise Invalid.of(name, "must be given")
    if len(identifier) > MAX_IDENTIFIER:
        raise Invalid.of(name, f"must have at most {MAX_IDENTIFIER} characters")
    if not re.fullmatch(r"[A-Za-z0-9_\-./]+", identifier):
        raise Invalid.of(name, "may hold letters, digits, `_`, `-`, `.` and `/` only")
    parts = identifier.split("/")
    if identifier.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise Invalid.of(name, "must be a relative name without empty, `.` or `..` parts")
    if source == "huggingface" and len(parts) > 2:
        raise Invalid.of(name, "must be `name` or `owner/name` on the hub")
