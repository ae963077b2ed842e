from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
from pathlib import Path

import pytest
from joserfc import jwt
from joserfc.jwk import KeySet, OctKey, RSAKey

from services.kit import auth, errors

PERMISSIONS = ["model:read"]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "jwt.jwks"
    path.write_text(json.dumps(KeySet([OctKey.generate_key(256, {"kid": "one"})]).as_dict(private=True)))
    return path


@pytest.fixture
def service_token(tmp_path: Path) -> Path:
    path = tmp_path / "service.token"
    path.write_text("s" * 40 + "\n")
    return path


@pytest.fixture
def verifier(keys: Path, service_token: Path) -> auth.TokenVerifier:
    return auth.TokenVerifier(keys, service_token, issuer="lensmesh", audience="lensmesh")


def token(keys: Path, **changes: object) -> str:
    given = {"subject": "ada", "permissions": PERMISSIONS, "issuer": "lensmesh", "audience": "lensmesh"}
    return auth.mint(keys, **(given | {"lifetime_seconds": 60} | changes))  # type: ignore[arg-type]


def part(value: dict[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def cause(verifier: auth.TokenVerifier, authorization: str | None) -> str:
    with pytest.raises(errors.Unauthenticated) as caught:
        verifier.verify(authorization)
    return str(caught.value.metadata["cause"])


def test_a_valid_token_names_its_caller(verifier: auth.TokenVerifier, keys: Path) -> None:
    caller = verifier.verify(f"Bearer {token(keys, loads_per_hour=0)}")
    assert (caller.subject, caller.scopes, caller.internal) == ("ada", frozenset(PERMISSIONS), False)
    assert caller.claims["loads_per_hour"] == 0


def test_the_service_token_is_the_mesh_itself(verifier: auth.TokenVerifier) -> None:
    assert verifier.verify("Bearer " + "s" * 40) is auth.MESH


def test_without_a_token_nobody_calls(verifier: auth.TokenVerifier) -> None:
    assert cause(verifier, None) == "missing"
    assert cause(verifier, "Bearer ") == "missing"
    assert cause(verifier, "Basic YTpi") == "not_bearer"


@pytest.mark.parametrize("change", [{"lifetime_seconds": -120}, {"issuer": "other"}, {"audience": "other"}])
def test_claims_are_checked(verifier: auth.TokenVerifier, keys: Path, change: dict[str, object]) -> None:
    assert cause(verifier, f"Bearer {token(keys, **change)}") in {"expired_token", "invalid_claim"}


def test_a_clock_may_be_a_minute_off_but_not_ten(verifier: auth.TokenVerifier, keys: Path) -> None:
    assert verifier.verify(f"Bearer {token(keys, lifetime_seconds=-30)}").subject == "ada"
    assert cause(verifier, f"Bearer {token(keys, lifetime_seconds=-600)}") == "expired_token"


def test_a_known_token_expires_all_the_same(
    verifier: auth.TokenVerifier, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = token(keys)
    assert verifier.verify(f"Bearer {known}").subject == "ada"
    later = time.time() + 600
    monkeypatch.setattr(time, "time", lambda: later)
    assert cause(verifier, f"Bearer {known}") == "expired_token"


def test_a_token_from_the_future_is_refused(verifier: auth.TokenVerifier, keys: Path) -> None:
    later = int(time.time()) + 3600
    assert cause(verifier, f"Bearer {token(keys, nbf=later)}") != "missing"


def test_alg_none_is_refused(verifier: auth.TokenVerifier) -> None:
    claims = {"sub": "eve", "iss": "lensmesh", "aud": "lensmesh", "exp": 2**31, "permissions": ["model:admin"]}
    forged = f"{part({'alg': 'none'})}.{part(claims)}."
    assert cause(verifier, f"Bearer {forged}") != "missing"


def test_a_public_rsa_key_cannot_be_used_as_an_hmac_secret(tmp_path: Path) -> None:
    pair = RSAKey.generate_key(2048, {"kid": "rsa"})
    keys = tmp_path / "public.jwks"
    keys.write_text(json.dumps(KeySet([pair]).as_dict(private=False)))
    verifier = auth.TokenVerifier(keys, None, issuer="lensmesh", audience="lensmesh")
    claims = {"sub": "eve", "iss": "lensmesh", "aud": "lensmesh", "exp": int(time.time()) + 60, "permissions": []}
    genuine = jwt.encode({"alg": "RS256", "kid": "rsa"}, claims, pair, algorithms=["RS256"])
    assert verifier.verify(f"Bearer {genuine}").subject == "eve"
    signed = f"{part({'alg': 'HS256', 'kid': 'rsa'})}.{part(claims)}"
    mac = hmac.new(pair.as_pem(private=False), signed.encode(), hashlib.sha256).digest()
    forged = f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    assert cause(verifier, f"Bearer {forged}") != "missing"


def test_a_rotated_key_file_is_read_again(verifier: auth.TokenVerifier, keys: Path) -> None:
    old = token(keys)
    assert verifier.verify(f"Bearer {old}").subject == "ada"
    keys.write_text(json.dumps(KeySet([OctKey.generate_key(256, {"kid": "two"})]).as_dict(private=True)))
    os.utime(keys, ns=(1, 1))
    assert cause(verifier, f"Bearer {old}") != "missing"
    assert verifier.verify(f"Bearer {token(keys)}").subject == "ada"


def test_a_raw_secret_must_be_long(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("secret")
    verifier = auth.TokenVerifier(short, None, issuer="lensmesh", audience="lensmesh")
    with pytest.raises(errors.Unavailable, match="32 bytes"):
        verifier.verify("Bearer a.b.c")
