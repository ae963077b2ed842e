"""Tokens: what the gateway lets through, and every known way to forge one."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OctKey, OKPKey, RSAKey

from tests.wire.gateway_support import Mesh, running

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with running(tmp_path) as made:
        yield made


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    made = {"iss": "lensmesh", "aud": "lensmesh", "sub": "ann", "iat": now, "nbf": now, "exp": now + 600}
    made |= {"permissions": ["model:read"]} | changes
    made |= {name[:-3]: now + made.pop(name) for name in ("exp_in", "nbf_in") if name in made}
    return {name: value for name, value in made.items() if value is not None}


def sign(key: Any, algorithm: str, body: dict[str, Any], **header: Any) -> str:
    return jwt.encode({"alg": algorithm} | header, body, key, algorithms=[algorithm])


def part(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def forge(header: dict[str, Any], body: dict[str, Any], key: bytes) -> str:
    """A token signed with HMAC whatever its header says."""
    signed = f"{part(header)}.{part(body)}"
    return f"{signed}.{part(hmac.new(key, signed.encode(), hashlib.sha256).digest())}"


async def status(mesh: Mesh, token: str) -> tuple[int, str]:
    answer = await mesh.http.get("/api/animals/7", headers={"authorization": f"Bearer {token}"})
    return answer.status_code, answer.json().get("error", {}).get("code", "")


async def test_a_request_without_a_token_is_401(mesh: Mesh) -> None:
    for headers in ({}, {"authorization": ""}, {"authorization": "Basic YTpi"}, {"authorization": "Bearer"}):
        answer = await mesh.http.get("/api/animals/7", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "UNAUTHENTICATED")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert mesh.zoo.seen == []


async def test_a_body_is_not_read_before_the_token_is_checked(mesh: Mesh) -> None:
    answer = await mesh.http.post("/api/animals", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 401


async def test_a_public_route_needs_no_token_but_refuses_a_wrong_one(mesh: Mesh) -> None:
    assert (await mesh.http.get("/api/names")).status_code == 200
    assert (await mesh.http.get("/api/names", headers={"authorization": "Bearer x"})).status_code == 401


async def test_scopes_are_checked_by_the_service(mesh: Mesh) -> None:
    answer = await mesh.http.post("/api/animals", json={"name": "x"}, headers=mesh.bearer(["model:read"]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "SCOPE_MISSING")
    assert answer.json()["error"]["details"] == {"required": "model:write"}
    assert mesh.zoo.requests == []


async def test_the_mesh_s_own_token_is_not_one_of_http(mesh: Mesh) -> None:
    assert await status(mesh, "the-mesh-itself-0123456789abcdef") == (401, "UNAUTHENTICATED")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 200),
        ({"exp_in": -30}, 200),
        ({"exp_in": -3600}, 401),
        ({"exp": None}, 401),
        ({"exp": "never"}, 401),
        ({"exp": 1e308}, 200),
        ({"nbf_in": 30}, 200),
        ({"nbf_in": 3600}, 401),
        ({"aud": "other"}, 401),
        ({"aud": ["other", "lensmesh"]}, 200),
        ({"aud": None}, 401),
        ({"iss": "evil"}, 401),
        ({"iss": None}, 401),
        ({"sub": None}, 401),
        ({"permissions": "model:read"}, 401),
        ({"permissions": None}, 403),
    ],
)
async def test_claims(mesh: Mesh, changes: dict[str, Any], expected: int) -> None:
    token = sign(OctKey.import_key(SECRET), "HS256", claims(**changes))
    assert (await status(mesh, token))[0] == expected


async def test_forged_tokens_are_refused(mesh: Mesh) -> None:
    good = sign(OctKey.import_key(SECRET), "HS256", claims())
    head, body, signature = good.split(".")
    public = RSAKey.generate_key(2048)
    forged = [
        f"{part({'alg': 'none'})}.{body}.",
        f"{part({'alg': 'None', 'typ': 'JWT'})}.{body}.{signature}",
        f"{head}.{part(claims(sub='root'))}.{signature}",
        f"{head}.{body}.",
        f"{head}.{body}",
        forge({"alg": "HS256"}, claims(), b""),
        forge({"alg": "HS256"}, claims(), b"\x00"),
        forge({"alg": "RS256"}, claims(), SECRET),
        forge({"alg": "HS256", "jwk": {"kty": "oct", "k": part(b"mine")}}, claims(), b"mine"),
        forge({"alg": "HS256", "kid": "../../dev/null"}, claims(), b""),
        forge({"alg": "HS256", "kid": "' OR 1=1 --"}, claims(), b"x"),
        forge({"alg": "HS256", "jku": "http://127.0.0.1/keys"}, claims(), b"x"),
        forge({"alg": "HS256", "crit": ["b64"], "b64": False}, claims(), SECRET),
        sign(OctKey.import_key(SECRET * 2), "HS512", claims()),
        sign(public, "RS256", claims(), jwk=public.as_dict(private=False)),
        "a.b.c",
        "." * 5000,
        "x" * 20_000,
        f"{part(b'[]')}.{body}.{signature}",
        f"{head}.{part(b'[]')}.{signature}",
        f"{head}.{part(b'not json')}.{signature}",
    ]
    for token in forged:
        assert await status(mesh, token) == (401, "UNAUTHENTICATED"), token[:80]
    assert await status(mesh, good) == (200, "")
    assert mesh.metrics.get_sample_value("auth_failures_total", {"reason": "bad_signature"})


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (RSAKey.generate_key(2048, private=True), "RS256"),
        (ECKey.generate_key("P-256", private=True), "ES256"),
        (OKPKey.generate_key("Ed25519", private=True), "EdDSA"),
    ],
    ids=["RS256", "ES256", "EdDSA"],
)
async def test_public_keys_verify_and_cannot_be_used_as_secrets(tmp_path: Path, key: Any, algorithm: str) -> None:
    (tmp_path / "keys").mkdir()
    public = KeySet([type(key).import_key(key.as_dict(private=False))])
    (tmp_path / "keys" / "jwt.jwks").write_text(json.dumps(public.as_dict(private=False)))
    (tmp_path / "keys" / "service.token").write_text("x")
    secrets = [
        key.as_pem(private=False),
        key.as_pem(private=False).strip(),
        key.as_der(private=False),
        json.dumps(public.as_dict(private=False)).encode(),
        (tmp_path / "keys" / "jwt.jwks").read_bytes(),
    ]
    async with running(tmp_path) as mesh:
        assert await status(mesh, sign(key, algorithm, claims())) == (200, "")
        for secret in secrets:
            assert (await status(mesh, forge({"alg": "HS256"}, claims(), secret)))[0] == 401
        other = type(key).generate_key(key.as_dict().get("crv", 2048), private=True)
        assert (await status(mesh, sign(other, algorithm, claims())))[0] == 401


async def test_a_public_key_is_no_secret_even_where_a_secret_belongs(mesh: Mesh) -> None:
    public = RSAKey.generate_key(2048).as_pem(private=False)
    mesh.settings.jwt_keys.write_bytes(public)
    for secret in (public, public.strip()):
        assert (await status(mesh, forge({"alg": "HS256"}, claims(), secret)))[0] == 401


async def test_rotated_keys_are_read_again(mesh: Mesh) -> None:
    old, new = OctKey.import_key(SECRET, {"kid": "a"}), OctKey.import_key(SECRET[::-1], {"kid": "b"})
    both = KeySet([old, new]).as_dict(private=True)
    mesh.settings.jwt_keys.write_text(json.dumps(both))
    for key, kid in ((old, "a"), (new, "b")):
        assert await status(mesh, sign(key, "HS256", claims(), kid=kid)) == (200, "")
    mesh.settings.jwt_keys.write_text(json.dumps(KeySet([new]).as_dict(private=True)))
    assert (await status(mesh, sign(old, "HS256", claims(), kid="a")))[0] == 401
    assert await status(mesh, sign(new, "HS256", claims(), kid="b")) == (200, "")


async def test_without_a_key_file_nothing_is_open(mesh: Mesh) -> None:
    token = mesh.token()
    mesh.settings.jwt_keys.unlink()
    assert await status(mesh, token) == (503, "UNAVAILABLE")
