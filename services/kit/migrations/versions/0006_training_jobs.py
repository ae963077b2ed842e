"""Trainings on several devices, and which of their checkpoints are kept."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0006_training_jobs"
down_revision = "0005_extensions"

_HOSTS_COUNTED = """
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

_UP = """
-- How CUDA_VISIBLE_DEVICES names the host's GPU on its machine; empty on a CPU.
ALTER TABLE hosts ADD COLUMN accelerator varchar(255) NOT NULL DEFAULT '';
-- The host that gives it back: the reserving one, which for a gang is not always the one whose bytes they are.
ALTER TABLE reservations ADD COLUMN holder_id varchar(255) REFERENCES hosts ON DELETE CASCADE;
UPDATE reservations SET holder_id = host_id;
ALTER TABLE reservations ALTER COLUMN holder_id SET NOT NULL;
CREATE INDEX reservations_holder ON reservations (holder_id, owner);

-- Which checkpoints are kept, besides the newest: {"last", "best", "every_tokens"}.
ALTER TABLE trainings ADD COLUMN retention jsonb NOT NULL DEFAULT '{}';
"""

_DOWN = """
ALTER TABLE trainings DROP COLUMN retention;
ALTER TABLE reservations DROP COLUMN holder_id;
ALTER TABLE hosts DROP COLUMN accelerator;
"""


def upgrade() -> None:
    """Add the columns; the view of hosts is made anew, for it shows the columns that were there when it was made."""
    run_script("DROP VIEW hosts_counted;" + _UP + _HOSTS_COUNTED)


def downgrade() -> None:
    """Drop them."""
    run_script("DROP VIEW hosts_counted;" + _DOWN + _HOSTS_COUNTED)
