"""The artifact store with a bucket behind it, over HTTP against a real S3 implementation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from services.kit import errors
from services.kit.artifacts import Artifact, ArtifactStore
from services.kit.bucket import Bucket
from services.kit.database import Database
from services.kit.reconcile import reconcile


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="mesh")
    yield url
    server.stop()


def host(tmp_path: Path, name: str, endpoint: str) -> ArtifactStore:
    return ArtifactStore(tmp_path / name, Bucket("s3://mesh/lens/mesh", endpoint))


async def publish(store: ArtifactStore, database: Database, content: bytes = b"weights") -> Artifact:
    with store.staging("extension") as folder:
        (folder / "lora").mkdir()
        (folder / "lora" / "a.bin").write_bytes(content)
        (folder / "b.json").write_bytes(b"{}")
        async with database.transaction() as conn:
            return await store.publish(conn, "extension", folder, {})


async def test_hosts_without_a_common_disk_read_each_others_artifacts(
    database: Database, tmp_path: Path, endpoint: str
) -> None:
    one, other = host(tmp_path, "one", endpoint), host(tmp_path, "other", endpoint)
    assert one.store_id == other.store_id
    made = await publish(one, database)
    for _ in range(2):
        async with other.reading(database, made.uri) as folder:
            assert (folder / "lora" / "a.bin").read_bytes() == b"weights"
            assert folder.is_relative_to(tmp_path / "other")
    await other.delete(database, made.uri)
    assert not other.exists(made.uri)
    with pytest.raises(errors.NotFound):
        async with host(tmp_path, "third", endpoint).reading(database, made.uri):
            pass


async def test_a_lost_disk_is_no_lost_artifact(database: Database, tmp_path: Path, endpoint: str) -> None:
    store = host(tmp_path, "one", endpoint)
    made = await publish(store, database)
    shutil.rmtree(store.location(made.uri))
    found = await reconcile(store, database, timedelta(0))
    assert (found.lost, found.garbage) == ([], [])
    async with store.reading(database, made.uri) as folder:
        assert (folder / "b.json").read_bytes() == b"{}"


async def test_other_bytes_in_the_bucket_are_refused(database: Database, tmp_path: Path, endpoint: str) -> None:
    store = host(tmp_path, "one", endpoint)
    made = await publish(store, database)
    shutil.rmtree(store.location(made.uri))
    client = boto3.client("s3", endpoint_url=endpoint)
    client.put_object(Bucket="mesh", Key=f"lens/mesh/extension/{made.digest}/b.json", Body=b"[]")
    with pytest.raises(errors.Failed) as failed:
        async with store.reading(database, made.uri):
            pass
    assert failed.value.reason == "ARTIFACT_LOST"
    assert not store.location(made.uri).exists()


async def test_half_an_upload_does_not_count(database: Database, tmp_path: Path, endpoint: str) -> None:
    store = host(tmp_path, "one", endpoint)
    made = await publish(store, database)
    key = f"lens/mesh/.complete/extension/{made.digest}"
    boto3.client("s3", endpoint_url=endpoint).delete_object(Bucket="mesh", Key=key)
    shutil.rmtree(store.location(made.uri))
    assert (await reconcile(store, database, timedelta(0))).lost == [made.uri]
    await publish(store, database)
    assert (await reconcile(store, database, timedelta(0))).lost == []
    assert store.exists(made.uri)


def test_an_address_is_an_s3_address() -> None:
    with pytest.raises(ValueError, match="s3://bucket/prefix"):
        Bucket("https://mesh.example/bucket")
