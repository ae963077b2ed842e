"""Fixtures that every test may use: a real database, freshly migrated, and a real broker."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest
import structlog

from services.kit import migrate
from services.kit.database import Database
from tests import support

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def plain_logs() -> None:
    """structlog's default prints every local of a traceback, which takes seconds where tensors are among them."""
    processors = (structlog.processors.add_log_level, structlog.processors.format_exc_info)
    structlog.configure(processors=[*processors, structlog.processors.JSONRenderer()])


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Connection string of the session's PostgreSQL, with `{}` for the database's name."""
    with support.postgres_server() as dsn:
        yield dsn


@pytest.fixture(scope="session")
def migrated_template(postgres: str) -> str:
    support.run_async(support.execute(postgres.format("postgres"), "CREATE DATABASE migrated"))
    support.run_async(migrate.upgrade(postgres.format("migrated"), "head"))
    return "migrated"


@pytest.fixture
def empty_database_url(postgres: str) -> Iterator[str]:
    """A database without any table."""
    yield from _own_database(postgres, "template1")


@pytest.fixture
def database_url(postgres: str, migrated_template: str) -> Iterator[str]:
    """A database of this test's own, at the newest revision."""
    yield from _own_database(postgres, migrated_template)


def _own_database(postgres: str, template: str) -> Iterator[str]:
    name, admin = f"test_{next(_NUMBERS)}", postgres.format("postgres")
    support.run_async(support.execute(admin, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy"))
    yield postgres.format(name)
    support.run_async(support.execute(admin, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = await Database.open(database_url, min_size=1, max_size=8)
    yield database
    await database.close()


@pytest.fixture(scope="session")
def _nats_session() -> Iterator[support.NatsServer]:
    with support.nats_server() as server:
        yield server


@pytest.fixture(scope="session")
def nats_url(_nats_session: support.NatsServer) -> str:
    """The session's broker with JetStream; tests that stop a broker take `own_nats`."""
    return _nats_session.url


@pytest.fixture
def own_nats() -> Iterator[support.NatsServer]:
    """A broker of this test's own, to stop, wipe and start again."""
    with support.nats_server() as server:
        yield server
