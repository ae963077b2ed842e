"""The database schema: alembic revisions under `migrations/`, run up and down by `lensmesh migrate` and at start-up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
from alembic import command, op
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from services.kit import errors
from services.kit.database import CONNECT_TIMEOUT_SECONDS, Database, translated_errors

_SCRIPTS = Path(__file__).parent / "migrations"


def head() -> str:
    """The newest revision that this build knows."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


async def upgrade(dsn: str, revision: str = "head") -> None:
    """Bring the schema up to `revision`; processes take turns, and one process makes one call at a time.

    Raises:
        errors.Unavailable: nothing answers at `dsn`.
    """
    await _run(dsn, lambda config: command.upgrade(config, revision))


async def downgrade(dsn: str, revision: str) -> None:
    """Bring the schema down to `revision` (`base` is the empty schema); data of dropped tables is lost.

    Raises:
        errors.Unavailable: nothing answers at `dsn`.
    """
    await _run(dsn, lambda config: command.downgrade(config, revision))


async def current(dsn: str) -> str | None:
    """The schema's revision, None for an empty database.

    Raises:
        errors.Unavailable: nothing answers at `dsn`.
    """
    found: list[str | None] = []
    await _connected(dsn, lambda conn: found.append(MigrationContext.configure(conn).get_current_revision()))
    return found[0]


async def require_head(database: Database) -> None:
    """Check that the schema is the one this build was written for; services do this at start and for readiness.

    Raises:
        errors.Unavailable: `DATABASE_UNAVAILABLE`: another revision (metadata has both), or no answer at all.
    """
    found = await current(database.dsn)
    if found != head():
        raise errors.Unavailable(
            f"The database schema is at {found or 'no revision'}, this build needs {head()}: run `lensmesh migrate up`",
            reason="DATABASE_UNAVAILABLE",
            metadata={"found": found or "", "needed": head()},
        )


def run_script(sql: str) -> None:
    """Execute several SQL statements inside the running revision's transaction (for `upgrade` and `downgrade` only)."""
    connection = op.get_bind().connection.dbapi_connection
    assert connection is not None
    connection.run_async(lambda driver: driver.execute(sql))


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connection"] = connection
    return config


async def _run(dsn: str, action: Callable[[Config], None]) -> None:
    await _connected(dsn, lambda conn: action(_config(conn)))


async def _connected(dsn: str, action: Callable[[Connection], Any]) -> None:
    async def connect() -> asyncpg.Connection:
        try:
            return await asyncpg.connect(dsn, timeout=CONNECT_TIMEOUT_SECONDS)
        except OSError as error:
            raise errors.Unavailable("The database does not answer", reason="DATABASE_UNAVAILABLE") from error

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        with translated_errors():
            async with engine.begin() as conn:
                await conn.run_sync(action)
    finally:
        await engine.dispose()
