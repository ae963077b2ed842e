"""`lensmesh …`: run a mesh on this machine, or talk to one. Heavy imports wait for the command that needs them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from services.client import catalogue, compare, extractions, train, transcoders, work
from services.client.connection import default_state
from services.client.output import Json, fail, print_json

app = typer.Typer(
    help="A service mesh for mechanistic interpretability on small GPU hosts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
migrate_app = typer.Typer(help="The database schema.", no_args_is_help=True)
app.add_typer(migrate_app, name="migrate")
app.add_typer(catalogue.models, name="models")
app.add_typer(catalogue.datasets, name="datasets")
app.add_typer(catalogue.jobs, name="jobs")
app.add_typer(transcoders.transcoders, name="transcoders")
app.add_typer(work.groups, name="groups")
work.extensions.command("compare")(compare.compare)
app.add_typer(work.extensions, name="extensions")
app.command("devices")(catalogue.list_devices)
app.command("extract")(work.extract)
app.add_typer(extractions.extractions, name="extractions")
app.add_typer(extractions.caches, name="caches")
app.add_typer(train.trainings, name="train")
app.command("evaluate")(work.evaluate)

T = TypeVar("T")
State = Annotated[Path | None, typer.Option(help="State directory; default LENSMESH_STATE_DIR or ~/.lensmesh.")]
TopologyName = Annotated[str, typer.Option(help="Name in deploy/topologies, or a path to a .toml file.")]


@app.command()
def up(
    state: State = None,
    http: Annotated[str, typer.Option(help="HOST:PORT of the gateway; port 0 takes a free one.")] = "127.0.0.1:8080",
    topology: TopologyName = "local",
    as_json: Json = False,
) -> None:
    """Run a whole mesh on this machine until Ctrl-C."""
    from services.runtime import lifeline  # noqa: PLC0415
    from services.runtime.errors import StartError  # noqa: PLC0415
    from services.runtime.mesh import Mesh  # noqa: PLC0415
    from services.runtime.ports import parse_address  # noqa: PLC0415
    from services.runtime.topology import load_topology  # noqa: PLC0415
    from services.runtime.up import up as run_mesh  # noqa: PLC0415

    lifeline.follow(grace_seconds=60.0)

    def announce(mesh: Mesh) -> None:
        if as_json:
            sys.stdout.write(mesh.to_json() + "\n")
        else:
            sys.stdout.write(f"gateway  {mesh.gateway}  (routes: {mesh.gateway}/docs)\ntoken    {mesh.token}\n")
        sys.stdout.flush()

    try:
        directory = (state or default_state()).absolute()
        given_up = asyncio.run(run_mesh(load_topology(topology), directory, parse_address(http), announce, fail))
    except StartError as error:
        fail(str(error))
        raise typer.Exit(1) from None
    if given_up:
        raise typer.Exit(1)


@app.command()
def serve(
    services: Annotated[
        list[str], typer.Argument(help="registry, residency, or any of extraction, training, extensions.")
    ],
    listen: Annotated[str, typer.Option(help="HOST:PORT of gRPC.")],
    metrics: Annotated[str, typer.Option(help="HOST:PORT of /metrics, /healthz and /readyz.")],
    device: Annotated[str, typer.Option(help="The device that this process owns: cpu or cuda:N.")] = "cpu",
    memory_limit: Annotated[str, typer.Option(help="Byte budget of the device, for example 20GiB.")] = "",
) -> None:
    """Run one process of a mesh."""
    from services.kit.errors import LensmeshError  # noqa: PLC0415
    from services.runtime import lifeline  # noqa: PLC0415
    from services.serve import serve as run_services  # noqa: PLC0415

    lifeline.follow()
    if memory_limit:
        os.environ["LENSMESH_DEVICE_MEMORY_LIMIT"] = memory_limit
    try:
        asyncio.run(run_services(services, device, listen, metrics))
    except LensmeshError as error:
        fail(f"{'+'.join(services)}: {error.message}")
        raise typer.Exit(1) from None


@app.command()
def demo(
    state: State = None,
    topology: TopologyName = "local",
    model: Annotated[str, typer.Option(help="Hub model to run on; default the small one that is shipped.")] = "",
    via: Annotated[str, typer.Option(help="http, or stubs: over gRPC with the generated stubs.")] = "http",
    as_json: Json = False,
) -> None:
    """Show the main job end to end, on a mesh of its own or on the one that runs in the state directory."""
    from services.demo.run import run_demo  # noqa: PLC0415

    raise typer.Exit(run_demo((state or default_state()).absolute(), topology, model, via, as_json=as_json))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine offers and whether a mesh can run on it."""
    from services.runtime.doctor import examine  # noqa: PLC0415

    found = examine()
    if as_json:
        print_json(found)
    else:
        for name, value in found.items():
            sys.stdout.write(f"{name:<16} {value}\n")
    if not found["ok"]:
        raise typer.Exit(1)


@app.command()
def keys(state: State = None) -> None:
    """Create the keys of a state directory where they are missing, for a mesh that `lensmesh up` does not run."""
    from services.runtime.keys import ensure_keys  # noqa: PLC0415

    directory = (state or default_state()) / "keys"
    try:
        ensure_keys(directory)
    except OSError as error:
        fail(f"{directory} cannot be written: {error.strerror}")
        raise typer.Exit(1) from None


@app.command()
def token(
    state: State = None,
    subject: Annotated[str, typer.Option(help="The user that the token names.")] = "developer",
    scope: Annotated[
        list[str] | None, typer.Option(help="model:read, model:write, model:admin; all by default.")
    ] = None,
    expires: Annotated[float, typer.Option(help="Seconds that it is valid.")] = 86_400.0,
    as_json: Json = False,
) -> None:
    """Mint a user token with the keys of a state directory."""
    from services.runtime.keys import SCOPES, mint_token  # noqa: PLC0415

    unknown = sorted(set(scope or ()) - set(SCOPES))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(SCOPES)}")
    directory = (state or default_state()) / "keys"
    try:
        made = mint_token(directory, subject=subject, scopes=scope or SCOPES, expires_seconds=expires)
    except OSError:
        fail(f"there are no keys in {directory}: run `lensmesh up` once")
        raise typer.Exit(1) from None
    if as_json:
        print_json({"token": made})
    else:
        sys.stdout.write(made + "\n")


def _on_database(action: Callable[[str], Coroutine[Any, Any, T]]) -> T:
    """Run `action` on the database of LENSMESH_DATABASE_URL, or the embedded one of the mesh that runs here."""
    from services.kit.errors import LensmeshError  # noqa: PLC0415
    from services.runtime.postgres import url_of_running  # noqa: PLC0415

    url = os.environ.get("LENSMESH_DATABASE_URL") or url_of_running(default_state())
    if url is None:
        fail(f"no database: set LENSMESH_DATABASE_URL, or run `lensmesh up` on {default_state()}")
        raise typer.Exit(1)
    try:
        return asyncio.run(action(url))
    except LensmeshError as error:
        fail(error.message)
        raise typer.Exit(1) from None


@migrate_app.command("up")
def migrate_up() -> None:
    """Bring the schema to this build's newest revision."""
    from services.kit import migrate  # noqa: PLC0415

    _on_database(migrate.upgrade)


@migrate_app.command("down")
def migrate_down(
    revision: Annotated[str, typer.Argument(help="Revision to go back to; `base` drops everything.")],
) -> None:
    """Bring the schema back to an older revision; data of dropped tables is lost."""
    from services.kit import migrate  # noqa: PLC0415

    _on_database(lambda url: migrate.downgrade(url, revision))


@migrate_app.command("status")
def migrate_status(as_json: Json = False) -> None:
    """Say at which revision the schema is; fails unless it is the newest."""
    from services.kit import migrate  # noqa: PLC0415

    found, needed = _on_database(migrate.current), migrate.head()
    if as_json:
        print_json({"revision": found, "head": needed})
    else:
        sys.stdout.write(f"revision {found}, this build needs {needed}\n")
    if found != needed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `lensmesh` program."""
    app()


if __name__ == "__main__":
    main()
