"""Keys of a state directory: the JWK set that verifies user tokens and the mesh's own service token."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from joserfc import jwk, jwt

SCOPES = ("model:read", "model:write", "model:admin")
ISSUER = AUDIENCE = "lensmesh"


def ensure_keys(directory: Path) -> None:
    """Create `jwt.jwks` (one HS256 key), `service.token` and `postgres.password` where they are missing, mode 0600.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = jwk.OctKey.generate_key(256, {"kid": secrets.token_hex(8), "use": "sig", "alg": "HS256"})
    _write_once(directory / "jwt.jwks", json.dumps(jwk.KeySet([key]).as_dict(private=True)))
    for name in ("service.token", "postgres.password", "nats.token"):
        _write_once(directory / name, secrets.token_urlsafe(32))


def mint_token(
    directory: Path,
    *,
    subject: str,
    scopes: Sequence[str] = SCOPES,
    expires_seconds: float = 86_400.0,
    loads_per_hour: int | None = None,
) -> str:
    """A signed user token.

    Args:
        directory: where `ensure_keys` wrote.
        subject: the user, claim `sub`.
        scopes: claim `permissions`.
        expires_seconds: validity from now, seconds.
        loads_per_hour: claim that replaces the hourly limit on model loads for this user.

    Raises:
        FileNotFoundError: the directory holds no keys.
    """
    key = jwk.KeySet.import_key_set(json.loads((directory / "jwt.jwks").read_text())).keys[0]
    now = int(time.time())
    claims: dict[str, object] = {
        "sub": subject,
        "permissions": list(scopes),
        "iss": ISSUER,
        "aud": AUDIENCE,
        "iat": now,
        "exp": now + int(expires_seconds),
    }
    if loads_per_hour is not None:
        claims["loads_per_hour"] = loads_per_hour
    return jwt.encode({"alg": "HS256", "kid": key.kid}, claims, key)


def _write_once(path: Path, text: str) -> None:
    """Write a secret that appears whole or not at all, and never replace one that is there."""
    if path.exists():
        return
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(staged, path)
    except FileExistsError:
        pass
    finally:
        staged.unlink()
