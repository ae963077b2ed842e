from __future__ import annotations

import re
from pathlib import Path

from lensmesh.common.v1 import errors_pb2

from services.kit import errors

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name}
PLACES = re.compile(r"""(?:reason|error_code|default_reason)\s*=\s*["']([A-Z_]+)["']""")


def test_every_reason_in_the_code_is_in_the_proto() -> None:
    used = {
        (path.name, reason)
        for folder in ("services", "gateway")
        for path in (ROOT / folder).rglob("*.py")
        for reason in PLACES.findall(path.read_text())
    }
    assert {(file, reason) for file, reason in used if reason not in KNOWN} == set()
    assert len(used) > 10


def test_every_error_class_has_a_known_default() -> None:
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.LensmeshError)]
    assert {cls.default_reason for cls in classes} <= KNOWN
