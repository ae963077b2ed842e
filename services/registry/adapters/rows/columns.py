"""Rows to dataclasses, and SQL for a set of columns chosen by code (never by a request)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import asyncpg

T = TypeVar("T")


def build(cls: type[T], row: Mapping[str, Any], **more: Any) -> T:
    """A dataclass from the columns of the same names; the others are ignored."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in row.items() if name in known}, **more)


async def insert(conn: asyncpg.Connection, table: str, row: Mapping[str, Any]) -> asyncpg.Record:
    """Add a row; the whole row as it is then."""
    names, places = ", ".join(row), ", ".join(f"${n}" for n in range(1, len(row) + 1))
    sql = f"INSERT INTO {table} ({names}) VALUES ({places}) RETURNING *"  # noqa: S608 - names stand in our code
    return await conn.fetchrow(sql, *row.values())


async def put(conn: asyncpg.Connection, table: str, key: Iterable[str], row: Mapping[str, Any]) -> None:
    """Add a row, or replace the given columns of the one with the same key."""
    names, places = ", ".join(row), ", ".join(f"${n}" for n in range(1, len(row) + 1))
    changes = ", ".join(f"{name} = excluded.{name}" for name in row)
    target = ", ".join(key)
    await conn.execute(
        f"INSERT INTO {table} ({names}) VALUES ({places}) ON CONFLICT ({target}) DO UPDATE SET {changes}",  # noqa: S608
        *row.values(),
    )


async def update(
    conn: asyncpg.Connection, table: str, key: Mapping[str, Any], columns: Mapping[str, Any]
) -> asyncpg.Record | None:
    """Set columns of the row with this key; the row then, None when there is none."""
    changes = ", ".join(f"{name} = ${n}" for n, name in enumerate(columns, 1))
    where = " AND ".join(f"{name} = ${n}" for n, name in enumerate(key, len(columns) + 1))
    sql = f"UPDATE {table} SET {changes} WHERE {where} RETURNING *"  # noqa: S608 - names stand in our code
    return await conn.fetchrow(sql, *columns.values(), *key.values())
