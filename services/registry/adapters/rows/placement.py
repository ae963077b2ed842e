"""The tables `hosts`, `residencies`, `reservations` and `fingerprints`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import asyncpg

from services.kit.database import load_queries
from services.kit.errors import NotFound, Unavailable
from services.registry.adapters.rows import columns
from services.registry.domain import HeldLens, Host, HostedModel, Residency

_QUERIES = load_queries(__file__, "placement.sql")


class PostgresPlacement:
    """Implements PlacementRows on one connection in a transaction."""

    def __init__(self, conn: asyncpg.Connection) -> None:
        self._conn = conn

    async def register(self, facts: Mapping[str, Any]) -> str | None:
        """Write a host down; its former incarnation."""
        names = ["host_id", "incarnation", "address", "device", "kind"]
        names += ["total_bytes", "budget_bytes", "park_bytes", "accelerator", "services"]
        return await self._conn.fetchval(_QUERIES["register"], *(facts[name] for name in names))

    async def drop_reservations(self, host_id: str) -> None:
        """Forget what was reserved on a host."""
        await self._conn.execute(_QUERIES["drop_reservations"], host_id)

    async def heartbeat(self, host_id: str, incarnation: str, **values: Any) -> bool:
        """Write a sign of life down."""
        names = ("measured_bytes", "temperature_celsius", "utilization_ratio", "power_watts")
        figures = (values[name] for name in (*names, "device_used_bytes", "process_bytes"))
        return await self._conn.fetchval(_QUERIES["heartbeat"], host_id, incarnation, *figures) is not None

    async def hosts(self, *, lock: bool = False) -> list[Host]:
        """Live hosts with ledgers and residents."""
        if lock:
            await self._conn.fetch(_QUERIES["lock_hosts"])
        return await self._filled(await self._conn.fetch(_QUERIES["hosts"]))

    async def all_hosts(self) -> list[Host]:
        """Lost ones too."""
        return await self._filled(await self._conn.fetch(_QUERIES["all_hosts"]))

    async def lock_host(self, host_id: str) -> Host:
        """One host with its ledger, locked."""
        await self._conn.fetch(_QUERIES["lock_host"], host_id)
        rows = await self._conn.fetch(_QUERIES["host"], host_id)
        if not rows:
            raise NotFound(f"There is no host {host_id}", metadata={"host_id": host_id})
        host = next(host for host in await self._filled(rows) if host.host_id == host_id)
        if host.lost:
            raise Unavailable(
                f"Host {host_id} does not answer", reason="NO_HOST", metadata={"host_id": host_id}, retry_after=5.0
            )
        return host

    async def silent(self, seconds: float) -> list[str]:
        """Hosts that were not heard for that long."""
        return [row["host_id"] for row in await self._conn.fetch(_QUERIES["silent"], seconds)]

    async def lose(self, host_id: str) -> list[Residency]:
        """Mark a host as lost; what was on it."""
        await self._conn.execute(_QUERIES["lose"], host_id)
        await self.drop_reservations(host_id)
        return await self.of_host(host_id)

    async def of_model(self, model_id: str) -> list[Residency]:
        """Where a model is, the copy that serves first."""
        return await self._residencies(model_id=model_id)

    async def of_host(self, host_id: str) -> list[Residency]:
        """Everything that the rows say is in a host process."""
        return await self._residencies(host_id=host_id)

    async def of_job(self, job_id: str) -> list[Residency]:
        """What a load holds."""
        return await self._residencies(job_id=job_id)

    async def forget_ended_preloads(self) -> None:
        """What nobody brings to host memory any more."""
        await self._conn.execute(_QUERIES["forget_ended_preloads"])

    async def revert_unloads(self) -> None:
        """Unloads that nobody finishes any more."""
        await self._conn.execute(_QUERIES["revert_unloads"])

    async def put(self, model_id: str, host_id: str, **values: Any) -> None:
        """Write a residency."""
        row = {"model_id": model_id, "host_id": host_id, **values}
        await columns.put(self._conn, "residencies", ["model_id", "host_id"], row)

    async def change(self, model_id: str, host_id: str, **values: Any) -> None:
        """Set columns of a residency."""
        await columns.update(self._conn, "residencies", {"model_id": model_id, "host_id": host_id}, values)

    async def arrived(self, model_id: str, host_id: str) -> datetime:
        """The copy is resident from now on."""
        return await self._conn.fetchval(_QUERIES["arrived"], model_id, host_id)

    async def touch(self, model_id: str, host_id: str) -> None:
        """The copy is used now."""
        await self._conn.execute(_QUERIES["touch"], model_id, host_id)

    async def use(self, host_id: str, seen: Sequence[HostedModel]) -> None:
        """Leases, last use and active lens, as the host reports them."""
        reported = (
            [model.model_id for model in seen],
            [model.leases for model in seen],
            [model.active_lens_id or "" for model in seen],
            [max(0.0, model.idle_seconds) for model in seen],
        )
        await self._conn.execute(_QUERIES["use"], host_id, *reported)
        held = [pair for model in seen for pair in model.lenses.items()]
        lenses = [(lens_id, lens.leases, max(0.0, lens.idle_seconds)) for lens_id, lens in held]
        if lenses:
            await self._conn.execute(_QUERIES["use_lenses"], host_id, *map(list, zip(*lenses, strict=True)))

    async def touch_lenses(self, host_id: str, lens_ids: Sequence[str]) -> None:
        """Lenses are used now."""
        await self._conn.execute(_QUERIES["touch_lenses"], host_id, list(lens_ids))

    async def lens_leaves(self, host_id: str, lens_id: str, job_id: str | None, *, parked: bool) -> None:
        """A lens makes room from now on."""
        await self._conn.execute(_QUERIES["lens_leaves"], host_id, lens_id, job_id, parked)

    async def lens_stays(self, host_id: str, lens_id: str, leases: int | None = None) -> None:
        """A lens stays after all."""
        await self._conn.execute(_QUERIES["lens_stays"], host_id, lens_id, leases)

    async def lenses_stay(self, job_id: str) -> None:
        """The lenses of a load stay."""
        await self._conn.execute(_QUERIES["lenses_stay"], job_id)

    async def charge(self, job_id: str, host_id: str, size: int) -> None:
        """A load holds so many bytes more."""
        await self._conn.execute(_QUERIES["charge"], job_id, host_id, size)

    async def remove(self, model_id: str, host_id: str) -> bool:
        """Forget a residency."""
        return await self._conn.fetchval(_QUERIES["remove"], model_id, host_id) is not None

    async def reserve(self, host_id: str, owner: str, size: int, *, holder_id: str) -> None:
        """Write a reservation."""
        row = {"host_id": host_id, "owner": owner, "bytes": size, "holder_id": holder_id}
        await columns.put(self._conn, "reservations", ["host_id", "owner"], row)

    async def gain(self, host_id: str, owner: str, size: int, most: int) -> None:
        """More of a reservation."""
        await self._conn.execute(_QUERIES["gain"], host_id, owner, size, most)

    async def release(self, holder_id: str, owner: str) -> None:
        """Forget what was reserved."""
        await self._conn.execute(_QUERIES["release"], holder_id, owner)

    async def fingerprint(self, model_id: str, host_id: str, quantization: str, incarnation: str) -> str:
        """What the forward gave in this life of the host; empty when unknown."""
        found = await self._conn.fetchval(_QUERIES["fingerprint"], model_id, host_id, quantization, incarnation)
        return found or ""

    async def keep_fingerprint(
        self, model_id: str, host_id: str, quantization: str, incarnation: str, fingerprint: str
    ) -> None:
        """Remember it."""
        row = {
            "model_id": model_id,
            "host_id": host_id,
            "quantization": quantization,
            "incarnation": incarnation,
            "fingerprint": fingerprint,
        }
        await columns.put(self._conn, "fingerprints", ["model_id", "host_id", "quantization"], row)

    async def _residencies(
        self, *, host_id: str | None = None, model_id: str | None = None, job_id: str | None = None
    ) -> list[Residency]:
        rows = await self._conn.fetch(_QUERIES["residencies"], host_id, model_id, job_id)
        return [_residency(row) for row in rows]

    async def _filled(self, rows: Sequence[asyncpg.Record]) -> list[Host]:
        residents: dict[str, list[Residency]] = defaultdict(list)
        for residency in await self._residencies():
            residents[residency.host_id].append(residency)
        devices: dict[tuple[str, ...], list[Host]] = defaultdict(list)
        hosts = []
        for row in rows:
            facts = {**row, "services": tuple(row["services"])}
            host = columns.build(Host, facts, residents=tuple(residents[row["host_id"]]))
            hosts.append((host, devices[row["machine"], row["device"], row["accelerator"]]))
            hosts[-1][1].append(host)
        return [
            replace(host, siblings=tuple(other for other in device if other is not host and not other.lost))
            for host, device in hosts
        ]


def _residency(row: asyncpg.Record) -> Residency:
    lenses = tuple(HeldLens(*held) for held in row["lenses"])
    ids = {name: tuple(row[name]) for name in ("needed_by", "reads")}
    return columns.build(Residency, {**row, "lenses": lenses, **ids})
