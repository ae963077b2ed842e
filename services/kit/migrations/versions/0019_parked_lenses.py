"""Lenses that are parked in host memory alone, while their base stays where it is."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0019_parked_lenses"
down_revision = "0014c_extraction_hosts"

_HERE = "b.state IN ('resident', 'unloading', 'parking')"
_ALONE = "c.state IN ('parked', 'dropping')"


def _view(used: str, parked: str) -> str:
    """`hosts_counted`; a process's lenses count by these conditions on their base `b` and the lens `c`."""
    return f"""
CREATE OR REPLACE VIEW hosts_counted AS
WITH counted AS (
    SELECT h.*, h.host_id || '/' || h.device AS name,
           coalesce(r.used, 0) + coalesce(l.used, 0) AS used_bytes,
           coalesce(r.loading, 0) + coalesce(v.reserved, 0) AS reserved_bytes,
           coalesce(r.parked, 0) + coalesce(l.parked, 0) AS parked_bytes,
           extract(epoch FROM clock_timestamp() - h.heartbeat_at)::float8 AS silent_seconds
    FROM hosts h
    LEFT JOIN LATERAL (
        SELECT sum(charge_bytes) FILTER (WHERE state IN ('resident', 'unloading', 'parking'))::bigint AS used,
               sum(charge_bytes) FILTER (WHERE state = 'loading')::bigint AS loading,
               sum(charge_bytes) FILTER (WHERE state = 'parked')::bigint AS parked
        FROM residencies WHERE host_id = h.host_id
    ) r ON true
    LEFT JOIN LATERAL (
        SELECT sum(c.charge_bytes) FILTER (WHERE {used})::bigint AS used,
               sum(c.charge_bytes) FILTER (WHERE {parked})::bigint AS parked
        FROM lens_residencies c JOIN residencies b USING (model_id, host_id) WHERE c.host_id = h.host_id
    ) l ON true
    LEFT JOIN LATERAL (SELECT sum(bytes)::bigint AS reserved FROM reservations WHERE host_id = h.host_id) v ON true
),
shared AS (
    SELECT machine, device, accelerator, sum(used_bytes + reserved_bytes) AS held,
           least(sum(budget_bytes), greatest(max(budget_bytes), 0.8 * max(total_bytes))) AS budget,
           max(total_bytes) AS total, greatest(0, max(device_used_bytes) - sum(process_bytes)) AS external
    FROM counted WHERE NOT lost GROUP BY machine, device, accelerator
)
SELECT c.*, coalesce(s.external, 0)::bigint AS external_bytes,
       (least(s.budget, s.total - coalesce(s.external, 0)) - s.held + c.used_bytes + c.reserved_bytes)::bigint
       AS cap_bytes
FROM counted c LEFT JOIN shared s
ON NOT c.lost AND s.machine = c.machine AND s.device = c.device AND s.accelerator = c.accelerator;
"""  # noqa: S608 - our own text


_UP = f"""
ALTER TABLE lens_residencies DROP CONSTRAINT lens_residencies_state_check;
ALTER TABLE lens_residencies ADD CONSTRAINT lens_residencies_state_check
    CHECK (state IN ('coming', 'here', 'leaving', 'parking', 'parked', 'dropping'));
{_view(f"{_HERE} AND NOT {_ALONE}", f"b.state = 'parked' OR {_HERE} AND {_ALONE}")}
"""

_DOWN = f"""
DELETE FROM lens_residencies WHERE state IN ('parked', 'dropping');
UPDATE lens_residencies SET state = 'leaving' WHERE state = 'parking';
ALTER TABLE lens_residencies DROP CONSTRAINT lens_residencies_state_check;
ALTER TABLE lens_residencies ADD CONSTRAINT lens_residencies_state_check
    CHECK (state IN ('coming', 'here', 'leaving'));
{_view(_HERE, "b.state = 'parked'")}
"""  # noqa: S608 - our own text


def upgrade() -> None:
    """Allow lenses to be parked."""
    run_script(_UP)


def downgrade() -> None:
    """Forget parked lenses."""
    run_script(_DOWN)
