"""How commands print: tables for people, one JSON value for programs, one line and a non-zero exit for failures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from services.client.api import ApiError
from services.client.connection import connect
from services.client.http import HttpApi

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else on standard output.")]


class Session:
    """A connection and a way to print, for one command."""

    def __init__(self, api: HttpApi, as_json: bool) -> None:
        self.api = api
        self.console = Console(stderr=True, quiet=as_json)
        """For progress bars and remarks."""
        self._as_json = as_json

    def show(self, value: dict[str, Any]) -> None:
        """Print one resource."""
        if self._as_json:
            print_json(value)
            return
        table = Table(Column(no_wrap=True), Column(overflow="fold"), show_header=False, box=None)
        for name, item in value.items():
            table.add_row(f"[bold]{name}[/bold]", _cell(item))
        Console().print(table)

    def rows(self, reply: dict[str, Any], key: str, *columns: str) -> None:
        """Print a list reply: the whole of it as JSON, or a table of some columns."""
        if self._as_json:
            print_json(reply)
            return
        # Folded, never cut off: an id is there to be copied.
        table = Table(*(Column(name, overflow="fold", no_wrap=name == "id") for name in columns))
        for row in reply[key]:
            table.add_row(*(_cell(row.get(column, "")) for column in columns))
        Console().print(table)


@contextmanager
def session(as_json: bool) -> Iterator[Session]:
    """Connect, and turn a refusal into one line and exit status 1."""
    try:
        api = connect()
        try:
            yield Session(api, as_json)
        finally:
            api.close()
    except ApiError as error:
        if as_json:
            print_json({"error": {"code": error.code, "message": error.message, "details": error.details}})
        else:
            fail(str(error))
        raise typer.Exit(1) from None


def print_json(value: object) -> None:
    """One JSON value as one line on standard output."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def fail(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"lensmesh: {message}\n")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict | list):
        return json.dumps(value)
    return str(value)
