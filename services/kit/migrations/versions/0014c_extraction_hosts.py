"""Units that another host made, until their job's own host has them."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0014c_extraction_hosts"
down_revision = "0014b_shared_devices"

_UP = """
-- gRPC address of the process on whose disk the unit's files are; empty where they are on the job's own.
ALTER TABLE extraction_units ADD COLUMN address text NOT NULL DEFAULT '';
"""

_DOWN = """
DELETE FROM extraction_units WHERE address <> '';
ALTER TABLE extraction_units DROP COLUMN address;
"""


def upgrade() -> None:
    """Add the column."""
    run_script(_UP)


def downgrade() -> None:
    """Drop it, and the units that are elsewhere."""
    run_script(_DOWN)
