from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from joserfc import jwk, jwt
from joserfc.errors import InvalidKeyIdError

from services.runtime.keys import ensure_keys, mint_token


def claims_of(directory: Path, token: str) -> dict[str, object]:
    keys = jwk.KeySet.import_key_set(json.loads((directory / "jwt.jwks").read_text()))
    return jwt.decode(token, keys, algorithms=["HS256"]).claims


def test_secrets_are_for_the_owner_only_and_stay_the_same(tmp_path: Path):
    keys = tmp_path / "keys"
    ensure_keys(keys)
    before = {path.name: path.read_bytes() for path in keys.iterdir()}
    ensure_keys(keys)
    assert {path.name: path.read_bytes() for path in keys.iterdir()} == before
    assert set(before) == {"jwt.jwks", "service.token", "postgres.password", "nats.token"}
    assert {path.stat().st_mode & 0o777 for path in keys.iterdir()} == {0o600}
    assert keys.stat().st_mode & 0o777 == 0o700


def test_a_token_says_who_may_do_what_until_when(tmp_path: Path):
    ensure_keys(tmp_path)
    token = mint_token(tmp_path, subject="ada", scopes=["model:read"], expires_seconds=60)
    claims = claims_of(tmp_path, token)
    assert (claims["sub"], claims["permissions"]) == ("ada", ["model:read"])
    assert (claims["iss"], claims["aud"]) == ("lensmesh", "lensmesh")
    assert 0 < claims["exp"] - time.time() <= 60
    assert "loads_per_hour" not in claims


def test_the_load_limit_is_lifted_by_a_claim(tmp_path: Path):
    ensure_keys(tmp_path)
    assert claims_of(tmp_path, mint_token(tmp_path, subject="demo", loads_per_hour=1000))["loads_per_hour"] == 1000


def test_every_state_directory_has_keys_of_its_own(tmp_path: Path):
    for name in ("a", "b"):
        ensure_keys(tmp_path / name)
    with pytest.raises(InvalidKeyIdError):
        claims_of(tmp_path / "b", mint_token(tmp_path / "a", subject="ada"))


def test_no_keys_no_token(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        mint_token(tmp_path, subject="ada")
