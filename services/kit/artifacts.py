"""The artifact store: directories of files named by their content, each with a row that says it exists.

A directory becomes visible by one rename and counts by one row; both happen or the directory is garbage.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import asyncpg
from blake3 import blake3

from services.kit import errors
from services.kit.bucket import Bucket
from services.kit.database import Database, load_queries
from services.kit.ids import new_id

LEASE = timedelta(minutes=5)
STAGING = ".staging"
TRASH = ".trash"

_QUERIES = load_queries(__file__, "artifacts.sql")
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_URI = re.compile(r"artifact://([a-z][a-z0-9_-]{0,39})/([0-9a-f]{64})")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_STORE_ID = ".store-id"


@dataclass(frozen=True, slots=True)
class Artifact:
    """One published directory."""

    uri: str
    """`artifact://<kind>/<digest>`; the only name that leaves the process."""
    digest: str
    """blake3 over the sorted relative names and the blake3 of each file, hex."""
    size_bytes: int


class ArtifactStore:
    """Artifacts below one directory of this host.

    Layout: `<kind>/<digest>/…` published, `.staging/` being written, `.trash/` being deleted. Hosts that share no file
    system have a store each, whose id its rows carry; or one together, in a bucket of which each holds what it uses.
    """

    def __init__(self, root: Path, bucket: Bucket | None = None) -> None:
        self.root = root.absolute()
        self.bucket = bucket
        for name in (STAGING, TRASH):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.store_id = bucket.store_id() if bucket is not None else _store_id(self.root / _STORE_ID)

    @contextmanager
    def staging(self, kind: str) -> Iterator[Path]:
        """An empty directory to write files into, in the store's own file system; gone at the end unless published.

        Raises:
            errors.Exhausted: `CACHE_FULL`: the disk is full; nothing is left of what was written.
        """
        _check_kind(kind)
        path = self.root / STAGING / new_id(kind)
        marker = path.with_suffix(".lock")
        with full_disk_named(), marker.open("x") as lock:
            try:
                # The lock says that the writer lives; the kernel drops it when the process dies.
                fcntl.flock(lock, fcntl.LOCK_EX)
                path.mkdir()
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
                marker.unlink(missing_ok=True)

    def seal(self, staged: Path) -> tuple[str, int]:
        """Flush a staged directory to the disk; its digest and bytes, for a `publish` that should not take so long.

        Raises:
            errors.Invalid: a symbolic link or a special file is among the files.
            errors.Exhausted: `CACHE_FULL`.
        """
        with full_disk_named():
            return _seal(staged)

    async def publish(
        self,
        conn: asyncpg.Connection,
        kind: str,
        staged: Path,
        meta: dict[str, Any],
        sealed: tuple[str, int] | None = None,
    ) -> Artifact:
        """Make a staged directory an artifact; it exists exactly if the caller's transaction commits.

        Files are flushed to disk before the rename, the rename before the row. Content that exists already is kept and
        the staged copy dropped.

        Args:
            conn: connection in a transaction.
            kind: first part of the uri: `[a-z][a-z0-9_-]*`, up to 40 characters.
            staged: a directory that `staging` gave, or one below it.
            meta: facts for the row, plain JSON.
            sealed: what `seal` gave for it, unless it is to be done here.

        Raises:
            errors.Invalid: a symbolic link or a special file is among the files.
            errors.Exhausted: `CACHE_FULL`.
        """
        assert conn.is_in_transaction(), "an artifact belongs to the transaction that refers to it"
        _check_kind(kind)
        with full_disk_named():
            digest, size = sealed if sealed is not None else await asyncio.to_thread(_seal, staged)
            uri = f"artifact://{kind}/{digest}"
            await conn.execute(_QUERIES["lock"], uri, self.store_id)
            await asyncio.to_thread(_move, staged, self.root / kind / digest)
            if self.bucket is not None:
                await asyncio.to_thread(self.bucket.upload, kind, digest, self.root / kind / digest)
        await conn.execute(_QUERIES["insert"], uri, self.store_id, kind, digest, size, meta)
        return Artifact(uri, digest, size)

    def path(self, uri: str, name: str | None = None) -> Path:
        """Where an artifact's directory is on this host, or its file `name`.

        Raises:
            errors.NotFound: there is no such artifact here, or no such file in it.
            errors.Invalid: `ARTIFACT_OUTSIDE_ROOT`: the uri is malformed, or the name leads out of the artifact.
        """
        path = self.location(uri)
        if name is not None:
            relative = PurePosixPath(name)
            if "\0" in name or relative.is_absolute() or ".." in relative.parts or not relative.parts:
                raise _outside("name")
            path = path / relative
        if not path.exists():
            raise _not_found(uri)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise _outside("uri")
        return path

    @asynccontextmanager
    async def reading(self, database: Database, uri: str) -> AsyncIterator[Path]:
        """The artifact's directory under a lease that keeps it from being deleted; renewed until the block ends.

        Raises:
            errors.NotFound: it does not exist here, or is being deleted.
            errors.Failed: `ARTIFACT_LOST`: it has a row, but its files are gone.
        """
        lease = new_id("lease")
        async with database.transaction() as conn:
            if await conn.fetchval(_QUERIES["lease"], lease, uri, self.store_id, LEASE) is None:
                raise _lost(uri) if await self._state(conn, uri) == "lost" else _not_found(uri)
            await conn.execute(_QUERIES["touch"], uri, self.store_id)
        renewal = asyncio.create_task(self._renew(database, lease))
        try:
            if self.bucket is not None:
                await asyncio.to_thread(self._fetch, uri)
            yield self.path(uri)
        finally:
            renewal.cancel()
            with suppress(errors.Unavailable):  # it expires by itself
                async with database.connection() as conn:
                    await conn.execute(_QUERIES["release"], lease)

    async def delete(self, database: Database, uri: str) -> None:
        """Delete an artifact's row and files.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: `IN_USE`: somebody reads it.
        """
        async with database.transaction() as conn:
            if await conn.fetchval(_QUERIES["lock_row"], uri, self.store_id) is None:
                raise _not_found(uri)
            readers = await conn.fetchval(_QUERIES["readers"], uri, self.store_id)
            if readers:
                raise errors.Conflict(f"{readers} readers use {uri}", reason="IN_USE", metadata={"readers": readers})
            await conn.execute(_QUERIES["set_state"], uri, self.store_id, "deleting")
        await self.remove(database, uri)

    async def remove(self, database: Database, uri: str) -> None:
        """Finish a deletion: files first, then the row, so that one which was cut short is found and finished."""
        async with database.transaction() as conn:
            await conn.execute(_QUERIES["lock"], uri, self.store_id)
            if await self._state(conn, uri) == "deleting":
                await asyncio.to_thread(self.discard, uri)
                await conn.execute(_QUERIES["delete"], uri, self.store_id)

    def location(self, uri: str) -> Path:
        """Where the directory of a well-formed uri is, or would be.

        Raises:
            errors.Invalid: `ARTIFACT_OUTSIDE_ROOT`: it is malformed.
        """
        match = _URI.fullmatch(uri)
        if match is None:
            raise _outside("uri")
        return self.root / match[1] / match[2]

    def exists(self, uri: str) -> bool:
        """Whether its files are here, or in the bucket."""
        path = self.location(uri)
        return path.is_dir() or (self.bucket is not None and self.bucket.has(path.parent.name, path.name))

    def _fetch(self, uri: str) -> None:
        """Bring an artifact from the bucket that is not here.

        Raises:
            errors.Failed: `ARTIFACT_LOST`: the bucket does not have it, or has other bytes.
        """
        target = self.location(uri)
        if target.is_dir() or self.bucket is None:
            return
        with self.staging(target.parent.name) as staged:
            self.bucket.download(target.parent.name, target.name, staged)
            if _seal(staged)[0] != target.name:
                raise _lost(uri)
            _move(staged, target)

    def discard(self, uri: str) -> None:
        """Delete an artifact's files: gone from its place by one rename, then piece by piece; and from the bucket."""
        if self.bucket is not None:
            self.bucket.delete(self.location(uri).parent.name, self.location(uri).name)
        trash = self.root / TRASH / new_id("gone")
        with suppress(FileNotFoundError):
            os.rename(self.location(uri), trash)
        shutil.rmtree(trash, ignore_errors=True)

    async def bytes_by_kind(self, conn: asyncpg.Connection) -> dict[str, int]:
        """Bytes of the published artifacts of this store."""
        return {row["kind"]: row["bytes"] for row in await conn.fetch(_QUERIES["bytes_by_kind"], self.store_id)}

    async def _state(self, conn: asyncpg.Connection, uri: str) -> str | None:
        return await conn.fetchval(_QUERIES["lock_row"], uri, self.store_id)

    async def _renew(self, database: Database, lease: str) -> None:
        while True:
            await asyncio.sleep(LEASE.total_seconds() / 3)
            with suppress(errors.Unavailable):
                async with database.connection() as conn:
                    await conn.execute(_QUERIES["renew"], lease, LEASE)


@contextmanager
def full_disk_named() -> Iterator[None]:
    """A full disk, told by any library in any of its ways, becomes one error.

    Raises:
        errors.Exhausted: `CACHE_FULL`.
    """
    try:
        yield
    except errors.LensmeshError:
        raise
    except Exception as error:
        # safetensors and torch wrap the system's error in exceptions of their own.
        told = isinstance(error, OSError) and error.errno in _FULL
        if told or os.strerror(errno.ENOSPC) in str(error):
            raise errors.Exhausted("The disk is full", reason="CACHE_FULL") from error
        raise


def digest_directory(directory: Path) -> tuple[str, int]:
    """An artifact's digest, recomputed from its files, and their bytes in all.

    Raises:
        errors.Invalid: a symbolic link or a special file is among the files.
    """
    content, size = blake3(), 0
    for path in _entries(directory):
        if path.is_file():
            name = path.relative_to(directory).as_posix().encode()
            content.update(len(name).to_bytes(8, "little") + name + blake3().update_mmap(path).digest())
            size += path.stat().st_size
    return content.hexdigest(), size


def _entries(directory: Path) -> list[Path]:
    entries = sorted(directory.rglob("*"), key=lambda path: path.relative_to(directory).as_posix())
    for path in entries:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise errors.Invalid.of("artifact", f"{path.name} is neither a file nor a directory")
    return entries


def _seal(directory: Path) -> tuple[str, int]:
    found = digest_directory(directory)
    for path in (*_entries(directory), directory):
        _sync(path)
    return found


def _move(staged: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        os.rename(staged, target)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise
    _sync(target.parent)
    _sync(target.parent.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _store_id(path: Path) -> str:
    """The store's id, chosen once; of two processes that start at once the first to link its file wins."""
    if not path.exists():
        own = path.with_name(new_id(_STORE_ID))
        own.write_text(new_id("store"))
        _sync(own)
        with suppress(FileExistsError):
            os.link(own, path)
        own.unlink()
        _sync(path.parent)
    return path.read_text()


def _check_kind(kind: str) -> None:
    assert _KIND.fullmatch(kind), f"{kind!r} is not a kind of artifact"


def _outside(field: str) -> errors.Invalid:
    return errors.Invalid(
        f"{field} does not name anything in the artifact store",
        reason="ARTIFACT_OUTSIDE_ROOT",
        violations=[(field, "does not name anything in the artifact store")],
    )


def _not_found(uri: str) -> errors.NotFound:
    return errors.NotFound(f"There is no {uri}", metadata={"uri": uri})


def _lost(uri: str) -> errors.Failed:
    return errors.Failed(f"The files of {uri} are gone", reason="ARTIFACT_LOST", metadata={"uri": uri})
