"""Keys of a state directory: the JWK set that verifies user tokens and the mesh's own service token."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from joserfc import jwk

from services.kit import auth

SCOPES = ("model:read", "model:write", "model:admin")
ISSUER = AUDIENCE = "lensmesh"


def ensure_keys(directory: Path) -> None:
    """Create `jwt.jwks` (one HS256 key) and the mesh's own secrets where they are missing, mode 0600.

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
    claims = {} if loads_per_hour is None else {"loads_per_hour": loads_per_hour}
    return auth.mint(
        directory / "jwt.jwks",
        subject=subject,
        permissions=list(scopes),
        issuer=ISSUER,
        audience=AUDIENCE,
        lifetime_seconds=expires_seconds,
        **claims,
    )


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
