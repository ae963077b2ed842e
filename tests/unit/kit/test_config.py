from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from services.kit.config import Settings, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("6GiB", 6 * 1024**3), ("50 GB", 50 * 10**9), ("1.5k", 1500), ("2MiB", 2 * 1024**2), (7, 7)],
)
def test_sizes_are_bytes(text: object, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "six", "6 GiBs", "-1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LENSMESH_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("LENSMESH_MODEL_ROOTS", "/a:/b/c")
    settings = Settings()
    assert settings.model_roots == [Path("/a"), Path("/b/c")]
    assert settings.jwt_keys == tmp_path / "keys" / "jwt.jwks"
    assert settings.service_token_path == tmp_path / "keys" / "service.token"


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENSMESH_DB_POOL_MAX", "1")
    with pytest.raises(ValidationError, match="db_pool_max"):
        Settings()
