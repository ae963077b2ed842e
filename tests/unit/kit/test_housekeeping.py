from __future__ import annotations

from pathlib import Path

from services.kit import audit
from services.kit.artifacts import ArtifactStore
from services.kit.auth import Caller
from services.kit.database import Database
from services.kit.housekeeping import tidy


async def test_rows_past_their_retention_go_and_younger_ones_stay(database: Database, tmp_path: Path) -> None:
    for subject in ("old", "young"):
        await audit.record(database, Caller(subject=subject), "/m", "", "OK")
    await database.pool.execute("UPDATE audit_log SET at = now() - interval '91 days' WHERE caller = 'old'")
    await tidy(database, ArtifactStore(tmp_path))
    assert [row["caller"] for row in await database.pool.fetch("SELECT caller FROM audit_log")] == ["young"]
