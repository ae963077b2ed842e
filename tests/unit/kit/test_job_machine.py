"""The job table against a model in plain Python: random claims, crashes, stops and late writers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from services.kit import errors
from services.kit.database import Database
from services.kit.jobs import Claim, JobStore, StaleLease
from services.kit.jobs import transitions as t
from tests.unit.kit.jobs_support import enqueue, lapse

LIMIT = 2


@dataclass
class Expected:
    """What the row of one job must say."""

    state: str = "queued"
    fence: int = 0
    attempt: int = 0
    lapsed: bool = False
    cancel: bool = False
    pause: bool = False
    published: int = 0

    @property
    def leased(self) -> bool:
        return self.state == "running"

    def leave(self, state: str, attempt: int | None = None) -> None:
        self.state, self.lapsed, self.cancel, self.pause = state, False, state == "cancelled" and self.cancel, False
        self.attempt = self.attempt if attempt is None else attempt


class JobMachine(RuleBasedStateMachine):
    """Rules are what people, workers and crashes do; a claim may be used long after it was lost."""

    dsn: str

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.database = self._run(Database.open(self.dsn, 1, 2))
        self.store = JobStore(self.database, backoff_seconds=0)
        self._run(self.database.pool.execute("TRUNCATE jobs, events, event_streams"))
        self.jobs: dict[str, Expected] = {}
        self.claims: list[Claim] = []

    def teardown(self) -> None:
        self._run(self.database.close())
        self.loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @precondition(lambda self: len(self.jobs) < 4)
    @rule()
    def queue(self) -> None:
        self.jobs[self._run(enqueue(self.store)).id] = Expected()

    @rule(owner=st.sampled_from(["w1", "w2"]))
    def claim(self, owner: str) -> None:
        job, _ = self._run(self.store.claim(["count"], "cpu", owner, {"count": LIMIT}))
        waiting = [expected for expected in self.jobs.values() if expected.state == "queued"]
        full = sum(expected.leased for expected in self.jobs.values()) >= LIMIT
        assert (job is not None) == (bool(waiting) and not full)
        if job is not None:
            expected = self.jobs[job.id]
            assert expected.state == "queued"
            expected.state, expected.fence, expected.attempt = "running", expected.fence + 1, expected.attempt + 1
            self.claims.append(Claim(self.store, job))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def worker_freezes(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(list(self.jobs)))
        if self.jobs[job_id].leased:
            self._run(lapse(self.database, job_id))
            self.jobs[job_id].lapsed = True

    @rule()
    def reap(self) -> None:
        lapsed = [expected for expected in self.jobs.values() if expected.lapsed]
        assert self._run(self.store.reap()) == len(lapsed)
        for expected in lapsed:
            if expected.cancel:
                expected.leave("cancelled")
            elif expected.pause:
                expected.leave("paused")
            else:
                expected.leave("queued" if expected.attempt < self.store.max_attempts else "failed")

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), end=st.sampled_from(["", "complete", "fail", "transient", "give back"]))
    def write(self, data: st.DataObject, end: str) -> None:
        claim = data.draw(st.sampled_from(self.claims))
        expected = self.jobs[claim.job.id]
        current = expected.leased and not expected.lapsed and claim.fence == expected.fence
        try:
            self._run(self._publish(claim, end))
        except StaleLease:
            assert not current
            return
        assert current
        expected.published += 1
        if end == "complete":
            expected.leave("completed")
        elif end == "fail":
            expected.leave("failed")
        elif end == "transient":
            expected.leave("queued" if expected.attempt < self.store.max_attempts else "failed")
        elif end == "give back":
            expected.leave("queued", expected.attempt - 1)

    async def _publish(self, claim: Claim, end: str) -> None:
        if not end:
            await claim.progress(50, {}, "job:progress")
            return
        async with claim.locked() as (conn, job):
            await t.tell(conn, job, "progress")
            if end == "complete":
                await t.complete(conn, job, {}, {})
            elif end == "fail":
                await t.fail(conn, job, "INTERNAL", "broken", {})
            elif end == "transient":
                await self.store.retry_or_fail(conn, job, "UNAVAILABLE", "away")
            else:
                await t.again(conn, job, "queued", attempt=job.attempt - 1)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), verb=st.sampled_from(["request_cancel", "request_pause", "resume", "retry"]))
    def ask(self, data: st.DataObject, verb: str) -> None:
        job_id = data.draw(st.sampled_from(list(self.jobs)))
        expected = self.jobs[job_id]
        try:
            self._run(getattr(self.store, verb)(job_id))
        except errors.Conflict:
            assert not self._allowed(expected, verb)
            return
        assert self._allowed(expected, verb)
        match verb, expected.state:
            case "request_cancel", "running":
                expected.cancel = True
            case "request_cancel", "queued" | "paused":
                expected.leave("cancelled")
            case "request_pause", "running":
                expected.pause = True
            case "request_pause", "queued":
                expected.leave("paused")
            case "resume", "running":
                expected.pause = False
            case "resume" | "retry", _:
                expected.leave("queued", 0)

    def _allowed(self, expected: Expected, verb: str) -> bool:
        if verb == "resume" and expected.state == "running":
            return expected.pause
        states = {
            "request_cancel": {"queued", "running", "paused", "cancelled"},
            "request_pause": {"queued", "running", "paused"},
            "resume": {"paused"},
            "retry": {"failed", "cancelled"},
        }
        return expected.state in states[verb]

    @invariant()
    def rows_say_what_happened(self) -> None:
        rows = self._run(self.database.pool.fetch("SELECT * FROM jobs"))
        assert len(rows) == len(self.jobs)
        for row in rows:
            expected = self.jobs[row["id"]]
            assert (row["state"], row["fence"], row["attempt"]) == (expected.state, expected.fence, expected.attempt)
            assert (row["cancel_requested"], row["pause_requested"]) == (expected.cancel, expected.pause)

    @invariant()
    def events_are_contiguous_and_count_every_publication(self) -> None:
        for job_id, expected in self.jobs.items():
            rows = self._run(
                self.database.pool.fetch("SELECT * FROM events WHERE resource_id = $1 ORDER BY id", job_id)
            )
            assert [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))
            told = [row["event"] for row in rows]
            assert told.count("job:progress") == expected.published
            assert told.count("job:started") == expected.fence


@pytest.mark.timeout(300)
def test_the_job_table_follows_its_model(database_url: str) -> None:
    class Machine(JobMachine):
        dsn = database_url

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=20, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
