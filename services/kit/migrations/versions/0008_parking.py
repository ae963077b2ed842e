"""Models that are parked in host memory, and how much of it they may take."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0008_parking"
down_revision = "0006_training_jobs"

_UP = """
ALTER TABLE hosts ADD COLUMN park_bytes bigint NOT NULL DEFAULT 0 CHECK (park_bytes >= 0);
ALTER TABLE residencies DROP CONSTRAINT residencies_state_check;
ALTER TABLE residencies ADD CONSTRAINT residencies_state_check
    CHECK (state IN ('loading', 'resident', 'unloading', 'parking', 'parked', 'lost'));
DROP VIEW hosts_counted;
-- A device with what its ledger counts; what is parked is in host memory, and counted apart.
CREATE VIEW hosts_counted AS
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
    SELECT sum(c.charge_bytes) FILTER (WHERE state IN ('resident', 'unloading', 'parking'))::bigint AS used,
           sum(c.charge_bytes) FILTER (WHERE state = 'parked')::bigint AS parked
    FROM lens_residencies c JOIN residencies USING (model_id, host_id) WHERE c.host_id = h.host_id
) l ON true
LEFT JOIN LATERAL (SELECT sum(bytes)::bigint AS reserved FROM reservations WHERE host_id = h.host_id) v ON true;
"""

_DOWN = """
DELETE FROM residencies WHERE state = 'parked';
UPDATE residencies SET state = 'unloading' WHERE state = 'parking';
DROP VIEW hosts_counted;
ALTER TABLE residencies DROP CONSTRAINT residencies_state_check;
ALTER TABLE residencies ADD CONSTRAINT residencies_state_check
    CHECK (state IN ('loading', 'resident', 'unloading', 'lost'));
ALTER TABLE hosts DROP COLUMN park_bytes;
CREATE VIEW hosts_counted AS
SELECT h.*, h.host_id || '/' || h.device AS name,
       coalesce(r.used, 0) + coalesce(l.used, 0) AS used_bytes,
       coalesce(r.loading, 0) + coalesce(v.reserved, 0) AS reserved_bytes,
       extract(epoch FROM clock_timestamp() - h.heartbeat_at)::float8 AS silent_seconds
FROM hosts h
LEFT JOIN LATERAL (
    SELECT sum(charge_bytes) FILTER (WHERE state IN ('resident', 'unloading'))::bigint AS used,
           sum(charge_bytes) FILTER (WHERE state = 'loading')::bigint AS loading
    FROM residencies WHERE host_id = h.host_id
) r ON true
LEFT JOIN LATERAL (
    SELECT sum(c.charge_bytes)::bigint AS used FROM lens_residencies c
    JOIN residencies USING (model_id, host_id) WHERE c.host_id = h.host_id AND state <> 'lost'
) l ON true
LEFT JOIN LATERAL (SELECT sum(bytes)::bigint AS reserved FROM reservations WHERE host_id = h.host_id) v ON true;
"""


def upgrade() -> None:
    """Allow models to be parked."""
    run_script(_UP)


def downgrade() -> None:
    """Forget parked models."""
    run_script(_DOWN)
