"""PostgreSQL: one pool per process, named queries, and driver errors in our own words."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import asyncpg

from services.kit import errors

COMMAND_TIMEOUT_SECONDS = 60.0
CONNECT_TIMEOUT_SECONDS = 10.0

_CONNECTION_LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.OperatorInterventionError,  # shutdown, pg_terminate_backend, statement timeout
    asyncpg.InsufficientResourcesError,
    asyncpg.InternalClientError,  # asyncpg's own confusion when a backend ends between two of its messages
    asyncpg.TransactionRollbackError,  # deadlock or serialization failure: the same call may succeed next time
    ConnectionError,
    TimeoutError,
)
_CLOSED = re.compile(r"\bclos(ed|ing)\b")


class _Connection(asyncpg.Connection):
    """One of a pool's, which nobody leaves anything behind in: LISTEN and session locks have `dedicated` ones."""

    def get_reset_query(self) -> str:
        """No round trip when it goes back; an open transaction is rolled back all the same."""
        return ""


class Database:
    """A pool of connections that read and write jsonb as Python objects.

    `open` it in the composition root and `close` it when the process ends.
    """

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._pool: asyncpg.Pool | None = None

    @classmethod
    async def open(cls, dsn: str, min_size: int = 1, max_size: int = 5) -> Database:
        """Connect.

        Raises:
            errors.Unavailable: nothing answers at `dsn`.
        """
        database = cls(dsn)
        with translated_errors(), _unreachable():
            database._pool = await asyncpg.create_pool(
                dsn,
                min_size=min_size,
                max_size=max_size,
                init=_prepare,
                connection_class=_Connection,
                command_timeout=COMMAND_TIMEOUT_SECONDS,
                timeout=CONNECT_TIMEOUT_SECONDS,
            )
        return database

    @property
    def pool(self) -> asyncpg.Pool:
        """The open pool."""
        assert self._pool is not None, "Database.open was not awaited"
        return self._pool

    async def ping(self) -> None:
        """Make one round trip.

        Raises:
            errors.Unavailable: the database does not answer.
        """
        async with self.connection() as conn:
            await conn.fetchval("SELECT 1")

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """A pooled connection outside of a transaction; driver errors are translated."""
        with translated_errors():
            with _unreachable():
                conn = await self.pool.acquire(timeout=CONNECT_TIMEOUT_SECONDS)
            try:
                yield conn
            finally:
                await self.pool.release(conn)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[asyncpg.Connection]:
        """A pooled connection in a READ COMMITTED transaction; driver errors are translated."""
        async with self.connection() as conn, conn.transaction():
            yield conn

    @asynccontextmanager
    async def dedicated(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection beside the pool, for LISTEN, session locks and whatever must not wait for the pool."""
        with translated_errors():
            with _unreachable():
                conn = await asyncpg.connect(
                    self.dsn, command_timeout=COMMAND_TIMEOUT_SECONDS, timeout=CONNECT_TIMEOUT_SECONDS
                )
            try:
                await _prepare(conn)
                yield conn
            finally:
                # A backend that no longer answers must not hold its caller: terminate drops the socket.
                conn.terminate()

    async def close(self) -> None:
        """Close the pool; connections still in use are dropped after 5 s."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            try:
                async with asyncio.timeout(5.0):
                    await pool.close()
            except TimeoutError:
                pool.terminate()


def load_queries(package_file: str, name: str = "queries.sql") -> dict[str, str]:
    """Named SQL statements of the file `name` beside `package_file` (a caller passes its `__file__`).

    A statement starts with a line `-- its_name --` and ends at the next one.

    Raises:
        ValueError: a name stands twice.
    """
    text = (Path(package_file).parent / name).read_text(encoding="utf-8")
    blocks = re.split(r"^-- (\w+) --$", text, flags=re.MULTILINE)
    queries: dict[str, str] = {}
    for title, body in zip(blocks[1::2], blocks[2::2], strict=True):
        if title in queries:
            raise ValueError(f"{name}: query {title} is defined twice")
        queries[title] = body.strip()
    return queries


@contextmanager
def translated_errors() -> Iterator[None]:
    """Driver errors become ours: the adapter's edge.

    Raises:
        errors.Unavailable: `DATABASE_UNAVAILABLE`, transient: the connection is lost, refused or out of resources.
        errors.AlreadyExists: a unique value is taken; metadata names the constraint.
        errors.Conflict: `IN_USE`: other rows refer to this one, or the row that this one refers to is gone.
    """
    try:
        yield
    except asyncpg.UniqueViolationError as error:
        raise errors.AlreadyExists(metadata={"constraint": error.constraint_name or ""}) from error
    except asyncpg.ForeignKeyViolationError as error:
        raise errors.Conflict(
            "Another resource refers to this one, or one that it refers to is gone",
            reason="IN_USE",
            metadata={"constraint": error.constraint_name or ""},
        ) from error
    except _CONNECTION_LOST as error:
        raise _unavailable() from error
    except asyncpg.InterfaceError as error:
        if _CLOSED.search(str(error)) is None:  # a wrong argument or an overlapping call is a bug, not an outage
            raise
        raise _unavailable() from error


@contextmanager
def _unreachable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unavailable() from error


def _unavailable() -> errors.Unavailable:
    return errors.Unavailable(
        "The database does not answer", reason="DATABASE_UNAVAILABLE", retry_after=1.0, transient=True
    )


async def _prepare(conn: asyncpg.Connection) -> None:
    for name in ("json", "jsonb"):
        await conn.set_type_codec(name, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
