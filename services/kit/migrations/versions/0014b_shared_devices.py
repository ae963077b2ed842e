"""What a whole device holds: processes that share it have one ledger, and other programs' bytes are in it."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0014b_shared_devices"
down_revision = "0014_groups"

_COUNTED = """
FROM hosts h
LEFT JOIN LATERAL (
    SELECT sum(charge_bytes) FILTER (WHERE state IN ('resident', 'unloading', 'parking'))::bigint AS used,
           sum(charge_bytes) FILTER (WHERE state = 'loading')::bigint AS loading,
           sum(charge_bytes) FILTER (WHERE state = 'parked')::bigint AS parked
    FROM residencies WHERE host_id = h.host_id
) r ON true
LEFT JOIN LATERAL (
    SELECT sum(c.charge_bytes) FILTER (WHERE b.state IN ('resident', 'unloading', 'parking'))::bigint AS used,
           sum(c.charge_bytes) FILTER (WHERE b.state = 'parked')::bigint AS parked
    FROM lens_residencies c JOIN residencies b USING (model_id, host_id) WHERE c.host_id = h.host_id
) l ON true
LEFT JOIN LATERAL (SELECT sum(bytes)::bigint AS reserved FROM reservations WHERE host_id = h.host_id) v ON true
"""
_COLUMNS = """
SELECT h.*, h.host_id || '/' || h.device AS name,
       coalesce(r.used, 0) + coalesce(l.used, 0) AS used_bytes,
       coalesce(r.loading, 0) + coalesce(v.reserved, 0) AS reserved_bytes,
       coalesce(r.parked, 0) + coalesce(l.parked, 0) AS parked_bytes,
       extract(epoch FROM clock_timestamp() - h.heartbeat_at)::float8 AS silent_seconds
"""

_UP = f"""
ALTER TABLE hosts
    ADD COLUMN power_watts double precision,
    ADD COLUMN device_used_bytes bigint,
    ADD COLUMN process_bytes bigint,
    ADD COLUMN machine text GENERATED ALWAYS AS (regexp_replace(address, ':[0-9]+$', '')) STORED;
DROP VIEW hosts_counted;
-- A process with what its ledger counts. `cap_bytes` is what it may hold at most beside the others of its device: their
-- limits together, no more than the larger of the largest and 80 % of the device, and never what other programs hold.
CREATE VIEW hosts_counted AS
WITH counted AS ({_COLUMNS} {_COUNTED}),
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

_DOWN = f"""
DROP VIEW hosts_counted;
ALTER TABLE hosts
    DROP COLUMN power_watts, DROP COLUMN device_used_bytes, DROP COLUMN process_bytes, DROP COLUMN machine;
CREATE VIEW hosts_counted AS {_COLUMNS} {_COUNTED};
"""


def upgrade() -> None:
    """Add the figures of whole devices."""
    run_script(_UP)


def downgrade() -> None:
    """Count every process alone."""
    run_script(_DOWN)
