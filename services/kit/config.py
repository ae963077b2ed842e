"""Settings that every Lensmesh process reads from `LENSMESH_*` variables, once, in its composition root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1024,
    "mi": 1024**2,
    "gi": 1024**3,
    "ti": 1024**4,
}


def parse_bytes(value: object) -> int:
    """Bytes from a number or from text such as `6GiB`, `50 GB`, `4096`.

    Raises:
        ValueError: the text is not a size.
    """
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{value!r} is not a size in bytes (examples: 4096, 6GiB, 50GB)")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _split_paths(value: object) -> object:
    return [Path(part) for part in value.split(":") if part] if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
PathList = Annotated[list[Path], NoDecode, BeforeValidator(_split_paths)]


class Settings(BaseSettings):
    """What all processes share; a service subclasses this with its own fields."""

    model_config = SettingsConfigDict(env_prefix="LENSMESH_", extra="ignore", use_attribute_docstrings=True)

    state_dir: Path = Path.home() / ".lensmesh"
    """Directory of artifacts, caches, keys and, for the embedded ones, the database and the broker."""
    database_url: str = ""
    """PostgreSQL connection string, `postgresql://…`."""
    nats_url: str = ""
    """NATS server address, `nats://host:port`."""
    registry_address: str = ""
    """gRPC address of the registry, host:port; unused in the registry itself."""
    log_level: str = "INFO"
    """Least severe level that is logged: DEBUG, INFO, WARNING, ERROR."""
    jwt_key_file: Path | None = None
    """Keys that verify user tokens (a JWK set, or a raw HS256 secret); default `<state_dir>/keys/jwt.jwks`."""
    jwt_issuer: str = "lensmesh"
    """Required `iss` claim of user tokens."""
    jwt_audience: str = "lensmesh"
    """Required `aud` claim of user tokens."""
    service_token_file: Path | None = None
    """File with the mesh's own token for internal methods; default `<state_dir>/keys/service.token`."""
    tls_certificate_file: Path | None = None
    """PEM certificate chain of the gRPC listener; plain text on loopback when unset."""
    tls_key_file: Path | None = None
    """PEM private key that belongs to `tls_certificate_file`."""
    tls_ca_file: Path | None = None
    """PEM root certificates with which this process verifies the services it calls."""
    db_pool_min: Annotated[int, Field(ge=0)] = 1
    """Connections a process keeps open."""
    db_pool_max: Annotated[int, Field(ge=2)] = 5
    """Most connections a process opens; the local mesh's processes together stay near 20."""
    host_id: str = ""
    """Stable name of this process in the mesh; default the machine's name and the gRPC port."""
    job_slots: Annotated[int, Field(ge=1)] = 4
    """Jobs that this process runs side by side; they take turns on the device, batch by batch."""
    job_lease_seconds: Annotated[float, Field(ge=1)] = 30.0
    """How long a worker's claim on a job holds without renewal, in seconds; renewed three times as often."""
    drain_seconds: Annotated[float, Field(ge=0)] = 10.0
    """How long running calls and jobs may finish after a stop was asked for, in seconds."""
    model_roots: PathList = Field(default_factory=list)
    """Directories, colon-separated, below which `source: local` models may be read."""
    dataset_roots: PathList = Field(default_factory=list)
    """Directories, colon-separated, below which `source: local` datasets may be read."""

    artifact_bucket: str = ""
    """`s3://bucket/prefix` that keeps every artifact for hosts that share no disk; credentials are boto3's own."""
    artifact_endpoint: str = ""
    """URL of the S3-compatible service behind `artifact_bucket`; Amazon's when empty."""

    @property
    def artifact_dir(self) -> Path:
        """Root of the content-addressed artifact store."""
        return self.state_dir / "artifacts"

    @property
    def jwt_keys(self) -> Path:
        """File of the keys that verify user tokens."""
        return self.jwt_key_file or self.state_dir / "keys" / "jwt.jwks"

    @property
    def service_token_path(self) -> Path:
        """File of the mesh's internal token."""
        return self.service_token_file or self.state_dir / "keys" / "service.token"
