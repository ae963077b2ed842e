"""What alembic runs for each command: one transaction on the connection that `services.kit.migrate` opened."""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

MIGRATION_LOCK = 0x6C656E73  # any number, the same in every build: it makes concurrent migrations take turns


def run() -> None:
    """Run the requested revisions."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, transactional_ddl=True)
    with context.begin_transaction():
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        context.run_migrations()


run()
