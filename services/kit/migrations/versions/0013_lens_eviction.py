"""Lenses leave devices one by one: when each was last used, who uses it, and which are on their way out."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0013_lens_eviction"
down_revision = "0010_evaluated_checkpoints"

_UP = """
ALTER TABLE lens_residencies
    ADD COLUMN last_used_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ADD COLUMN leases integer NOT NULL DEFAULT 0,
    ADD COLUMN state varchar(20) NOT NULL DEFAULT 'here' CHECK (state IN ('coming', 'here', 'leaving')),
    ADD COLUMN job_id text;  -- the load that it makes room for; null when that is another lens
"""

_DOWN = """
ALTER TABLE lens_residencies
    DROP COLUMN last_used_at, DROP COLUMN leases, DROP COLUMN state, DROP COLUMN job_id;
"""


def upgrade() -> None:
    """Add the columns."""
    run_script(_UP)


def downgrade() -> None:
    """Drop them."""
    run_script(_DOWN)
