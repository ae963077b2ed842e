"""Bring the artifact store and its rows back together after crashes and restored backups."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from services.kit.artifacts import STAGING, TRASH, ArtifactStore
from services.kit.database import Database, load_queries

GRACE = timedelta(hours=1)

_QUERIES = load_queries(__file__, "artifacts.sql")


@dataclass(slots=True)
class Findings:
    """Uris of what was not as it should be, and was put right."""

    garbage: list[str] = field(default_factory=list)
    """Files without a row, deleted."""
    lost: list[str] = field(default_factory=list)
    """Rows without files, now `lost`."""
    found: list[str] = field(default_factory=list)
    """Lost ones whose files are back."""
    deleted: list[str] = field(default_factory=list)
    """Deletions that a crash had cut short."""


async def reconcile(store: ArtifactStore, database: Database, grace: timedelta = GRACE) -> Findings:
    """Compare files and rows of this host's store; safe beside readers, writers and other reconcilers.

    Args:
        store: the store.
        database: where its rows are.
        grace: files younger than this may still get their row.

    Raises:
        errors.Unavailable: the database does not answer; what was done so far holds.
    """
    findings = Findings()
    await asyncio.to_thread(_sweep_unfinished, store.root, grace.total_seconds())
    present = await asyncio.to_thread(_published, store.root)
    if store.bucket is not None:  # copies that only the bucket has are never garbage: another host may be publishing
        present = dict.fromkeys(await asyncio.to_thread(store.bucket.uris), float("inf")) | present
    async with database.connection() as conn:
        await conn.execute(_QUERIES["purge_leases"], store.store_id)
        states = {row["uri"]: row["state"] for row in await conn.fetch(_QUERIES["all"], store.store_id)}
    for uri, state in states.items():
        if state == "deleting":
            await store.remove(database, uri)
            findings.deleted.append(uri)
        elif (state == "lost") == (uri in present):
            await _correct(store, database, uri, findings)
    too_young = time.time() - grace.total_seconds()
    for uri in sorted(present.keys() - states.keys()):
        if present[uri] <= too_young:
            await _collect(store, database, uri, findings)
    return findings


async def _correct(store: ArtifactStore, database: Database, uri: str, findings: Findings) -> None:
    async with database.transaction() as conn:
        await conn.execute(_QUERIES["lock"], uri, store.store_id)
        state = await conn.fetchval(_QUERIES["lock_row"], uri, store.store_id)
        exists = await asyncio.to_thread(store.exists, uri)
        if state == "ready" and not exists:
            findings.lost.append(uri)
            await conn.execute(_QUERIES["set_state"], uri, store.store_id, "lost")
        elif state == "lost" and exists:
            findings.found.append(uri)
            await conn.execute(_QUERIES["set_state"], uri, store.store_id, "ready")


async def _collect(store: ArtifactStore, database: Database, uri: str, findings: Findings) -> None:
    async with database.transaction() as conn:
        await conn.execute(_QUERIES["lock"], uri, store.store_id)
        if await conn.fetchval(_QUERIES["lock_row"], uri, store.store_id) is None:
            await asyncio.to_thread(store.discard, uri)
            findings.garbage.append(uri)


def _published(root: Path) -> dict[str, float]:
    """Uri and age mark (seconds since the epoch) of every directory in its place."""
    found = {}
    for path in root.glob("[a-z]*/" + "[0-9a-f]" * 64):
        with suppress(FileNotFoundError):
            status = path.stat()
            found[f"artifact://{path.parent.name}/{path.name}"] = max(status.st_mtime, status.st_ctime)
    return found


def _sweep_unfinished(root: Path, grace: float) -> None:
    for path in (root / TRASH).iterdir():
        shutil.rmtree(path, ignore_errors=True)
    for marker in (root / STAGING).glob("*.lock"):
        with suppress(FileNotFoundError), marker.open("r+") as lock:
            if marker.stat().st_mtime > time.time() - grace:
                continue  # its writer may be about to lock it
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(marker.with_suffix(""), ignore_errors=True)
            marker.unlink()
