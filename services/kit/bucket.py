"""Copies of artifacts in an S3-compatible store, for hosts that share no disk. Needs the extra `s3`.

An artifact counts once its marker is there, which is written last and deleted first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from services.kit.ids import new_id

MARKERS = ".complete"
STORE_ID = ".store-id"
_DELETE_AT_ONCE = 1000


class Bucket:
    """One prefix of one bucket; credentials are boto3's own, from its environment variables and files."""

    def __init__(self, address: str, endpoint: str = "") -> None:
        """Open it; nothing is sent before the first call.

        Args:
            address: `s3://bucket/prefix`.
            endpoint: URL of the service; Amazon's when empty.

        Raises:
            ValueError: the address is no `s3://bucket`.
            ImportError: the extra `s3` is not installed.
        """
        import boto3  # noqa: PLC0415 - an extra

        parts = urlsplit(address)
        if parts.scheme != "s3" or not parts.netloc:
            raise ValueError(f"{address!r} is not an address such as s3://bucket/prefix")
        self._name = parts.netloc
        self._prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
        self._client = boto3.client("s3", endpoint_url=endpoint or None)

    def store_id(self) -> str:
        """The id that every host's rows carry, chosen by the first to ask."""
        key = self._prefix + STORE_ID
        try:
            self._client.put_object(Bucket=self._name, Key=key, Body=new_id("store").encode(), IfNoneMatch="*")
        except self._client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise
        stored: bytes = self._client.get_object(Bucket=self._name, Key=key)["Body"].read()
        return stored.decode()

    def upload(self, kind: str, digest: str, folder: Path) -> None:
        """Copy an artifact's files; one that is there already is left alone."""
        if self.has(kind, digest):
            return
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = self._key(kind, digest, path.relative_to(folder).as_posix())
                self._client.upload_file(str(path), self._name, key)
        self._client.put_object(Bucket=self._name, Key=self._marker(kind, digest), Body=b"")

    def has(self, kind: str, digest: str) -> bool:
        """Whether all of an artifact is there."""
        return any(True for _ in self._list(self._marker(kind, digest)))

    def download(self, kind: str, digest: str, folder: Path) -> None:
        """Copy an artifact's files into an existing empty folder; the caller checks their digest."""
        start = self._key(kind, digest, "")
        for key in self._list(start):
            target = folder / key.removeprefix(start)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(self._name, key, str(target))

    def delete(self, kind: str, digest: str) -> None:
        """Delete an artifact's copy; nothing to do is no error."""
        keys = [self._marker(kind, digest), *self._list(self._key(kind, digest, ""))]
        for first in range(0, len(keys), _DELETE_AT_ONCE):
            objects: Any = [{"Key": key} for key in keys[first : first + _DELETE_AT_ONCE]]
            self._client.delete_objects(Bucket=self._name, Delete={"Objects": objects, "Quiet": True})

    def uris(self) -> set[str]:
        """Every artifact that is there as a whole."""
        start = f"{self._prefix}{MARKERS}/"
        return {f"artifact://{key.removeprefix(start)}" for key in self._list(start)}

    def _list(self, prefix: str) -> Iterator[str]:
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name, Prefix=prefix):
            yield from (entry["Key"] for entry in page.get("Contents", ()))

    def _key(self, kind: str, digest: str, name: str) -> str:
        return f"{self._prefix}{kind}/{digest}/{name}"

    def _marker(self, kind: str, digest: str) -> str:
        return f"{self._prefix}{MARKERS}/{kind}/{digest}"
