"""What a training writes counts only under its own lease: rows and files, against a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from services.extensions.adapters.postgres import PostgresStore
from services.extensions.adapters.run import ClaimedRun
from services.extensions.domain import Extension, NewTraining, TrainedExtension
from services.kit.artifacts import ArtifactStore
from services.kit.database import Database
from services.kit.jobs import Claim, JobStore, StaleLease
from services.kit.requests import RequestKey

KEY = RequestKey("ada", "m", "", b"")
RESULT = TrainedExtension(steps=7, tokens=70, loss_before=2.0, loss_after=1.0, seconds=0.5, best_step=7)


def writing(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "file").write_text(text) and None


@pytest.fixture
async def store(database: Database, tmp_path: Path) -> PostgresStore:
    await database.pool.execute(
        "INSERT INTO models (id, name, model_type, source, model_identifier, created_by)"
        " VALUES ('m_1', 'tiny', 'gpt2', 'local', 'gpt2', 'ada')"
    )
    store = PostgresStore(database, JobStore(database), ArtifactStore(tmp_path))
    extension = Extension("x_1", "m_1", "task-one", "lora", None, (), {"lora": 1}, "digest", "ada")
    await store.insert(extension, writing("first"), KEY)
    return store


async def claimed(store: PostgresStore, database: Database) -> ClaimedRun:
    """A run whose job is leased to worker w1 under fence 1."""
    job_id = await store.enqueue(NewTraining("x_1", "ds_1", steps=7), KEY)
    await database.pool.execute(
        "UPDATE jobs SET state = 'running', owner = 'w1', fence = 1, lease_until = clock_timestamp() + interval '1 h'"
        " WHERE id = $1",
        job_id,
    )
    return ClaimedRun(Claim(JobStore(database), await JobStore(database).get(job_id)), store)


async def test_finishing_makes_the_next_version_and_remembers_the_result(
    store: PostgresStore, database: Database
) -> None:
    run = await claimed(store, database)
    before = await store.get("x_1")
    await run.begun(2.0)
    await run.save(writing("state one"))
    first = (await run.training()).checkpoint_uri
    await run.save(writing("state two"))
    training = await run.training()
    assert (training.wanted.steps, training.loss_before, training.result) == (7, 2.0, None)
    assert training.artifact_uri == before.artifact_uri
    assert await database.pool.fetch("SELECT uri FROM artifacts WHERE kind = 'extension_checkpoint'") == [
        (training.checkpoint_uri,)
    ]
    assert first != training.checkpoint_uri

    await run.finish(RESULT, writing("second"))
    after = await store.get("x_1")
    assert (after.trained_steps, after.loss_before, after.loss_after) == (7, 2.0, 1.0)
    async with store.reading(after.artifact_uri) as folder:
        assert (folder / "file").read_text() == "second"
    async with store.reading(before.artifact_uri) as folder:
        assert (folder / "file").read_text() == "first", "lenses may hold on to the version before"
    training = await run.training()
    assert (training.result, training.checkpoint_uri) == (RESULT.as_dict(), None)
    assert not await database.pool.fetchval("SELECT count(*) FROM artifacts WHERE kind = 'extension_checkpoint'")


@pytest.mark.parametrize("write", ["begun", "save", "finish"])
async def test_nothing_is_written_after_the_lease_is_lost(store: PostgresStore, database: Database, write: str) -> None:
    run = await claimed(store, database)
    before = await run.training()
    await database.pool.execute("UPDATE jobs SET fence = 2, owner = 'w2' WHERE id = $1", run.job_id)
    call = {
        "begun": lambda: run.begun(2.0),
        "save": lambda: run.save(writing("state")),
        "finish": lambda: run.finish(RESULT, writing("second")),
    }[write]
    with pytest.raises(StaleLease):
        await call()
    assert await run.training() == before
    assert await database.pool.fetchval("SELECT count(*) FROM artifacts") == 1
