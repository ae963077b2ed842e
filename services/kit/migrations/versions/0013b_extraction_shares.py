"""Units of extractions are leased, so that several processes fill one cache."""

from __future__ import annotations

from services.kit.migrate import run_script

revision = "0013b_extraction_shares"
down_revision = "0013_lens_eviction"

_UP = """
ALTER TABLE extractions
    ADD COLUMN units_total integer,      -- of the plan
    ADD COLUMN store_id text;            -- beside which its units are written

-- A row is a unit that is being made under a lease, or is done and has its size and digest. Its fence only grows.
ALTER TABLE extraction_units
    ALTER COLUMN size_bytes DROP NOT NULL,
    ALTER COLUMN digest DROP NOT NULL,
    ADD COLUMN holder text NOT NULL DEFAULT '',
    ADD COLUMN lease_until timestamptz NOT NULL DEFAULT '-infinity',
    ADD CONSTRAINT extraction_units_done CHECK ((size_bytes IS NULL) = (digest IS NULL));
"""

_DOWN = """
DELETE FROM extraction_units WHERE digest IS NULL;
ALTER TABLE extraction_units
    DROP CONSTRAINT extraction_units_done,
    ALTER COLUMN size_bytes SET NOT NULL,
    ALTER COLUMN digest SET NOT NULL,
    DROP COLUMN holder,
    DROP COLUMN lease_until;
ALTER TABLE extractions DROP COLUMN units_total, DROP COLUMN store_id;
"""


def upgrade() -> None:
    """Add the leases."""
    run_script(_UP)


def downgrade() -> None:
    """Drop them, and the units that are not done."""
    run_script(_DOWN)
