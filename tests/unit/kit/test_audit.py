from __future__ import annotations

import asyncio

from services.kit import audit, trace
from services.kit.auth import Caller
from services.kit.database import Database


async def test_a_row_says_who_did_what_in_which_trace(database: Database) -> None:
    trace.begin(None, None)
    await audit.AuditLog(database).record(
        Caller("ada"), "/lensmesh.registry.v1.ModelService/DeleteModel", "m_1", "IN_USE"
    )
    row = await database.pool.fetchrow("SELECT * FROM audit_log")
    assert (row["caller"], row["resource"], row["outcome"]) == ("ada", "m_1", "IN_USE")
    assert row["method"] == "/lensmesh.registry.v1.ModelService/DeleteModel"
    assert row["trace"] == trace.current_trace()


async def test_rows_are_kept_for_ninety_days(database: Database) -> None:
    log = audit.AuditLog(database)
    await asyncio.gather(*(log.record(Caller("ada"), "m", str(n), "OK") for n in range(3)))
    await database.pool.execute("UPDATE audit_log SET at = at - interval '89 days' WHERE resource = '1'")
    await database.pool.execute("UPDATE audit_log SET at = at - interval '91 days' WHERE resource = '2'")
    async with database.connection() as conn:
        assert await audit.purge(conn) == 1
    assert {row[0] for row in await database.pool.fetch("SELECT resource FROM audit_log")} == {"0", "1"}
