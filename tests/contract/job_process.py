"""A worker in a process of its own, for tests that kill or stop it: `python -m … DSN NAME LEASE_SECONDS`.

Its job publishes ten steps, each in one fenced transaction, and goes on after the last one that is published. In the
first attempt it stays before step 5 until a line comes on standard input. It prints what it does.
"""

from __future__ import annotations

import asyncio
import sys

from services.kit import logs
from services.kit.database import Database
from services.kit.jobs import Claim, JobStore, StaleLease, Worker

STEPS = 10
TABLE = "CREATE TABLE publications (job_id text, step integer, fence bigint, PRIMARY KEY (job_id, step))"


async def publish_steps(claim: Claim, database: Database, name: str) -> dict[str, int]:
    last = await database.pool.fetchval("SELECT max(step) FROM publications WHERE job_id = $1", claim.job.id)
    start = 1 if last is None else last + 1
    for step in range(start, STEPS + 1):
        if step == 5 and claim.job.attempt == 1:
            _say("halfway")
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        try:
            async with claim.commit() as conn:
                await conn.execute("INSERT INTO publications VALUES ($1, $2, $3)", claim.job.id, step, claim.fence)
        except StaleLease:
            _say("stale")
            raise
        await claim.progress(100 * step / STEPS, {"step": step}, "job:progress", {"worker": name})
    return {"started_at_step": start}


def _say(what: str) -> None:
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


async def main(dsn: str, name: str, lease_seconds: float) -> None:
    logs.configure("job-process", "WARNING")
    database = await Database.open(dsn, min_size=1, max_size=3)
    store = JobStore(database, lease_seconds=lease_seconds, backoff_seconds=0.01)
    handlers = {"steps": lambda claim: publish_steps(claim, database, name)}
    await Worker(store, handlers, device="cpu", incarnation=name, limits={}, slots=1).run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
