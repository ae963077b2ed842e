"""Who calls: user tokens (JWT) and the mesh's own service token, verified the same way in every process."""

from __future__ import annotations

import hmac
import json
import time
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, OctKey

from services.kit import errors

ALGORITHMS = ["HS256", "RS256", "ES256", "EdDSA"]
LEEWAY_SECONDS = 60
MIN_SECRET_BYTES = 32
MAX_REMEMBERED = 1000
"""Tokens whose signatures are not checked again."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who made the current call."""

    subject: str
    """The token's `sub`, or `mesh` for the service token."""
    scopes: frozenset[str] = frozenset()
    """Scopes of the token's `permissions` claim."""
    internal: bool = False
    """Whether the mesh itself calls; it has every scope."""
    claims: dict[str, Any] = field(default_factory=dict)
    """All claims of the token."""


MESH = Caller(subject="mesh", internal=True)
_caller: ContextVar[Caller | None] = ContextVar("lensmesh_caller", default=None)


def current_caller() -> Caller:
    """The caller of the rpc that runs in this task.

    Raises:
        errors.Unauthenticated: outside of a call.
    """
    caller = _caller.get()
    if caller is None:
        raise errors.Unauthenticated()
    return caller


def set_caller(caller: Caller) -> None:
    """Make `caller` the current one of this task."""
    _caller.set(caller)


class TokenVerifier:
    """Checks bearer tokens against a key file that may be rotated while the process runs."""

    def __init__(self, key_file: Path, service_token_file: Path | None, *, issuer: str, audience: str) -> None:
        self._key_file = key_file
        self._service_token_file = service_token_file
        self._claims = jwt.JWTClaimsRegistry(
            leeway=LEEWAY_SECONDS,
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": audience},
            exp={"essential": True},
            sub={"essential": True},
        )
        self._keys: KeySet | None = None
        self._keys_version: tuple[int, int] | None = None
        self._signed: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def verify(self, authorization: str | None) -> Caller:
        """The caller behind an `authorization` value `Bearer <token>`.

        Raises:
            errors.Unauthenticated: there is no token, or it is not valid; `metadata["cause"]` says why.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if not token:
            raise errors.Unauthenticated(metadata={"cause": "missing"})
        if scheme.lower() != "bearer":
            raise errors.Unauthenticated(metadata={"cause": "not_bearer"})
        if self._is_service_token(token):
            return MESH
        claims = self._decode(token)
        permissions = claims.get("permissions", [])
        if not isinstance(permissions, list):
            raise errors.Unauthenticated("the token's permissions are not a list", metadata={"cause": "malformed"})
        return Caller(subject=str(claims["sub"]), scopes=frozenset(map(str, permissions)), claims=claims)

    def _is_service_token(self, token: str) -> bool:
        if self._service_token_file is None:
            return False
        try:
            expected = self._service_token_file.read_text().strip()
        except OSError:
            return False
        return bool(expected) and hmac.compare_digest(token.encode(), expected.encode())

    def _decode(self, token: str) -> dict[str, Any]:
        """Its claims: their times are checked every time, its signature once while the keys stay the same."""
        try:
            keys = self._current_keys()
            claims = self._signed.get(token)
            if claims is None:
                claims = dict(jwt.decode(token, keys, algorithms=ALGORITHMS).claims)
            self._claims.validate(claims)
        except (JoseError, ValueError, TypeError, KeyError) as error:
            cause = getattr(error, "error", None) or "malformed"
            raise errors.Unauthenticated("the token is not valid", metadata={"cause": cause}) from error
        self._signed[token] = claims
        if len(self._signed) > MAX_REMEMBERED:
            self._signed.popitem(last=False)
        return dict(claims)

    def _current_keys(self) -> KeySet:
        try:
            stat = self._key_file.stat()
            version = (stat.st_mtime_ns, stat.st_size)
            if self._keys is None or version != self._keys_version:
                self._keys, self._keys_version = _read_keys(self._key_file), version
                self._signed.clear()
        except OSError as error:
            raise errors.Unavailable("the keys that verify tokens cannot be read") from error
        return self._keys


def _read_keys(path: Path) -> KeySet:
    content = path.read_bytes()
    if content.lstrip().startswith(b"{"):
        return KeySet.import_key_set(json.loads(content))
    secret = content.strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise errors.Unavailable("the token key is shorter than 32 bytes")
    return KeySet([OctKey.import_key(secret)])


def mint(
    key_file: Path,
    *,
    subject: str,
    permissions: list[str],
    issuer: str,
    audience: str,
    lifetime_seconds: float,
    **claims: object,
) -> str:
    """A signed user token from the first key of `key_file` that can sign."""
    now = int(time.time())
    key = _read_keys(key_file).keys[0]
    header = {"alg": {"oct": "HS256", "RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}[key.key_type]}
    if key.kid:
        header["kid"] = key.kid
    body = {"iss": issuer, "aud": audience, "sub": subject, "iat": now, "nbf": now, "exp": now + int(lifetime_seconds)}
    return jwt.encode(header, body | {"permissions": permissions} | claims, key, algorithms=ALGORITHMS)
