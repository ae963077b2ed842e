"""Trainings, transcoders and evaluations as rows in PostgreSQL, with their jobs in the same transactions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any

import asyncpg

from services.kit import errors
from services.kit.artifacts import ArtifactStore
from services.kit.database import Database, load_queries
from services.kit.idempotency import idempotent
from services.kit.ids import new_id
from services.kit.jobs import JobStore
from services.kit.paging import Page, after, cut
from services.kit.requests import RequestKey
from services.training.domain import (
    EVALUATION_KIND,
    EVALUATION_PREFIX,
    EVENT_PREFIX,
    JOB_KIND,
    SPLIT_EVALUATION_KIND,
    Checkpoint,
    Evaluation,
    Filter,
    Plan,
    Pruning,
    Queued,
    Retention,
    Training,
    Transcoder,
    Wanted,
    WantedEvaluation,
)
from services.training.retention import kept

QUERIES = load_queries(__file__)
_TRANSCODER = [field.name for field in fields(Transcoder)]
_CHECKPOINT = [field.name for field in fields(Checkpoint)]


class PostgresStore:
    """Implements the port `Store`."""

    def __init__(self, database: Database, jobs: JobStore, artifacts: ArtifactStore) -> None:
        self._database = database
        self._jobs = jobs
        self.artifacts = artifacts

    async def queue(self, wanted: Wanted, plan: Plan, key: RequestKey) -> Training:
        """Rows of the training and of its job in one transaction."""
        async with self._database.transaction() as conn, idempotent(conn, key) as request:
            if request.answer is None:
                job = await self._jobs.enqueue(
                    conn,
                    kind=JOB_KIND,
                    payload={"model_id": wanted.model_id, "layers": list(wanted.layers)},
                    created_by=key.caller,
                    event_prefix=EVENT_PREFIX,
                    event_data={"model_id": wanted.model_id},
                )
                await conn.execute(
                    QUERIES["insert_training"],
                    job.id,
                    wanted.model_id,
                    list(wanted.layers),
                    wanted.dataset_id or None,
                    wanted.cache_id or None,
                    plan.as_json(),
                    asdict(wanted.retention or Retention()),
                    key.caller,
                )
                request.answer = {"id": job.id}
        return await self.training(request.answer["id"])

    async def training(self, job_id: str) -> Training:
        """One training with what its job tells."""
        async with self._database.connection() as conn:
            row = await conn.fetchrow(QUERIES["training"], job_id)
            if row is None:
                raise errors.NotFound(f"There is no training {job_id}", metadata={"id": job_id})
            return (await _trainings(conn, [row]))[0]

    async def trainings(self, wanted: Filter) -> Page:
        """A page, newest first."""
        filters = (wanted.model_id, wanted.status)
        async with self._database.connection() as conn:
            rows = await conn.fetch(
                QUERIES["trainings"], *filters, *after(wanted.page_token), wanted.limit + 1, wanted.offset
            )
            total = await conn.fetchval(QUERIES["count_trainings"], *filters)
            shown, token = cut(rows, wanted.limit)
            return Page(tuple(await _trainings(conn, shown)), total, wanted.limit, wanted.offset, token)

    async def history(self, job_id: str, points: int) -> list[dict[str, Any]]:
        """Thinned in the database."""
        async with self._database.connection() as conn:
            return [row["figures"] for row in await conn.fetch(QUERIES["history"], job_id, points)]

    async def cancel(self, job_id: str) -> None:
        """By its job."""
        await self._jobs.request_cancel(job_id)

    async def pause(self, job_id: str) -> None:
        """By its job."""
        await self._jobs.request_pause(job_id)

    async def resume(self, job_id: str) -> None:
        """By its job."""
        await self._jobs.resume(job_id)

    async def finalize(self, job_id: str, checkpoint_id: str) -> None:
        """The same job once more, with another task."""
        async with self._database.transaction() as conn:
            await conn.execute(QUERIES["set_finalize"], job_id, checkpoint_id)
            if checkpoint_id not in [one.id for one in await checkpoints_of(conn, job_id)]:
                raise errors.NotFound(f"{job_id} has no checkpoint {checkpoint_id}", metadata={"job_id": job_id})
            again = self._jobs.resume if await _is_paused(conn, job_id) else self._jobs.retry
            await again(job_id, conn)

    async def prune(self, job_id: str, retention: Retention | None, *, validate_only: bool) -> Pruning:
        """The rows under the training's lock, then the files."""
        async with self._database.transaction() as conn:
            row = await conn.fetchrow(QUERIES["lock_training"], job_id)
            if row is None:
                raise errors.NotFound(f"There is no training {job_id}", metadata={"id": job_id})
            found = await checkpoints_of(conn, job_id)
            needed = kept(found, retention or Retention(**row["retention"])) | {row["finalize_id"]}
            needed |= await judged(conn, job_id)
            keep = [one for one in found if one.id in needed]
            if not validate_only:
                await conn.execute(QUERIES["drop_checkpoints"], job_id, [one.id for one in keep])
        deleted = [one for one in found if one not in keep]
        if not validate_only:
            await self.discard(one.artifact_uri for one in deleted)
        return Pruning(keep, deleted)

    async def transcoder(self, transcoder_id: str) -> Transcoder:
        """One transcoder."""
        async with self._database.connection() as conn:
            return await transcoder_of(conn, transcoder_id)

    async def transcoders(self, wanted: Filter) -> Page:
        """A page, newest first."""
        filters = (wanted.model_id, wanted.layer)
        async with self._database.connection() as conn:
            rows = await conn.fetch(
                QUERIES["transcoders"], *filters, *after(wanted.page_token), wanted.limit + 1, wanted.offset
            )
            total = await conn.fetchval(QUERIES["count_transcoders"], *filters)
        shown, token = cut(rows, wanted.limit)
        return Page(tuple(map(_transcoder, shown)), total, wanted.limit, wanted.offset, token)

    async def delete_transcoder(self, transcoder_id: str) -> None:
        """The row with the evaluations, then the files."""
        async with self._database.transaction() as conn:
            uri = (await transcoder_of(conn, transcoder_id)).artifact_uri
            derived = [row["uri"] for row in await conn.fetch(QUERIES["derived"], transcoder_id, uri)]
            await conn.execute(QUERIES["delete_transcoder"], transcoder_id)
        await self.discard([uri, *derived])

    async def queue_evaluation(self, wanted: WantedEvaluation, key: RequestKey) -> Queued:
        """Rows of the evaluation and of its job in one transaction."""
        return (await self.queue_evaluations([wanted], key))[0]

    async def queue_evaluations(self, wanted: Sequence[WantedEvaluation], key: RequestKey) -> list[Queued]:
        """All of them in one transaction, a job each."""
        async with self._database.transaction() as conn, idempotent(conn, key) as request:
            if request.answer is None:
                queued = [await self._queue_evaluation(conn, one, key) for one in wanted]
                request.answer = {"queued": [asdict(one) for one in queued]}
        return [Queued(**one) for one in request.answer["queued"]]

    async def _queue_evaluation(self, conn: asyncpg.Connection, wanted: WantedEvaluation, key: RequestKey) -> Queued:
        evaluation_id = new_id("eval")
        facts = {"transcoder_id": wanted.transcoder_id, "dataset_id": wanted.dataset_id}
        if wanted.checkpoint_id:
            facts = {"training_job_id": wanted.training_id, "checkpoint": wanted.checkpoint_id, "coder": wanted.coder}
            facts["dataset_id"] = wanted.dataset_id
            await conn.fetchrow(QUERIES["lock_training"], wanted.training_id)
            if wanted.checkpoint_id not in [one.id for one in await checkpoints_of(conn, wanted.training_id)]:
                raise errors.NotFound("The checkpoint was deleted", metadata={"id": wanted.checkpoint_id})
        job = await self._jobs.enqueue(
            conn,
            kind=SPLIT_EVALUATION_KIND if wanted.devices > 1 else EVALUATION_KIND,
            payload=facts,
            created_by=key.caller,
            resource_id=evaluation_id,
            event_prefix=EVALUATION_PREFIX,
            event_data=facts,
        )
        of = [name or None for name in (wanted.transcoder_id, wanted.training_id, wanted.checkpoint_id)]
        row = (evaluation_id, job.id, *of, wanted.dataset_id, asdict(wanted), key.caller)
        await conn.execute(QUERIES["insert_evaluation"], *row)
        return Queued(job.id, evaluation_id)

    async def evaluations_by_id(self, ids: Sequence[str]) -> list[Evaluation]:
        """Those that have ended well, in the order of the ids."""
        async with self._database.connection() as conn:
            rows = await conn.fetch(QUERIES["evaluations_by_id"], list(ids))
        return [Evaluation(**row) for row in rows]

    async def evaluations(self, wanted: Filter) -> Page:
        """A page, newest first."""
        async with self._database.connection() as conn:
            rows = await conn.fetch(
                QUERIES["evaluations"],
                wanted.transcoder_id,
                *after(wanted.page_token),
                wanted.limit + 1,
                wanted.offset,
            )
            total = await conn.fetchval(QUERIES["count_evaluations"], wanted.transcoder_id)
        shown, token = cut(rows, wanted.limit)
        return Page(tuple(Evaluation(**row) for row in shown), total, wanted.limit, wanted.offset, token)

    async def discard(self, uris: Iterable[str]) -> None:
        """Delete files that no row names any more; those that somebody reads right now are left to a later one."""
        async with self._database.connection() as conn:
            unused = await conn.fetch(QUERIES["unused"], list(uris))
        for row in unused:
            with suppress(errors.NotFound, errors.Conflict):
                await self.artifacts.delete(self._database, row["uri"])


async def transcoder_of(conn: asyncpg.Connection, transcoder_id: str) -> Transcoder:
    """One transcoder.

    Raises:
        errors.NotFound: there is none.
    """
    row = await conn.fetchrow(QUERIES["transcoder"], transcoder_id)
    if row is None:
        raise errors.NotFound(f"There is no transcoder {transcoder_id}", metadata={"id": transcoder_id})
    return _transcoder(row)


async def checkpoints_of(conn: asyncpg.Connection, job_id: str) -> list[Checkpoint]:
    """Those of a training, oldest first."""
    return [checkpoint_of(row) for row in await conn.fetch(QUERIES["checkpoints"], [job_id])]


async def judged(conn: asyncpg.Connection, job_id: str) -> set[str]:
    """Checkpoints of a training that evaluations still have to read."""
    return {row["checkpoint_id"] for row in await conn.fetch(QUERIES["judged"], job_id)}


def checkpoint_of(row: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of a row."""
    return Checkpoint(**{name: row[name] for name in _CHECKPOINT})


async def _is_paused(conn: asyncpg.Connection, job_id: str) -> bool:
    row = await conn.fetchrow(QUERIES["training"], job_id)
    return row is not None and row["state"] == "paused"


async def _trainings(conn: asyncpg.Connection, rows: Iterable[Mapping[str, Any]]) -> list[Training]:
    found = list(rows)
    ids = [row["job_id"] for row in found]
    checkpoints = await conn.fetch(QUERIES["checkpoints"], ids)
    made = await conn.fetch(QUERIES["made_by"], ids)
    return [
        Training(
            job_id=row["job_id"],
            model_id=row["model_id"],
            layers=row["layers"],
            status=row["state"],
            progress=row["progress"],
            plan=Plan.from_json(row["plan"]),
            dataset_id=row["dataset_id"],
            cache_id=row["cache_id"],
            retention=Retention(**row["retention"]),
            figures=row["detail"],
            checkpoints=[checkpoint_of(one) for one in checkpoints if one["job_id"] == row["job_id"]],
            transcoder_ids=[one["id"] for one in made if one["job_id"] == row["job_id"]],
            error_code=row["error_code"],
            error_message=row["error_message"],
            waiting_for=row["waiting_for"],
            created_by=row["created_by"],
            created_at=row["created_at"],
            finished_at=row["finished_at"],
        )
        for row in found
    ]


def _transcoder(row: Mapping[str, Any]) -> Transcoder:
    return Transcoder(**{name: row[name] for name in _TRANSCODER})
