from __future__ import annotations

import errno
import os
from datetime import timedelta
from pathlib import Path

import pytest

from services.kit import artifacts, errors
from services.kit.artifacts import Artifact, ArtifactStore, digest_directory
from services.kit.database import Database
from services.kit.reconcile import reconcile


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


async def _publish(store: ArtifactStore, database: Database, files: dict[str, bytes], kind: str = "shard") -> Artifact:
    with store.staging(kind) as path:
        _write(path, files)
        async with database.transaction() as conn:
            return await store.publish(conn, kind, path, {"files": len(files)})


def _write(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def _left(store: ArtifactStore) -> list[str]:
    """Everything below the root but the store's own marks."""
    found = {path.relative_to(store.root).as_posix() for path in store.root.rglob("*")}
    return sorted(found - {artifacts.STAGING, artifacts.TRASH, ".store-id"})


async def test_a_published_directory_is_found_by_its_uri(store: ArtifactStore, database: Database) -> None:
    artifact = await _publish(store, database, {"a.bin": b"abc", "sub/b.bin": b"", "big": b"x" * 100_000})
    assert artifact.uri == f"artifact://shard/{artifact.digest}"
    assert artifact.size_bytes == 100_003
    path = store.path(artifact.uri)
    assert (path / "a.bin").read_bytes() == b"abc"
    assert store.path(artifact.uri, "sub/b.bin").read_bytes() == b""
    assert digest_directory(path) == (artifact.digest, artifact.size_bytes)
    row = await database.pool.fetchrow("SELECT * FROM artifacts")
    assert (row["uri"], row["size_bytes"], row["meta"], row["state"]) == (artifact.uri, 100_003, {"files": 3}, "ready")
    async with database.connection() as conn:
        assert await store.bytes_by_kind(conn) == {"shard": 100_003}


async def test_the_digest_depends_on_names_and_contents_only(store: ArtifactStore, database: Database) -> None:
    first = await _publish(store, database, {"a": b"1", "b": b"2"})
    same = await _publish(store, database, {"b": b"2", "a": b"1"})
    others = [
        await _publish(store, database, files)
        for files in ({"a": b"1", "b": b"3"}, {"a": b"1", "c": b"2"}, {"a": b"12"})
    ]
    assert same == first
    assert len({first.digest, *(artifact.digest for artifact in others)}) == 4
    assert await database.pool.fetchval("SELECT count(*) FROM artifacts") == 4


async def test_staging_leaves_nothing_behind(store: ArtifactStore) -> None:
    with store.staging("shard") as path:
        _write(path, {"a": b"1"})
    assert _left(store) == []


async def test_a_rolled_back_publication_is_garbage_after_the_grace_period(
    store: ArtifactStore, database: Database
) -> None:
    with store.staging("shard") as path, pytest.raises(RuntimeError):
        _write(path, {"a": b"1"})
        async with database.transaction() as conn:
            artifact = await store.publish(conn, "shard", path, {})
            raise RuntimeError
    assert await database.pool.fetchval("SELECT count(*) FROM artifacts") == 0
    assert store.path(artifact.uri).is_dir()

    assert (await reconcile(store, database)).garbage == []
    assert (await reconcile(store, database, grace=timedelta(0))).garbage == [artifact.uri]
    assert _left(store) == ["shard"]


async def test_an_orphan_is_adopted_by_the_next_publication(store: ArtifactStore, database: Database) -> None:
    artifact = await _publish(store, database, {"a": b"1"})
    await database.pool.execute("DELETE FROM artifacts")
    assert await _publish(store, database, {"a": b"1"}) == artifact
    assert (await reconcile(store, database, grace=timedelta(0))).garbage == []
    assert store.path(artifact.uri, "a").read_bytes() == b"1"


async def test_files_are_on_disk_before_the_rename_and_renamed_before_the_row(
    store: ArtifactStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        steps.append("fsync " + os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        steps.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(artifacts.os, "fsync", fsync)
    monkeypatch.setattr(artifacts.os, "rename", rename)
    with store.staging("shard") as path:
        _write(path, {"a.bin": b"1"})
        async with database.transaction() as conn:
            await store.publish(conn, "shard", path, {})
            assert await database.pool.fetchval("SELECT count(*) FROM artifacts") == 0  # not before the commit
    assert steps == ["fsync a.bin", f"fsync {path.name}", "rename", "fsync shard", "fsync store"]


def test_a_write_to_a_really_full_device(store: ArtifactStore) -> None:
    with pytest.raises(errors.Exhausted) as caught, store.staging("shard") as path:
        _write(path, {"a": b"1"})
        Path("/dev/full").write_bytes(b"1")
    assert caught.value.reason == "CACHE_FULL"
    assert _left(store) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_while_writing_leaves_nothing(store: ArtifactStore, code: int) -> None:
    with pytest.raises(errors.Exhausted) as caught, store.staging("shard") as path:
        _write(path, {"a": b"1"})
        raise OSError(code, os.strerror(code), str(path))
    assert caught.value.reason == "CACHE_FULL"
    assert str(store.root) not in caught.value.message
    assert _left(store) == []


async def test_a_full_disk_told_by_a_library_is_understood(store: ArtifactStore) -> None:
    with pytest.raises(errors.Exhausted), store.staging("shard"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


async def test_a_full_disk_while_publishing_leaves_nothing(
    store: ArtifactStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(artifacts.os, "rename", full)
    with pytest.raises(errors.Exhausted):
        await _publish(store, database, {"a": b"1"})
    assert _left(store) == ["shard"]
    assert await database.pool.fetchval("SELECT count(*) FROM artifacts") == 0


async def test_other_failures_keep_their_name(store: ArtifactStore) -> None:
    with pytest.raises(PermissionError), store.staging("shard"):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(errors.NotFound), store.staging("shard"):
        raise errors.NotFound


async def test_links_and_special_files_are_refused(store: ArtifactStore, database: Database) -> None:
    for make in (lambda path: path.symlink_to("/etc/passwd"), os.mkfifo):
        with pytest.raises(errors.Invalid), store.staging("shard") as path:
            make(path / "x")
            async with database.transaction() as conn:
                await store.publish(conn, "shard", path, {})
    assert _left(store) == []


_DIGEST = "0" * 64


@pytest.mark.parametrize(
    "uri",
    [
        "artifact://shard/../../etc",
        f"artifact://../{_DIGEST}",
        f"artifact:///{_DIGEST}",
        f"artifact://.staging/{_DIGEST}",
        f"artifact://shard/{_DIGEST}/x",
        f"artifact://shard/{_DIGEST}\n",
        f"artifact://shard/{'A' * 64}",
        "/etc/passwd",
        "file:///etc/passwd",
        "",
    ],
)
def test_a_uri_that_leads_elsewhere_is_refused(store: ArtifactStore, uri: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        store.path(uri)
    assert caught.value.reason == "ARTIFACT_OUTSIDE_ROOT"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", "..", "a\0b"])
async def test_a_file_name_that_leads_out_is_refused(store: ArtifactStore, database: Database, name: str) -> None:
    artifact = await _publish(store, database, {"a": b"1"})
    with pytest.raises(errors.Invalid) as caught:
        store.path(artifact.uri, name)
    assert caught.value.reason == "ARTIFACT_OUTSIDE_ROOT"


def test_a_link_planted_in_the_store_leads_nowhere(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (store.root / "shard").mkdir()
    (store.root / "shard" / _DIGEST).symlink_to(tmp_path / "secret")
    with pytest.raises(errors.Invalid):
        store.path(f"artifact://shard/{_DIGEST}")


def test_what_does_not_exist_is_not_found_and_no_path_is_told(store: ArtifactStore) -> None:
    with pytest.raises(errors.NotFound) as caught:
        store.path(f"artifact://shard/{_DIGEST}")
    assert str(store.root) not in str(caught.value)


async def test_delete_removes_row_and_files(store: ArtifactStore, database: Database) -> None:
    artifact = await _publish(store, database, {"a": b"1"})
    await store.delete(database, artifact.uri)
    assert _left(store) == ["shard"]
    assert await database.pool.fetchval("SELECT count(*) FROM artifacts") == 0
    with pytest.raises(errors.NotFound):
        await store.delete(database, artifact.uri)


async def test_what_is_read_is_not_deleted(store: ArtifactStore, database: Database) -> None:
    artifact = await _publish(store, database, {"a": b"1"})
    async with store.reading(database, artifact.uri) as path:
        with pytest.raises(errors.Conflict) as caught:
            await store.delete(database, artifact.uri)
        assert caught.value.reason == "IN_USE"
        assert (path / "a").read_bytes() == b"1"
    await store.delete(database, artifact.uri)
    with pytest.raises(errors.NotFound):
        async with store.reading(database, artifact.uri):
            pass


async def test_a_dead_readers_lease_expires(store: ArtifactStore, database: Database) -> None:
    artifact = await _publish(store, database, {"a": b"1"})
    async with store.reading(database, artifact.uri):
        await database.pool.execute("UPDATE artifact_leases SET expires_at = clock_timestamp()")
        await store.delete(database, artifact.uri)
    assert _left(store) == ["shard"]


async def test_a_deletion_that_was_cut_short_is_finished(store: ArtifactStore, database: Database) -> None:
    with_files = await _publish(store, database, {"a": b"1"})
    without = await _publish(store, database, {"a": b"2"})
    await database.pool.execute("UPDATE artifacts SET state = 'deleting'")
    store.discard(without.uri)
    with pytest.raises(errors.NotFound):
        async with store.reading(database, with_files.uri):
            pass
    assert sorted((await reconcile(store, database)).deleted) == sorted([with_files.uri, without.uri])
    assert _left(store) == ["shard"]
    assert await database.pool.fetchval("SELECT count(*) FROM artifacts") == 0


async def test_content_published_again_while_it_is_being_deleted_stays(
    store: ArtifactStore, database: Database
) -> None:
    artifact = await _publish(store, database, {"a": b"1"})
    await database.pool.execute("UPDATE artifacts SET state = 'deleting'")
    assert await _publish(store, database, {"a": b"1"}) == artifact
    await store.remove(database, artifact.uri)
    assert store.path(artifact.uri, "a").read_bytes() == b"1"


async def test_a_row_without_files_is_lost_until_they_are_back(store: ArtifactStore, database: Database) -> None:
    artifact = await _publish(store, database, {"a": b"1"})
    path = store.path(artifact.uri)
    path.rename(store.root / "elsewhere")
    assert (await reconcile(store, database)).lost == [artifact.uri]
    with pytest.raises(errors.Failed) as caught:
        async with store.reading(database, artifact.uri):
            pass
    assert caught.value.reason == "ARTIFACT_LOST"
    (store.root / "elsewhere").rename(path)
    assert (await reconcile(store, database)).found == [artifact.uri]
    async with store.reading(database, artifact.uri) as found:
        assert (found / "a").read_bytes() == b"1"


async def test_staging_of_a_dead_writer_goes_and_that_of_a_living_one_stays(
    store: ArtifactStore, database: Database
) -> None:
    dead = store.root / artifacts.STAGING / "shard_dead"
    dead.mkdir()
    _write(dead, {"a": b"1"})
    dead.with_suffix(".lock").touch()
    with store.staging("shard") as living:
        _write(living, {"a": b"1"})
        await reconcile(store, database, grace=timedelta(0))
        assert not dead.exists()
        assert (living / "a").read_bytes() == b"1"
    assert _left(store) == []


async def test_another_hosts_store_is_left_alone(store: ArtifactStore, database: Database, tmp_path: Path) -> None:
    artifact = await _publish(store, database, {"a": b"1"})
    other = ArtifactStore(tmp_path / "other")
    assert other.store_id != store.store_id
    findings = await reconcile(other, database, grace=timedelta(0))
    assert (findings.lost, findings.garbage) == ([], [])
    with pytest.raises(errors.NotFound):
        await other.delete(database, artifact.uri)
    assert ArtifactStore(store.root).store_id == store.store_id
